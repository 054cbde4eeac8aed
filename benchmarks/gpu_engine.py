"""Whole engines in real widths, with and without the plugin, within a time limit: `bench serve`, then `bench compile`.

    python benchmarks/gpu_engine.py --model 35B-A3B --output DIRECTORY [--minutes 9.5] [-- ARGUMENT ...]

Makes the model (gpu_models.py: no weights, vLLM fills in dummies) and runs both on it. What follows -- goes to
`vllm serve` after the arguments that dummies need. When the time is over, the bench that runs is interrupted: it keeps
what it measured, which are whole turns of all engines. Writes DIRECTORY/MODEL/serve.* and DIRECTORY/MODEL/compile.*.
Without a GPU: `--model tiny --device cpu --strategy fused,dual_stream -- --mamba-ssm-cache-dtype float32
--enforce-eager`.
"""

import argparse
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from gpu_models import MODELS, make_model

from vllm_gdn_plugin.bench.errors import BenchError
from vllm_gdn_plugin.bench.shapes import counts

PARTS = ("serve", "compile")
INPUT, OUTPUT, REQUESTS = "128", "128", "2"
DUMMY = ["--load-format", "dummy", "--language-model-only", "--no-enable-prefix-caching", "--max-model-len", "2048"]
STOP_SECONDS = 40
"""What is left of the time for an interrupted bench to stop its server and to write its report."""


def main() -> int:
    options = parsed()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the bench that runs is ended, too
    end = time.monotonic() + 60 * options.minutes - STOP_SECONDS
    with tempfile.TemporaryDirectory(prefix="gdn-", ignore_cleanup_errors=True) as scratch:
        model = make_model(options.model, Path(scratch) / options.model, options.layers)
        statuses = [run(command(part, model, options), end) for part in options.part]
    return max(statuses)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--layers", type=int, help="instead of the model's own number")
    parser.add_argument("--part", default="serve,compile", help="default serve,compile, in this order")
    parser.add_argument("--strategy", default="auto,fused,dual_stream", help="beside off; default all three")
    parser.add_argument("--rounds", default="2", help="default 2")
    parser.add_argument("--concurrency", default="1,2,4,8,16", help="default 1,2,4,8,16")
    parser.add_argument("--minutes", type=float, default=9.5, help="for all of it; default 9.5")
    parser.add_argument("vllm_arguments", metavar="-- ARGUMENT", nargs="*")
    options = parser.parse_args()
    options.part = options.part.split(",")
    try:
        options.concurrency = counts("--concurrency", options.concurrency)
    except BenchError as wrong:
        parser.error(str(wrong))
    if not set(options.part) <= set(PARTS):
        parser.error(f"--part {','.join(options.part)} is not {' or '.join(PARTS)}")
    if options.layers is not None and (options.layers < 4 or options.layers % 4):
        parser.error(f"--layers {options.layers} is not a multiple of 4")
    if options.minutes * 60 <= STOP_SECONDS:
        parser.error(f"--minutes {options.minutes:g}: {STOP_SECONDS} s of it are kept for the end")
    return options


def command(part: str, model: Path, options: argparse.Namespace) -> list[str]:
    """`vllm-gdn-plugin bench serve` or `bench compile` on the model."""
    line = [sys.executable, "-m", "vllm_gdn_plugin", "bench", part, "--model", str(model), "--device", options.device]
    line += ["--strategy", options.strategy, "--rounds", options.rounds]
    line += ["--output", str((options.output / options.model).resolve())]
    if part == "serve":
        line += ["--concurrency", ",".join(map(str, options.concurrency))]
        line += ["--input-len", INPUT, "--output-len", OUTPUT, "--requests", REQUESTS]
    return [*line, "--", *DUMMY, "--max-num-seqs", str(max(options.concurrency)), *options.vllm_arguments]


def run(line: Sequence[str], end: float) -> int:
    """The exit status of a bench that is interrupted when the clock reaches `end`; 130 where it has already."""
    if time.monotonic() >= end:
        print(f"gpu_engine.py: no time is left for bench {line[4]}", file=sys.stderr)
        return 130
    bench = subprocess.Popen(line)
    try:
        return bench.wait(max(0.0, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        print("gpu_engine.py: the time is over", file=sys.stderr)
    finally:
        if bench.poll() is None:
            bench.send_signal(signal.SIGINT)
            bench.wait()
    return bench.returncode


if __name__ == "__main__":
    sys.exit(main())
