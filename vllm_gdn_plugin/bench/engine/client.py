"""A process that runs ``vllm bench serve`` again and again: importing vLLM takes longer than many a run does."""

import json
import os
import runpy
import subprocess
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from vllm_gdn_plugin.bench.engine.server import CLI, ServerFailed, end_group

BENCH_SERVE = ("bench", "serve")


@dataclass(frozen=True)
class Client:
    """The process, as its parent sees it."""

    requests: IO[str]
    answers: IO[str]
    log_path: Path

    def run(self, options: Mapping[str, object]) -> dict[str, Any]:
        """What ``vllm bench serve`` with these options found for random prompts. Raises ServerFailed."""
        result = self.log_path.with_name("result.json")
        result.unlink(missing_ok=True)
        arguments = ["--dataset-name", "random", "--ignore-eos", "--disable-tqdm"]
        arguments += ["--save-result", "--result-dir", str(result.parent), "--result-filename", result.name]
        arguments += [text for name, value in options.items() for text in (f"--{name}", str(value))]
        logged = self.log_path.stat().st_size
        with suppress(BrokenPipeError):
            print(json.dumps(arguments), file=self.requests, flush=True)
        status = self.answers.readline().strip()
        if status != "0" or not result.exists():
            log = self.log_path.read_bytes()[logged:].decode(errors="replace")
            raise ServerFailed(f"status {status}" if status else "its process is gone", log)
        return dict(json.loads(result.read_text()))


@contextmanager
def client(env: Mapping[str, str], directory: Path) -> Iterator[Client]:
    """A client that runs, and writes its log, in ``directory``; it imports vLLM without being waited for."""
    log_path = directory / "client.log"
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            cwd=directory,
            env=dict(env),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            start_new_session=True,
        )
    assert process.stdin
    assert process.stdout
    try:
        yield Client(process.stdin, process.stdout, log_path)
    finally:
        end_group(process)


def main() -> None:
    """For each line on stdin, a JSON list of arguments, run the command and write its exit status to stdout."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what vLLM prints goes into the log
    _bench_serve(["--help"])  # imports vLLM
    for line in sys.stdin:
        print(_bench_serve(json.loads(line)), file=answers, flush=True)


def _bench_serve(arguments: Sequence[str]) -> int:
    """The exit status of ``vllm bench serve ARGUMENTS``."""
    sys.argv = ["vllm", *BENCH_SERVE, *arguments]
    try:
        runpy.run_module(CLI, run_name="__main__")
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)  # as Python does
        return 1
    except Exception:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    main()
