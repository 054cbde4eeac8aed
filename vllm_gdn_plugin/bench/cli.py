"""The command ``vllm-gdn-plugin bench``."""

import argparse
import importlib
import shlex
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

from vllm_gdn_plugin.bench.errors import EXIT_INTERRUPTED, BadInput, BenchError
from vllm_gdn_plugin.bench.shapes import PRESETS, counts, distinct, preset_shapes, shape_of_model, shape_of_text

EPILOG = """\
exit status:
  0    all is measured and written
  1    a strategy did not compute what serial computes; what was measured before is written
  2    the arguments, the files or this machine are not what the command needs
  130  interrupted; what was measured before is written
"""

TOKENS = "1,2,4,8,16,32,64,128,256,512,1024,2048,4096"


def main(arguments: Sequence[str]) -> int:
    """Run ``bench ARGUMENTS``; returns its exit status."""
    options = _parser().parse_args(arguments)
    try:
        if options.command == "report":
            return _report(options)
        return _projections(options, shlex.join(["vllm-gdn-plugin", "bench", *arguments]))
    except BenchError as error:
        return _complain(str(error), error.exit_code)
    except KeyboardInterrupt:
        return _complain("interrupted; nothing was measured", EXIT_INTERRUPTED)


def _complain(line: str, exit_code: int) -> int:
    print(f"vllm-gdn-plugin bench: {line}", file=sys.stderr)
    return exit_code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vllm-gdn-plugin bench",
        description="Times the two input projections of a Gated Delta Net layer, alone, in each strategy.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    command = commands.add_parser(
        "projections",
        help="measure on this machine; writes JSON, Markdown and PNG",
        description="Verifies, then times serial, dual_stream, fused and in_proj_qkvz alone. Needs the extra bench.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("--model", metavar="PATH", help="the shape of this model: its directory, or its config.json")
    command.add_argument("--shape", metavar="HIDDEN,QKVZ,BA", action="append", default=[], help="may be repeated")
    command.add_argument("--preset", metavar="NAME", help=f"all, or one of {', '.join(PRESETS)}")
    command.add_argument("--tensor-parallel-size", metavar="N,...", default="1", help="divides qkvz and ba; default 1")
    command.add_argument("--tokens", metavar="N,...", default=TOKENS, help=f"default {TOKENS}")
    command.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    command.add_argument(
        "--quantization", choices=("fp8",), help="in_proj_qkvz as vLLM's block-quantised layer; needs CUDA and vLLM"
    )
    command.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="default cuda")
    command.add_argument("--rounds", metavar="N", default="30", help="samples of each strategy; default 30")
    command.add_argument("--output", metavar="DIR", type=Path, required=True, help="where the files are written")
    command = commands.add_parser(
        "report",
        help="make Markdown and PNG again from JSON",
        description="Makes the tables and the plot again from the JSON of bench projections, beside it, and prints"
        " the tables.",
    )
    command.add_argument("files", metavar="FILE", type=Path, nargs="+")
    return parser


def _projections(options: argparse.Namespace, command: str) -> int:
    shapes = [shape_of_model(options.model)] if options.model else []
    shapes += [shape_of_text(text) for text in options.shape]
    shapes += preset_shapes(options.preset) if options.preset else []
    if not shapes:
        raise BadInput("nothing to measure: give --model, --shape or --preset")
    sizes = counts("--tensor-parallel-size", options.tensor_parallel_size)
    rounds = counts("--rounds", options.rounds)
    if len(rounds) != 1:
        raise BadInput(f"--rounds {options.rounds!r} is not one number")
    ranks = [shape.split(size) for shape in distinct(shapes) for size in dict.fromkeys(sizes)]
    tokens = list(dict.fromkeys(counts("--tokens", options.tokens)))
    _require_modules("torch", "numpy", "scipy", "matplotlib", "tqdm")

    from tqdm import tqdm

    from vllm_gdn_plugin.bench.machine import describe_machine, require_device
    from vllm_gdn_plugin.bench.projections import SEED, Task, measure
    from vllm_gdn_plugin.bench.results import Run

    task = Task(ranks, tokens, options.device, options.dtype, options.quantization, *rounds)
    require_device(task.device)
    task.require()
    _make_directory(options.output)
    run = Run(
        command=command,
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        precision=task.precision,
        seed=SEED,
        rounds=task.rounds,
        machine=describe_machine(task.device),
    )
    exit_code = 0
    with tqdm(total=len(ranks) * len(tokens), unit="point", file=sys.stderr) as progress:
        try:
            measure(task, run, progress)
        except KeyboardInterrupt:
            run.stopped, exit_code = "interrupted", EXIT_INTERRUPTED
        except BenchError as error:
            run.stopped, exit_code = str(error), error.exit_code
    if run.points:
        path = options.output / f"{task.name}.json"
        try:
            run.save(path)
        except OSError as error:
            raise BadInput(f"{path} cannot be written: {error.strerror}") from error
        _write_report(path)
    if run.stopped:
        kept = f"kept: {len(run.points)} of {progress.total} points" if run.points else "nothing was measured"
        return _complain(f"{run.stopped}; {kept}", exit_code)
    return exit_code


def _report(options: argparse.Namespace) -> int:
    _require_modules("numpy", "scipy", "matplotlib")
    for path in options.files:
        _write_report(path)
    return 0


def _write_report(path: Path) -> None:
    """Write the Markdown and the plot of a run beside its JSON, and print the Markdown."""
    from vllm_gdn_plugin.bench.plot import plot
    from vllm_gdn_plugin.bench.results import load
    from vllm_gdn_plugin.bench.table import markdown

    run = load(path)
    text = markdown(run)
    try:
        path.with_suffix(".md").write_text(text, encoding="utf-8")
        plot(run, path.with_suffix(".png"))
    except OSError as error:
        raise BadInput(f"the report of {path} cannot be written: {error.strerror}") from error
    print(text)


def _make_directory(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"--output {path} cannot be made: {error.strerror}") from error


def _require_modules(*names: str) -> None:
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise BadInput(f"{name} cannot be imported ({error}): install vllm-gdn-plugin[bench], and torch") from error
