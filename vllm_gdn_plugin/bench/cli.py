"""The command ``vllm-gdn-plugin bench``."""

import argparse
import importlib.util
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_gdn_plugin.bench.errors import EXIT_INTERRUPTED, BadInput, BenchError
from vllm_gdn_plugin.bench.shapes import PRESETS, count, counts, distinct, preset_shapes, shape_of_model, shape_of_text

if TYPE_CHECKING:
    from vllm_gdn_plugin.bench.engine.results import EngineRun
    from vllm_gdn_plugin.bench.results import Run

EPILOG = """\
exit status:
  0    all is measured and written
  1    a way did not compute what stock vLLM computes; what was measured before is written
  2    the arguments, the files or this machine are not what the command needs
  130  interrupted; what was measured before is written
"""

TOKENS = "1,2,4,8,16,32,64,128,256,512,1024,2048,4096"
DECODED = "1,2,4,8,16,32,64,128,256"
STATISTICS = ("numpy", "scipy", "matplotlib")
ENDING = (signal.SIGINT, signal.SIGTERM)


def main(arguments: Sequence[str]) -> int:
    """Run ``bench ARGUMENTS``; returns its exit status."""
    options = _parser().parse_args(arguments)
    command = shlex.join(["vllm-gdn-plugin", "bench", *arguments])
    for signum in ENDING:  # also where a shell ignores SIGINT: no server is left behind
        signal.signal(signum, _interrupt)
    try:
        return int(options.run(options, command))
    except BenchError as error:
        return _complain(str(error), error.exit_code)
    except KeyboardInterrupt:
        return _complain("interrupted; nothing was measured", EXIT_INTERRUPTED)


def _interrupt(signum: int, frame: object) -> None:
    """The first signal ends the measuring; no other may end what follows: servers are stopped, files are written."""
    _ignore_signals()
    raise KeyboardInterrupt


def _ignore_signals() -> None:
    for signum in ENDING:
        signal.signal(signum, signal.SIG_IGN)


