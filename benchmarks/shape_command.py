"""What the scripts that measure shape after shape share: their options, where they write, and how they end early."""

import argparse
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from vllm_gdn_plugin.bench.errors import EXIT_INTERRUPTED, BadInput, BenchError
from vllm_gdn_plugin.bench.results import Machine
from vllm_gdn_plugin.bench.shapes import PRESETS, Shape, counts, distinct, preset_shapes, shape_of_text


def parser_for_shapes(description: str | None, tensor_parallel_size: str, tokens: str) -> argparse.ArgumentParser:
    """A parser with the options that all have, and the defaults of two of them."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--preset", default="all", help=f"all, or one of {', '.join(PRESETS)}; default all")
    parser.add_argument("--shape", metavar="HIDDEN,QKVZ,BA", action="append", help="instead of the preset")
    size = f"default {tensor_parallel_size}"
    parser.add_argument("--tensor-parallel-size", metavar="N,...", default=tensor_parallel_size, help=size)
    parser.add_argument("--tokens", metavar="N,...", default=tokens, help=f"default {tokens}")
    return parser


def shapes_of(options: argparse.Namespace) -> list[Shape]:
    """What a rank has of each shape that was asked for, at each tensor parallel size. Raises BadInput."""
    whole = distinct(map(shape_of_text, options.shape) if options.shape else preset_shapes(options.preset))
    sizes = counts("--tensor-parallel-size", options.tensor_parallel_size)
    return [shape.split(size) for shape in whole for size in sizes]


def result_of(command: str, machine: Machine, rows: Iterable[dict[str, Any]], **more: object) -> dict[str, Any]:
    """What is written as JSON: ``rows``, measured as they are asked for, and what they were measured with."""
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {"command": command, "date": date, **more, "machine": asdict(machine), "rows": list(rows)}


@contextmanager
def written_below(directory: Path) -> Iterator[None]:
    """Make the directory for what is written in the body. Raises BadInput where either cannot be."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as failure:
        raise BadInput(f"--output {directory} cannot be written: {failure.strerror}") from failure


def run_script(name: str, arguments: Sequence[str], run: Callable[[str], int], interrupted: str) -> int:
    """The exit status of ``run``, which gets the command line; a line for the user where it ends early.

    Args:
        interrupted: what Ctrl-C leaves.
    """
    try:
        return run(shlex.join(["python", f"benchmarks/{name}", *arguments]))
    except BenchError as wrong:
        print(f"{name}: {wrong}", file=sys.stderr)
        return wrong.exit_code
    except KeyboardInterrupt:
        print(f"{name}: interrupted; {interrupted}", file=sys.stderr)
        return EXIT_INTERRUPTED
