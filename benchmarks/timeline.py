"""What one GDN layer's decode step looks like on the GPU: stock, dual stream and fused, to one scale.

    python benchmarks/timeline.py record MODEL DIRECTORY [--strategy NAME,...] [--prefill N] [--engine JSON]
    python benchmarks/timeline.py list TRACE [--match REGEX]                           # finds the layer in a trace
    python benchmarks/timeline.py trim DIRECTORY FILE.json VARIANT=FIRST-LAST:LABEL,...  ...
    python benchmarks/timeline.py draw FILE.json FILE.png
    python benchmarks/timeline.py sections DIRECTORY FILE.json FIRST LAST LABEL=REGEX ...

MODEL is a directory, such as gpu_models.py makes. `record` needs a GPU; it traces decode steps, or with `--prefill` the
step of prompts of N tokens. `list` numbers the kernels; `trim` keeps those from FIRST to LAST of
each VARIANT, each with a LABEL, in a file that is small enough to be kept; the picture is drawn from that file alone.
`sections` times what recurs in the traces, such as every GDN layer of every step: from the nearest kernel before that
matches the regular expression FIRST to one that matches LAST. It keeps the times of the whole and of each LABEL's
kernels in FILE.json, a table beside it in FILE.md, and says where the section of median length lies.
Without a GPU `record --device cpu` traces operators in place of kernels.
"""

import argparse
import gzip
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from vllm_gdn_plugin.bench.engine.variants import OFF, require_at_work, variants
from vllm_gdn_plugin.bench.errors import BadInput, BenchError
from vllm_gdn_plugin.bench.results import Machine, read
from vllm_gdn_plugin.decide.plan import AUTO, DUAL_STREAM, FUSED

TITLES = {OFF: "stock", AUTO: "the plugin"}
CATEGORY = {"cuda": "kernel", "cpu": "cpu_op"}
PROMPT_TOKENS, WARM_UP_TOKENS, TRACED_TOKENS = 32, 8, 33
ABOUT = "record.json"
TRACE = ".trace.json.gz"
NEIGHBOURS = 14
"""Kernels that `list --match` shows on either side."""


@dataclass(frozen=True)
class Kernel:
    """One bar of the picture; microseconds, counted from the first kernel."""

    name: str
    stream: int
    start: float
    duration: float
    label: str = ""


