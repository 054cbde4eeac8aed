"""Say what is being done, for how long already, and how long it took. Standard library only."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

HEARTBEAT_SECONDS = 10


@contextmanager
def step(title: str) -> Iterator[None]:
    """Print `title`, then the elapsed time every few seconds while the block runs, then the total."""
    start = time.monotonic()
    finished = threading.Event()

    def beat() -> None:
        while not finished.wait(HEARTBEAT_SECONDS):
            print(f"    ... {time.monotonic() - start:.0f} s", flush=True)

    print(f"==> {title}", flush=True)
    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    outcome = "stopped after"
    try:
        yield
        outcome = "took"
    finally:
        finished.set()
        thread.join()
        print(f"    {outcome} {time.monotonic() - start:.1f} s", flush=True)
