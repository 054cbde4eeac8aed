"""Start `vllm serve` in a scratch directory, wait until it answers, stop it. Standard library only."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MODEL_NAME = "tiny"
START_SECONDS = 300
STOP_SECONDS = 20
LOG_TAIL_LINES = 30


class ServerFailed(RuntimeError):
    """The server stopped, or didn't answer in time. The message ends with the end of its log."""


@dataclass(frozen=True)
class Server:
    """A running server: where it listens (`http://127.0.0.1:PORT`) and what it has logged."""

    url: str
    log_path: Path

    def log_text(self) -> str:
        return self.log_path.read_text(errors="replace")

    def post(self, path: str, body: Mapping[str, Any], **headers: str) -> Any:
        """POST `body` as JSON to `path` and return the decoded answer."""
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"} | headers
        )
        with urllib.request.urlopen(request, timeout=120) as response:
            return json.load(response)


def engine_env(scratch: Path, **settings: str) -> dict[str, str]:
    """This process's environment for one engine that keeps all its files below `scratch`.

    Inherited `VLLM_*` variables stay out, `settings` are added. `scratch` must be short: vLLM puts
    sockets below it, and their paths may not exceed 107 characters.
    """
    cache, tmp = scratch / "cache", scratch / "tmp"
    cache.mkdir(parents=True, exist_ok=True)
    tmp.mkdir(parents=True, exist_ok=True)
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("VLLM_")}
    return inherited | {
        "TMPDIR": str(tmp),
        "VLLM_CACHE_ROOT": str(cache),
        "VLLM_CONFIG_ROOT": str(cache / "config"),
        "XDG_CACHE_HOME": str(cache),
        "HF_HOME": str(cache / "huggingface"),
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; ignored on GPUs
        **settings,
    }


@contextmanager
def serve(model: Path, *, env: Mapping[str, str], args: Sequence[str] = ()) -> Iterator[Server]:
    """Serve `model` as `MODEL_NAME` on a free port of 127.0.0.1 and stop it when the block ends.

    `env` is the whole environment (see `engine_env`), `args` follow `vllm serve MODEL`. Raises
    `ServerFailed` if the server doesn't come up.
    """
    directory = Path(env["TMPDIR"])
    log_path = directory / f"server-{time.time_ns()}.log"
    port = _free_port()
    # From the scratch directory, so that Python imports installed packages, not the current tree.
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model.resolve())]
    command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", MODEL_NAME, *args]
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            command,
            cwd=directory,
            env=dict(env),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a process group of its own, so that all of it can be stopped
        )
    server = Server(f"http://127.0.0.1:{port}", log_path)
    try:
        _wait_until_healthy(process, server)
        yield server
    finally:
        try:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(STOP_SECONDS)
        finally:
            end_group(process)


def end_group(process: subprocess.Popen[bytes]) -> None:
    """Kill `process`, started with `start_new_session=True`, and all that it has started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_until_healthy(process: subprocess.Popen[bytes], server: Server) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise ServerFailed(_with_log(server, f"the server stopped with {process.returncode}"))
        try:
            with urllib.request.urlopen(server.url + "/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.3)
    raise ServerFailed(_with_log(server, f"the server didn't answer within {START_SECONDS} s"))


def _with_log(server: Server, message: str) -> str:
    tail = server.log_text().splitlines()[-LOG_TAIL_LINES:]
    return "\n".join([f"{message}; the end of its log:", *(f"  | {line}" for line in tail)])
