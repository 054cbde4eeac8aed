"""The command ``vllm-gdn-plugin``."""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import fields

import vllm_gdn_plugin
from vllm_gdn_plugin.cli import check
from vllm_gdn_plugin.decide.checkpoint import NOT_LOOKED_AT, EngineFlags
from vllm_gdn_plugin.decide.plan import STRATEGIES
from vllm_gdn_plugin.settings import describe

EPILOG = """\
exit status of check:
  0  the plugin will install (with --require: and use that strategy)
  1  it will step aside; the reason is printed
  2  it cannot tell: vLLM is missing or broken, it does not take the model here, the model is neither here nor to be had
     from the Hub, or the arguments are wrong

decode kernel:
  The row says whether the kernel for a layer's decode may run. Each start compares it with vLLM's own and uses it where
  it is right and faster. The exit status and --require speak of the projections' strategy; where nothing but the kernel
  may run, the plugin installs, and that strategy is serial.

with --model:
  Where vLLM is installed, its own configuration says what it builds for each GDN layer: without weights, and without
  using a GPU. The first time takes some ten seconds more. Elsewhere only models without quantisation can be told.
  Of a Hub id the configuration is fetched, and the headers of the weights where a format needs them; where there is no
  network, or with HF_HUB_OFFLINE=1, the local cache must have it. Give the flags that the engine is started with. Not
  looked at, though they can change the plan:
    {ignored}

environment:
{settings}
  VLLM_PLUGINS: vLLM's own switch. Not set, every installed plugin is loaded; set, only those it names:
    VLLM_PLUGINS=vllm_gdn_plugin loads this one alone, VLLM_PLUGINS="" loads none.
"""

STATE_DTYPES = ("auto", "float32", "float16", "bfloat16")
DTYPES = ("auto", "half", "float16", "bfloat16", "float", "float32")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["bench"]:  # it has options of its own, and is imported only when asked for
        from vllm_gdn_plugin.bench.cli import main as bench

        return bench(arguments[1:])
    options = _parser().parse_args(arguments)
    return _check(options)


def _parser() -> argparse.ArgumentParser:
    settings = "\n".join(f"  {name} (default {default})\n    {text}" for name, default, text in describe())
    parser = argparse.ArgumentParser(
        prog="vllm-gdn-plugin",
        description="Speeds up Gated Delta Net layers in vLLM: their input projections, and their decode.",
        epilog="vllm-gdn-plugin check --help explains the report, the exit status and the settings.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {vllm_gdn_plugin.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser(
        "check",
        help="say what the plugin will do here, before vLLM is started",
        description="Takes the very decision that the plugin takes in the engine, and prints it with its reason.",
        epilog=EPILOG.format(settings=settings, ignored=", ".join(NOT_LOOKED_AT)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("--json", action="store_true", help="print one JSON object")
    command.add_argument(
        "--require",
        choices=STRATEGIES,
        help="exit 1 unless this strategy will be used: for the preflight of a deployment",
    )
    command.add_argument("--vllm-version", metavar="X", help="judge this version instead; vLLM need not be installed")
    command.add_argument(
        "--vllm-source",
        metavar="PATH",
        help="check the sources of this vLLM (source tree, site directory or wheel) instead; nothing is imported",
    )
    command.add_argument(
        "--model",
        metavar="MODEL",
        help="a local directory, its config.json or a Hub id: also tell the plan for each of its GDN layers",
    )
    command.add_argument("--revision", help="of a Hub id (default: its main branch)")
    flags = command.add_argument_group("flags of vllm serve, for --model")
    flags.add_argument("--tensor-parallel-size", "-tp", type=_count, default=1, metavar="N")
    flags.add_argument("--quantization", "-q", metavar="METHOD")
    flags.add_argument("--dtype", default="auto", choices=DTYPES)
    flags.add_argument("--enforce-eager", action="store_true")
    flags.add_argument("--enable-lora", action="store_true")
    flags.add_argument("--enable-dbo", action="store_true")
    flags.add_argument("--cpu-offload-gb", type=_gigabytes, default=0.0, metavar="GIB")
    flags.add_argument("--offload-group-size", type=_number, default=0, metavar="N")
    flags.add_argument("--mamba-ssm-cache-dtype", default="auto", choices=STATE_DTYPES)
    flags.add_argument("--speculative-config", metavar="JSON", help="only whether it is given matters")
    commands.add_parser(
        "bench", help="time the projections, a layer, or whole engines with and without the plugin", add_help=False
    )
    return parser


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text[:9]) < 1:
        raise argparse.ArgumentTypeError(f"{text!a} is not a whole number from 1 on")
    return int(text[:9])


def _number(text: str) -> int:
    return 0 if text == "0" else _count(text)


def _gigabytes(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!a} is not a number from 0 on")
    return number


def _check(options: argparse.Namespace) -> int:
    # vLLM logs to stdout by default; the report alone belongs there.
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "CRITICAL")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        if options.vllm_version is None and options.vllm_source is None:
            report = check.check_here()
        else:
            report = check.check_elsewhere(options.vllm_version, options.vllm_source)
        if options.model is not None:
            flags = EngineFlags(**{field.name: getattr(options, field.name) for field in fields(EngineFlags)})
            report = check.with_model(report, options.model, options.revision, flags)
    except check.CannotTell as error:
        return _cannot_tell(str(error))
    if options.require is not None:
        report = report.required(options.require)
    try:
        print(report.as_json() if options.json else report.as_text(), flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python fails again when it ends
        return _cannot_tell(f"the report cannot be written: {error.strerror}")
    return report.exit_code


def _cannot_tell(why: str) -> int:
    print(f"vllm-gdn-plugin check: {' '.join(why.split())}", file=sys.stderr)
    return check.EXIT_UNKNOWN
