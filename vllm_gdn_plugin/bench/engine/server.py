"""A ``vllm serve`` of our own: start it, wait until it answers, stop it with all that it has started."""

import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any

from vllm_gdn_plugin.bench.errors import BadInput

START_SECONDS = 1800
"""A large model on a slow disk takes its time; a server that ends is noticed at once."""
STOP_SECONDS = 20
POLL_SECONDS = 0.1
LOG_TAIL_LINES = 30

CLI = "vllm.entrypoints.cli.main"
"""The command ``vllm``, as a module."""

KV_CACHE = "--kv-cache-memory-bytes"
"""Of `vllm serve`: the size of the KV cache, which is otherwise what an engine that starts finds free."""


class ServerFailed(RuntimeError):
    """A process of vLLM stopped, or did not answer in time. The message ends with the end of its log."""

    def __init__(self, what: str, log: str) -> None:
        tail = [f"  | {line}" for line in log.splitlines()[-LOG_TAIL_LINES:]]
        super().__init__("\n".join([f"{what}; the end of its log:", *tail]))
        self.what = what
        self.log = log

    def cause(self) -> str:
        """One line: what happened, and the last line of the log that names an error."""
        errors = re.findall(r"(?:^|[\s.])(\w*(?:Error|Exception|Refused)\b: .+)$", self.log, re.MULTILINE)
        return f"{self.what}: {errors[-1]}" if errors else self.what


def may_start_at_once(arguments: Sequence[str]) -> bool:
    """Whether none of several servers with these arguments of ``vllm serve`` takes what another needs."""
    return any(text.replace("_", "-").startswith(KV_CACHE) for text in arguments)


@dataclass
class Server:
    """A server, from the start of its process."""

    url: str
    """``http://127.0.0.1:PORT``"""
    log_path: Path
    process: "subprocess.Popen[bytes]"
    began: float
    seconds: float = math.nan
    """From the start of the process to the first answer of ``/health``."""

    def answers(self) -> bool:
        """Whether ``/health`` answers. Raises ServerFailed once it will not any more."""
        seconds = time.monotonic() - self.began
        if self.process.poll() is not None:
            raise ServerFailed(f"the server stopped with {self.process.returncode}", self.log_text())
        if seconds > START_SECONDS:
            raise ServerFailed(f"the server did not answer within {START_SECONDS} s", self.log_text())
        try:
            with urllib.request.urlopen(self.url + "/health", timeout=5):
                self.seconds = time.monotonic() - self.began
                return True
        except (OSError, HTTPException):
            return False

    def log_text(self) -> str:
        """What it has logged so far."""
        return self.log_path.read_text(errors="replace")

    def get(self, path: str) -> str:
        """The body that ``path`` answers."""
        return self._ask(self.url + path).decode()

    def post(self, path: str, body: Mapping[str, Any], **headers: str) -> Any:
        """POST ``body`` as JSON to ``path``; returns the decoded answer."""
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"} | headers
        )
        return json.loads(self._ask(request))

    def _ask(self, request: urllib.request.Request | str) -> bytes:
        try:
            with urllib.request.urlopen(request, timeout=600) as response:
                return bytes(response.read())
        except (OSError, HTTPException) as error:
            raise BadInput(f"the server at {self.url} does not answer as expected: {error}") from error


@contextmanager
def serve(
    model: Path | str, *, env: Mapping[str, str], directory: Path, arguments: Sequence[str] = ()
) -> Iterator[Server]:
    """:func:`launch`, and wait until it answers. Raises ServerFailed if it does not come up."""
    with launch(model, env=env, directory=directory, arguments=arguments) as server:
        while not server.answers():
            time.sleep(POLL_SECONDS)
        yield server


@contextmanager
def launch(
    model: Path | str, *, env: Mapping[str, str], directory: Path, arguments: Sequence[str] = ()
) -> Iterator[Server]:
    """Start to serve ``model`` on a free port of 127.0.0.1, and stop when the block ends, however it ends.

    Args:
        model, arguments: what follows ``vllm serve``.
        env: the whole environment of the server.
        directory: where it runs, and where its log is written.
    """
    log_path = directory / f"server-{time.time_ns()}.log"
    port = _free_port()
    command = [sys.executable, "-m", CLI, "serve", str(model), "--host", "127.0.0.1", "--port", str(port), *arguments]
    began = time.monotonic()
    with log_path.open("wb") as log:
        # From `directory`, so that Python imports installed packages, not the current tree; as a process group of its
        # own, so that all of it can be stopped.
        process = subprocess.Popen(
            command,
            cwd=directory,
            env=dict(env),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield Server(f"http://127.0.0.1:{port}", log_path, process, began)
    finally:
        try:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(STOP_SECONDS)
        finally:
            end_group(process)


def end_group(process: "subprocess.Popen[Any]") -> None:
    """Kill ``process``, started with ``start_new_session=True``, and all that it has started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