def kernels_of(trace: Path) -> list[Kernel]:
    """The kernels of a trace that torch.profiler exported, by start. Raises BadInput."""
    try:
        with gzip.open(trace, "rt") as file:
            events = json.load(file)["traceEvents"]
        found = [
            Kernel(event["name"], event["args"].get("stream", event["tid"]), event["ts"], event["dur"])
            for event in events
            if event.get("cat") in CATEGORY.values()
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{trace} is no gzipped trace of torch.profiler: {type(error).__name__}: {error}") from error
    if not found:
        raise BadInput(f"{trace} holds no kernels")
    return _from_zero(sorted(found, key=lambda kernel: kernel.start))


def _from_zero(kernels: Sequence[Kernel]) -> list[Kernel]:
    zero = kernels[0].start
    return [Kernel(k.name, k.stream, round(k.start - zero, 3), k.duration, k.label) for k in kernels]


def listing(kernels: Sequence[Kernel], match: re.Pattern[str] | None) -> str:
    """A line for each kernel; with `match`, only those around the middle one of the kernels that match."""
    numbered = list(enumerate(kernels))
    if match is not None:
        hits = [number for number, kernel in numbered if match.search(kernel.name)]
        if not hits:
            raise BadInput(f"--match {match.pattern!r}: no kernel has such a name")
        middle = hits[len(hits) // 2]
        numbered = numbered[max(0, middle - NEIGHBOURS) : middle + NEIGHBOURS + 1]
    return "\n".join(f"{n:6} {k.start:12.3f} us {k.duration:9.3f} us  stream {k.stream}  {k.name}" for n, k in numbered)


def selected(directory: Path, text: str) -> tuple[str, list[Kernel]]:
    """(variant, its kernels with their labels) for VARIANT=FIRST-LAST:LABEL,... Raises BadInput."""
    parts = re.fullmatch(r"(\w+)=(\d+)-(\d+):(.+)", text)
    if not parts:
        raise BadInput(f"{text!r} is not VARIANT=FIRST-LAST:LABEL,...")
    variant, first, last, labels = parts[1], int(parts[2]), int(parts[3]), parts[4].split(",")
    chosen = kernels_of(trace_path(directory, variant))[first : last + 1]
    if len(chosen) != last - first + 1 or len(labels) != len(chosen):
        raise BadInput(f"{variant}: {len(labels)} labels for {len(chosen)} kernels from {first} to {last}")
    return variant, _from_zero(
        [Kernel(k.name, k.stream, k.start, k.duration, label) for k, label in zip(chosen, labels, strict=True)]
    )


WALL, SUM, OTHER = "from start to end", "sum of the kernels", "other"


def sections_of(kernels: Sequence[Kernel], first: re.Pattern[str], last: re.Pattern[str]) -> list[tuple[int, int]]:
    """(number of the first kernel, number of the last) of each section. Raises BadInput."""
    found, start = [], None
    for number, kernel in enumerate(kernels):
        if first.search(kernel.name):
            start = number
        elif start is not None and last.search(kernel.name):
            found.append((start, number))
            start = None
    if not found:
        raise BadInput(f"no kernel {last.pattern!r} follows a kernel {first.pattern!r}")
    return found


def times_of(section: Sequence[Kernel], parts: dict[str, re.Pattern[str]]) -> dict[str, float]:
    """Microseconds from its start to its end, in its kernels, and in the kernels of each part."""
    end = max(kernel.start + kernel.duration for kernel in section)
    times = dict.fromkeys((WALL, SUM, *parts, OTHER), 0.0)
    times[WALL] = end - section[0].start
    for kernel in section:
        times[SUM] += kernel.duration
        times[next((label for label, regex in parts.items() if regex.search(kernel.name)), OTHER)] += kernel.duration
    return {label: round(time, 3) for label, time in times.items()}


def sections(options: argparse.Namespace) -> None:
    about = read(options.directory / ABOUT)
    found: dict[str, dict[str, list[float]]] = {}
    traced = sorted(options.directory.glob(f"*{TRACE}"), key=lambda trace: (trace.name != f"{OFF}{TRACE}", trace.name))
    for trace in traced:
        variant, kernels = trace.name.removesuffix(TRACE), kernels_of(trace)
        places = sections_of(kernels, options.first, options.last)
        times = [times_of(kernels[first : last + 1], dict(options.parts)) for first, last in places]
        found[variant] = {label: [time[label] for time in times] for label in times[0]}
        (first, last), _ = sorted(zip(places, times, strict=True), key=lambda pair: pair[1][WALL])[len(times) // 2]
        print(f"{variant}: {len(times)} sections; one of median length: {first}-{last}")
    rows = [
        f'  "{variant}": {{\n'
        + ",\n".join(f"   {json.dumps(label)}: {json.dumps(times)}" for label, times in x.items())
        for variant, x in found.items()
    ]
    options.file.write_text(
        f'{{\n "about": {json.dumps(about)},\n "sections_us": {{\n' + "\n  },\n".join(rows) + "\n  }\n }\n}\n"
    )
    options.file.with_suffix(".md").write_text(table_of(about, found))


def table_of(about: dict[str, Any], found: dict[str, dict[str, list[float]]]) -> str:
    """The times of the sections as Markdown: medians, with the 5th and 95th percentile."""
    from vllm_gdn_plugin.bench.stats import summary
    from vllm_gdn_plugin.bench.table import about_machine

    lines = [
        f"{about['model']}, batch of {about['batch']}; {about_machine(Machine(**about['machine']))}; {about['date']}",
        "",
        f"Microseconds, median (5th to 95th percentile) of {' and '.join(str(len(x[WALL])) for x in found.values())}"
        f" sections. `{json.dumps(about['engine'])}`",
        "",
        f"| | {' | '.join(TITLES.get(variant, variant) for variant in found)} |",
        "|---|" + "---|" * len(found),
    ]
    labels = dict.fromkeys(label for times in found.values() for label, samples in times.items() if any(samples))
    for label in labels:
        cells = (summary(times[label]) for times in found.values())
        lines.append(
            f"| {label} | " + " | ".join(f"{c.median:.2f} ({c.low:.2f} to {c.high:.2f})" for c in cells) + " |"
        )
    return "\n".join(lines) + "\n"


def trace_path(directory: Path, variant: str) -> Path:
    return directory / f"{variant}{TRACE}"


def load(path: Path) -> tuple[dict[str, Any], dict[str, list[Kernel]]]:
    """(what was recorded, the kernels of each variant) from what `trim` wrote. Raises BadInput."""
    data = read(path)
    try:
        variants = {name: [Kernel(*row) for row in rows] for name, rows in data["variants"].items()}
        if not all(variants.values()):
            raise ValueError("a variant has no kernels")
        return data["about"], variants
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadInput(f"{path} was not written by timeline.py trim: {type(error).__name__}: {error}") from error


def rows_of(variants: dict[str, list[Kernel]]) -> list[tuple[str, list[Kernel]]]:
    """One row for each stream of each variant, the stream on which the layer ends first."""
    rows = []
    for name, kernels in variants.items():
        main = max(kernels, key=lambda kernel: kernel.start + kernel.duration).stream
        streams = sorted({kernel.stream for kernel in kernels}, key=lambda stream: (stream != main, stream))
        for number, stream in enumerate(streams):
            title = TITLES.get(name, name) + (f", stream {number + 1}" if len(streams) > 1 else "")
            rows.append((title, [kernel for kernel in kernels if kernel.stream == stream]))
    return rows


def picture_of(about: dict[str, Any], variants: dict[str, list[Kernel]]) -> Any:
    """A matplotlib figure: one bar for each kernel, one row for each stream, one scale for all."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    rows = rows_of(variants)
    labels = list(dict.fromkeys(kernel.label for kernels in variants.values() for kernel in kernels))
    colors = {label: f"C{number % 10}" for number, label in enumerate(labels)}
    figure = Figure(figsize=(10, 0.55 * len(rows) + 1.8), layout="constrained")
    axis = figure.subplots()
    for number, (_, kernels) in enumerate(rows):
        axis.barh(
            [number] * len(kernels),
            [kernel.duration for kernel in kernels],
            left=[kernel.start for kernel in kernels],
            color=[colors[kernel.label] for kernel in kernels],
            edgecolor="white",
            linewidth=0.5,
        )
        end = kernels[-1].start + kernels[-1].duration
        axis.text(end, number, f" {end:.1f} us", va="center", fontsize=8)
    axis.set_yticks(range(len(rows)), [title for title, _ in rows], fontsize=8)
    axis.invert_yaxis()
    axis.margins(x=0.08)
    axis.set_xlim(left=0)
    axis.set_xlabel("microseconds", fontsize=8)
    axis.grid(axis="x", alpha=0.3)
    axis.set_title(f"{about['model']}, batch of {about['batch']}, {about['machine']['hardware']}", fontsize=9)
    handles = [Patch(color=colors[label], label=label) for label in labels]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(6, len(labels)), fontsize=8)
    return figure


def record(options: argparse.Namespace) -> None:
    """Trace an engine of each variant, in a process of its own, and note what they ran on. Raises BenchError."""
    chosen = variants(options.strategy.split(","))
    from vllm_gdn_plugin.bench.machine import describe_machine, require_device

    require_device(options.device)
    options.directory.mkdir(parents=True, exist_ok=True)
    about = {
        "model": Path(options.model).name,
        "batch": options.batch,
        "prefill": options.prefill,
        "engine": options.engine,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": asdict(describe_machine(options.device)),
    }
    (options.directory / ABOUT).write_text(json.dumps(about, indent=1) + "\n")
    for name, settings in chosen.items():
        trace = trace_path(options.directory, name)
        line = [sys.executable, __file__, "trace", options.model, str(trace), "--batch", str(options.batch)]
        line += ["--device", options.device, "--prefill", str(options.prefill), "--engine", json.dumps(options.engine)]
        env = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "INFO", **settings}
        env["VLLM_TRITON_FORCE_FIRST_CONFIG"] = "1"  # else each tunes the prefill's kernels, for minutes
        done = subprocess.run(line, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        trace.with_suffix(".log").write_text(done.stdout)
        if done.returncode:
            raise BadInput(f"{name}: status {done.returncode}, see {trace.with_suffix('.log')}")
        require_at_work(name, done.stdout)
        print(f"{trace}: {len(kernels_of(trace))} kernels")


def trace(options: argparse.Namespace) -> None:
    """In this process: an engine decodes, or answers prompts with one token, and the profiler sees the last time."""
    from torch.profiler import ProfilerActivity, profile
    from vllm import LLM, SamplingParams

    llm = LLM(
        options.model,
        load_format="dummy",
        skip_tokenizer_init=True,
        language_model_only=True,
        enable_prefix_caching=False,
        **{
            "max_model_len": max(2048, options.prefill + WARM_UP_TOKENS),
            "max_num_seqs": options.batch,
            **options.engine,
        },
    )
    length = options.prefill or PROMPT_TOKENS
    prompts = [{"prompt_token_ids": [(n + 7 * i) % 256 for i in range(length)]} for n in range(options.batch)]

    def generate(tokens: int) -> None:
        sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        llm.generate(prompts, sampling, use_tqdm=False)

    generate(WARM_UP_TOKENS)
    activity = ProfilerActivity.CUDA if options.device == "cuda" else ProfilerActivity.CPU
    with profile(activities=[activity]) as found:
        generate(1 if options.prefill else TRACED_TOKENS)
    found.export_chrome_trace(str(options.directory))


def trim(options: argparse.Namespace) -> None:
    about = read(options.directory / ABOUT)
    chosen = dict(selected(options.directory, text) for text in options.variants)
    rows = [
        f'  "{name}": [\n' + ",\n".join(f"   {json.dumps(astuple(kernel))}" for kernel in kernels) + "\n  ]"
        for name, kernels in chosen.items()
    ]
    options.file.write_text(
        f'{{\n "about": {json.dumps(about)},\n "variants": {{\n' + ",\n".join(rows) + "\n }\n}\n",
    )


def part(text: str) -> tuple[str, re.Pattern[str]]:
    label, _, regex = text.partition("=")
    return label, re.compile(regex)


def parsed(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, dest="command", metavar="COMMAND")
    for name, action, help in (
        ("record", record, "trace an engine of each variant"),
        ("trace", trace, "what record runs for each: DIRECTORY is the file to be written"),
    ):
        command = commands.add_parser(name, help=help)
        command.set_defaults(run=action)
        command.add_argument("model")
        command.add_argument("directory", type=Path)
        command.add_argument("--batch", type=int, default=8, help="requests, each of one token a step; default 8")
        command.add_argument("--prefill", metavar="N", type=int, default=0, help="trace prompts of N tokens")
        command.add_argument("--device", choices=tuple(CATEGORY), default="cuda")
        command.add_argument("--engine", default={}, type=json.loads, help="more arguments of vLLM's LLM, as JSON")
    commands.choices["record"].add_argument(
        "--strategy", metavar="NAME,...", default=f"{DUAL_STREAM},{FUSED}", help="beside stock; default %(default)s"
    )
    command = commands.add_parser("list", help="number the kernels of a trace")
    command.set_defaults(run=lambda options: print(listing(kernels_of(options.trace), options.match)))
    command.add_argument("trace", type=Path)
    command.add_argument(
        "--match", metavar="REGEX", type=re.compile, help="only around the middle one of those that match"
    )
    command = commands.add_parser("trim", help="keep one layer of each variant")
    command.set_defaults(run=trim)
    command.add_argument("directory", type=Path, help="what record wrote")
    command.add_argument("file", type=Path)
    command.add_argument("variants", nargs="+", metavar="VARIANT=FIRST-LAST:LABEL,...")
    command = commands.add_parser("draw", help="make the picture")
    command.set_defaults(run=lambda options: picture_of(*load(options.file)).savefig(options.picture, dpi=150))
    command.add_argument("file", type=Path)
    command.add_argument("picture", type=Path)
    command = commands.add_parser("sections", help="time what recurs in the traces")
    command.set_defaults(run=sections)
    command.add_argument("directory", type=Path, help="what record wrote")
    command.add_argument("file", type=Path)
    command.add_argument("first", type=re.compile, metavar="FIRST")
    command.add_argument("last", type=re.compile, metavar="LAST")
    command.add_argument("parts", type=part, nargs="+", metavar="LABEL=REGEX", help="the first that matches counts")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> int:
    options = parsed(arguments)
    try:
        options.run(options)
    except BenchError as wrong:
        print(f"timeline.py: {wrong}", file=sys.stderr)
        return wrong.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