def _complain(line: str, exit_code: int) -> int:
    print(f"vllm-gdn-plugin bench: {line}", file=sys.stderr)
    return exit_code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vllm-gdn-plugin bench",
        description="Measures what the plugin does for a model on this machine. Needs the extra bench.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")

    def measuring(
        name: str, run: Callable[..., int], help: str, description: str, devices: Sequence[str] = ("cuda", "cpu")
    ) -> argparse.ArgumentParser:
        command = commands.add_parser(
            name,
            help=help,
            description=description,
            epilog=EPILOG,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.set_defaults(run=run)
        command.add_argument("--device", choices=devices, default="cuda", help="default cuda")
        command.add_argument("--output", metavar="DIR", type=Path, required=True, help="where the files are written")
        return command

    command = measuring(
        "projections",
        _projections,
        "time the two input projections of a layer, alone",
        "Verifies, then times serial, dual_stream, fused and in_proj_qkvz alone.",
    )
    command.add_argument("--model", metavar="MODEL", help="a model's: its directory, its config.json or a Hub id")
    command.add_argument("--shape", metavar="HIDDEN,QKVZ,BA", action="append", default=[], help="may be repeated")
    command.add_argument("--preset", metavar="NAME", help=f"all, or one of {', '.join(PRESETS)}")
    command.add_argument("--tensor-parallel-size", metavar="N,...", default="1", help="divides qkvz and ba; default 1")
    command.add_argument("--tokens", metavar="N,...", default=TOKENS, help=f"default {TOKENS}")
    command.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    command.add_argument(
        "--quantization", choices=("fp8",), help="in_proj_qkvz as vLLM's block-quantised layer; needs CUDA and vLLM"
    )
    command.add_argument("--rounds", metavar="N", default="30", help="samples of each way; default 30")

    command = measuring(
        "layer",
        _layer,
        "time a decode step of a layer, from its projections to out_proj",
        "Verifies, then times stock vLLM, the plugin's projections alone and with its decode kernel, in CUDA graphs:\n"
        "layers as vLLM builds them for the model, with random weights and states.",
        devices=("cuda",),
    )
    command.add_argument("--model", metavar="MODEL", required=True, help="its directory, its config.json or a Hub id")
    command.add_argument("--tensor-parallel-size", metavar="N", default="1", help="one rank of so many; default 1")
    command.add_argument("--tokens", metavar="N,...", default=DECODED, help=f"default {DECODED}")
    command.add_argument("--layers", metavar="N", help="in a graph; default: as many as do not fit the GPU's cache")
    command.add_argument("--rounds", metavar="N", default="30", help="samples of each way; default 30")
    _add_vllm_arguments(command, "all that follows -- are engine arguments of `vllm serve`")

    command = measuring(
        "serve",
        _serve,
        "time whole engines that serve, with the plugin and without it",
        "Starts `vllm serve` without the plugin and with each strategy, in turn, and drives each with `vllm bench\n"
        "serve`. Answers are compared before anything is timed.",
    )
    _add_engine_arguments(command, "how often each engine is driven, without --side-by-side a new one each time")
    command.add_argument("--concurrency", metavar="N,...", default="1,2,4,8,16", help="default 1,2,4,8,16")
    command.add_argument("--input-len", metavar="N,...", default="512", help="tokens of each prompt; default 512")
    command.add_argument("--output-len", metavar="N", default="256", help="tokens of each answer; default 256")
    command.add_argument(
        "--side-by-side",
        action="store_true",
        help="start one engine of each kind, keep all running and drive them in turn: more rounds in the same time, and"
        " nothing said of start-up and memory. All must fit into memory. They start at once where `vllm serve` gets"
        " --kv-cache-memory-bytes; pass a small --gpu-memory-utilization with it, such as 0.01, because vLLM still"
        " refuses to start where less than that part is free. Without it they start one after the other, because each"
        " measures what the others leave free",
    )
    command.add_argument("--requests", metavar="N", default="4", help="of each client, one after the other; default 4")

    command = measuring(
        "compile",
        _compile,
        "time cold and warm starts, with the plugin and without it",
        "Starts `vllm serve` with empty caches and again with full ones, without the plugin and with each strategy,\n"
        "in turn; counts the compiled graphs.",
    )
    _add_engine_arguments(command, "cold and warm starts of each engine")
    command.add_argument(
        "--at-once",
        metavar="N",
        default="1",
        help="engines that start at the same time, all of one or more rounds: more rounds in the same time, each start"
        " slower, all alike. `vllm serve` then needs --kv-cache-memory-bytes; see bench serve --side-by-side",
    )

    command = commands.add_parser(
        "report",
        help="make Markdown and PNG again from JSON",
        description="Makes the tables and the plot again from the JSON of a bench, beside it, and prints the tables.",
    )
    command.set_defaults(run=_report)
    command.add_argument("files", metavar="FILE", type=Path, nargs="+")
    return parser


def _add_engine_arguments(command: argparse.ArgumentParser, rounds: str) -> None:
    command.add_argument("--model", required=True, help="as for `vllm serve`")
    command.add_argument(
        "--strategy",
        metavar="NAME[=SETTING=VALUE],...",
        default="auto",
        help="an engine for each; with settings, as in no_kernel=VLLM_GDN_PLUGIN_DECODE_KERNEL=0, one of that name with"
        " them; default auto",
    )
    command.add_argument("--rounds", metavar="N", default="5", help=f"{rounds}; default 5")
    _add_vllm_arguments(command, "all that follows -- is passed on to `vllm serve`")


def _add_vllm_arguments(command: argparse.ArgumentParser, help: str) -> None:
    command.add_argument("vllm_arguments", metavar="-- ARGUMENT", nargs="*", help=help)


def _projections(options: argparse.Namespace, command: str) -> int:
    shapes = [shape_of_model(options.model)] if options.model else []
    shapes += [shape_of_text(text) for text in options.shape]
    shapes += preset_shapes(options.preset) if options.preset else []
    if not shapes:
        raise BadInput("nothing to measure: give --model, --shape or --preset")
    sizes = counts("--tensor-parallel-size", options.tensor_parallel_size)
    ranks = [shape.split(size) for shape in distinct(shapes) for size in dict.fromkeys(sizes)]
    tokens = list(dict.fromkeys(counts("--tokens", options.tokens)))
    rounds = count("--rounds", options.rounds)
    _require_modules("torch", *STATISTICS, "tqdm")

    from vllm_gdn_plugin.bench.machine import describe_machine, require_device
    from vllm_gdn_plugin.bench.projections import SEED, Task, measure
    from vllm_gdn_plugin.bench.results import Run

    task = Task(ranks, tokens, options.device, options.dtype, options.quantization, rounds)
    require_device(task.device)
    task.require()
    _make_directory(options.output)
    run = Run(command, _now(), task.precision, SEED, task.rounds, describe_machine(task.device, bandwidth=True))
    path = options.output / f"{task.name}.json"
    return _measured(run, path, len(ranks) * len(tokens), lambda progress: measure(task, run, progress))


def _layer(options: argparse.Namespace, command: str) -> int:
    tokens = list(dict.fromkeys(counts("--tokens", options.tokens)))
    size, rounds = count("--tensor-parallel-size", options.tensor_parallel_size), count("--rounds", options.rounds)
    layers = count("--layers", options.layers) if options.layers else None
    _require_modules("torch", *STATISTICS, "tqdm", "vllm")

    from vllm_gdn_plugin.bench.machine import describe_machine, require_device

    require_device(options.device)
    _make_directory(options.output)

    from vllm_gdn_plugin.bench.layer import measure
    from vllm_gdn_plugin.bench.projections import SEED
    from vllm_gdn_plugin.bench.results import LAYER, Run
    from vllm_gdn_plugin.bench.vllm_layer import built
    from vllm_gdn_plugin.tune.timer import CudaTimer

    with built(options.model, options.vllm_arguments, size, tokens) as model:
        machine = describe_machine(options.device, bandwidth=True)
        run = Run(command, _now(), model.precision, SEED, rounds, machine, LAYER)
        path, timer = options.output / "layer.json", CudaTimer()
        return _measured(run, path, len(tokens), lambda bar: measure(model, tokens, layers, timer, run, bar))


def _serve(options: argparse.Namespace, command: str) -> int:
    concurrency = list(dict.fromkeys(counts("--concurrency", options.concurrency)))
    input_len = list(dict.fromkeys(counts("--input-len", options.input_len)))
    output_len, requests = count("--output-len", options.output_len), count("--requests", options.requests)

    from vllm_gdn_plugin.bench.engine.results import SERVE

    run = _engine_run(options, SERVE, command)

    from vllm_gdn_plugin.bench.engine.serve import Load, measure

    load = Load(concurrency, input_len, output_len, requests)
    run.load = f"`vllm bench serve`: {load}"
    if options.side_by_side:
        run.load += "; engines side by side, idle while another is driven"
    steps = (run.rounds + 1) * len(run.variants)
    return _measured(
        run, options.output / "serve.json", steps, lambda progress: measure(run, load, options.side_by_side, progress)
    )


def _compile(options: argparse.Namespace, command: str) -> int:
    from vllm_gdn_plugin.bench.engine.results import COMPILE
    from vllm_gdn_plugin.bench.engine.server import KV_CACHE, may_start_at_once

    at_once = count("--at-once", options.at_once)
    if at_once > 1 and not may_start_at_once(options.vllm_arguments):
        raise BadInput(f"--at-once {at_once} needs {KV_CACHE} after --: else each engine takes what it finds free")
    run = _engine_run(options, COMPILE, command)
    if at_once > 1 and (at_once % len(run.variants) or run.rounds % (at_once // len(run.variants))):
        raise BadInput(
            f"--at-once {at_once}: {run.rounds} rounds of {len(run.variants)} engines are not made of groups of so many"
            " whole rounds"
        )
    if at_once > 1:
        run.load = f"{at_once} engines start at the same time"

    from vllm_gdn_plugin.bench.engine.compile import measure, steps

    path = options.output / "compile.json"
    return _measured(run, path, steps(run), lambda progress: measure(run, at_once, progress))


def _engine_run(options: argparse.Namespace, kind: str, command: str) -> "EngineRun":
    """An empty run, once all that can be known to be wrong has been asked."""
    from vllm_gdn_plugin.bench.engine.results import EngineRun
    from vllm_gdn_plugin.bench.engine.variants import variants

    found = variants(dict.fromkeys(options.strategy.split(",")))
    rounds = count("--rounds", options.rounds)
    _require_modules("torch", *STATISTICS, "tqdm", "psutil", "vllm")

    from vllm_gdn_plugin.bench.machine import describe_machine, require_device

    require_device(options.device)
    _make_directory(options.output)
    model = str(Path(options.model).resolve()) if Path(options.model).exists() else options.model
    return EngineRun(
        kind=kind,
        command=command,
        date=_now(),
        rounds=rounds,
        model=model,
        vllm_arguments=options.vllm_arguments,
        variants=found,
        machine=describe_machine(options.device),
    )


def _measured(run: "Run | EngineRun", path: Path, steps: int, measure: Callable[[Any], None]) -> int:
    """Measure under a progress bar, and write what was measured, however it ends."""
    from tqdm import tqdm

    exit_code = 0
    with tqdm(total=steps, file=sys.stderr) as progress:
        try:
            measure(progress)
        except KeyboardInterrupt:
            run.stopped, exit_code = "interrupted", EXIT_INTERRUPTED
        except BenchError as error:
            run.stopped, exit_code = str(error), error.exit_code
        finally:
            _ignore_signals()
    if not run.is_empty():
        from vllm_gdn_plugin.bench.report import write_report

        try:
            run.save(path)
        except OSError as error:
            raise BadInput(f"{path} cannot be written: {error.strerror}") from error
        write_report(path)
    if run.stopped:
        kept = "nothing was measured" if run.is_empty() else f"kept: {progress.n} of {steps} steps"
        return _complain(f"{run.stopped}; {kept}", exit_code)
    return exit_code


def _report(options: argparse.Namespace, command: str) -> int:
    _require_modules(*STATISTICS)

    from vllm_gdn_plugin.bench.report import write_report

    for path in options.files:
        write_report(path)
    return 0


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _make_directory(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"--output {path} cannot be made: {error.strerror}") from error


def _require_modules(*names: str) -> None:
    for name in names:
        try:
            if importlib.util.find_spec(name) is None:
                raise ImportError(f"there is no module {name}")
            if name != "vllm":  # which takes seconds
                importlib.import_module(name)
        except ImportError as error:
            raise BadInput(f"{name} cannot be imported ({error}): install vllm-gdn-plugin[bench], and vLLM") from error
