"""Write the README's tables from the code and from benchmarks/results.

    python tools/readme.py [--check]

`--check` writes nothing and exits with 1 where the README is stale.
"""

import json
import re
import statistics
import sys
from itertools import groupby
from pathlib import Path
from textwrap import fill
from typing import Any

from vllm_gdn_plugin.bench.engine.compile import COLD, WARM
from vllm_gdn_plugin.bench.engine.results import EngineRun
from vllm_gdn_plugin.bench.engine.table import changes, shown
from vllm_gdn_plugin.bench.engine.variants import OFF
from vllm_gdn_plugin.bench.report import load
from vllm_gdn_plugin.bench.results import Machine, Point, Run
from vllm_gdn_plugin.bench.table import about_machine
from vllm_gdn_plugin.contract import GDN_CLASSES
from vllm_gdn_plugin.plan import AUTO, DUAL_STREAM, FUSED, RULES, SERIAL
from vllm_gdn_plugin.settings import describe

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
RELEASES = ROOT / "tools" / "releases.json"
RESULTS = ROOT / "benchmarks" / "results"
WALL = "from start to end"
"""What timeline.py calls the length of a section."""

WHAT = {
    FUSED: "one GEMM for both",
    DUAL_STREAM: "two CUDA streams, while a CUDA graph is captured",
}


def strategies() -> str:
    head = ["| strategy | what runs | needs |", "|---|---|---|"]
    rows = [f"| `{name}` | {WHAT[name]} | {'; '.join(rule.needs for rule in rules)} |" for name, rules in RULES.items()]
    return "\n".join([*head, *rows, "| `serial` | stock vLLM | nothing |"])


def settings() -> str:
    rows = [f"| `{name}` | `{default}` | {text} |" for name, default, text in describe()]
    return "\n".join(["| environment variable | default | |", "|---|---|---|", *rows])


def releases() -> str:
    lines = [
        "| vLLM | layer class | source | layer, its `forward_cuda` | CPU engine | with torch |",
        "|---|---|---|---|---|---|",
    ]
    for cells, rows in groupby(json.loads(RELEASES.read_text()), proof_of_release):
        lines.append(f"| {', '.join(row['version'] for row in rows)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def proof_of_release(row: dict[str, Any]) -> tuple[str, ...]:
    """What the table says about a release: layer class, source, layer, engine, torch."""
    if row["failures"]:
        return ("", "; ".join(row["failures"]), "", "", "")
    (name,) = (name for module, name in GDN_CLASSES.items() if f" {module}.{name} is as" in row["reason"])
    layer, engine = (len({case.split("-")[1] for case in cases}) for cases in row["op_calls"].values())
    engine_cell = f"{engine} models: the same" if engine else f"not run: {row['no_engine']}"
    return f"`{name}`", "holds", f"{layer} models: the same", engine_cell, row["torch"]


def results() -> str:
    bf16, fp8 = (load(RESULTS / f"h200-projections-{precision}.json") for precision in ("bfloat16", "fp8"))
    machine = bf16.machine
    entry_point = json.loads((RESULTS / "entry_point.json").read_text())
    cost = [sum(pair) for pair in zip(entry_point["import_package"], entry_point["register"], strict=True)]
    worst, where = worst_of_fused(bf16)
    return f"""Time of the two projections of one layer that is saved, stock vLLM's serial projections = 0, median of
{bf16.rounds} interleaved rounds in CUDA graphs, by number of tokens in the batch ({machine.hardware}, torch
{machine.torch}, vLLM {machine.vllm}, driver {machine.driver}; TP 4 are the shapes of one rank of four):

**bf16 throughout: fused / dual_stream**

{saved(bf16, (FUSED, DUAL_STREAM))}

**FP8 `in_proj_qkvz` (128 x 128 blocks), bf16 `in_proj_ba`: dual_stream**

{saved(fp8, (DUAL_STREAM,))}

Every number, with its spread: [bf16](benchmarks/results/h200-projections-bfloat16.md),
[FP8](benchmarks/results/h200-projections-fp8.md). The bad news in there: fused is not always the faster one (at worst
{worst:.0f} % slower than dual_stream, {where}), and from
about 128 tokens on, dual_stream hides little in bf16. By median, no strategy was slower than serial at any size on this
GPU. These are the projections alone, a part of a decode step.

**Whole engines.** {engines()}

{decode_step()}

Other GPUs differ:

```
pip install 'vllm-gdn-plugin[bench]' && vllm-gdn-plugin bench projections --model PATH --output DIRECTORY
```

![Time relative to serial over the number of tokens](benchmarks/results/h200-projections-bfloat16.png)

In a process that builds no GDN layer the entry point costs {statistics.median(cost):.1f} ms (median of {len(cost)},
{min(cost):.1f} to {max(cost):.1f} ms, {entry_point["hardware"]}; `{entry_point["command"]}`)."""


def engines() -> str:
    """What whole engines side by side show, and all that their results say against themselves."""
    served, large, small = (
        load(RESULTS / f"h200-{name}" / "serve.json")
        for name in ("35B-A3B-16-layers", "27B-16-layers-in-process", "35B-A3B-16-layers-in-process")
    )
    assert isinstance(served, EngineRun)
    assert isinstance(large, EngineRun)
    assert isinstance(small, EngineRun)
    for metric in ("output_tokens_per_s", "ttft_ms"):
        found = [changes(served, metric, case, name) for case in served.cases(metric) for name in strategies_of(served)]
        assert not any(change is None or change.shows_difference for change in found), f"{metric}: see the text below"
    assert "fused at 1 to 512 tokens" in small.said[AUTO], "see the text below"
    assert served.machine == large.machine == small.machine, "see the text below"
    return f"""Models in bf16 with the widths of real ones, 16 of their layers and random weights, on one
{served.machine.hardware} (vLLM {served.machine.vllm}, torch {served.machine.torch}, driver {served.machine.driver}):
engines of stock and of each strategy, which take turns. Time per output token (TPOT) of stock, median, and its change,
the mean and its 95 % interval over the rounds, of which the last was cut short. Each engine is one process: the
intervals do not hold what two processes differ by.

Qwen3.5-27B (64 layers), stepped without a server, prompts of 8 tokens, answers of 48, {rounds_of(large)} rounds
([every number, and the command](benchmarks/results/h200-27B-16-layers-in-process/serve.md)):

{tpot(large)}

By the medians, which a slow round does not move, `auto` changes TPOT by {medians_changed(large, AUTO)}. Time to the
first token (TTFT), with `auto`: {ttft(large)}.

Qwen3.5-35B-A3B (40 layers), driven by `vllm bench serve`, prompts of 8 tokens, answers of 128, {rounds_of(served)}
rounds, a test beside the first
([every number, and the command](benchmarks/results/h200-35B-A3B-16-layers/serve.md)):

{tpot(served)}

With few requests at once the times scatter by more than there is to gain; so do output tokens/s and TTFT everywhere: no
difference shown. [Stepped without a server](benchmarks/results/h200-35B-A3B-16-layers-in-process/serve.md),
{rounds_of(small)} rounds, this model's TPOT changes with `auto` by {change(small, "tpot_ms", 16, AUTO)} at 16 requests
and {change(small, "tpot_ms", 8, AUTO)} at 8. At 1 to 4 it goes up and down by tens of percent there, too. The bad news
in there: at 1 request `auto` shows {change(small, "tpot_ms", 1, AUTO)} and dual_stream
{change(small, "tpot_ms", 1, DUAL_STREAM)}; `fused`, which replays the very kernels that `auto` does there,
{change(small, "tpot_ms", 1, FUSED)}: that much, two processes can differ by. TTFT, with `auto`: {ttft(small)}.

An [earlier run](benchmarks/results/h200-35B-A3B-24-layers/serve.md) with 24 layers had two rounds. How long an engine
takes to start, and what it leaves for the KV cache, have not been measured on a GPU."""


def strategies_of(run: EngineRun) -> list[str]:
    return [name for name in run.variants if name != OFF]


def rounds_of(run: EngineRun) -> str:
    """How many rounds the cases have: not all have the last one."""
    found = sorted(
        {len(run.values(metric, case, OFF)) for metric in ("tpot_ms", "ttft_ms") for case in run.cases(metric)}
    )
    return " or ".join(map(str, found))


def medians_changed(run: EngineRun, name: str) -> str:
    """How far apart the medians of TPOT are, for each number of requests."""
    found = []
    for case in run.cases("tpot_ms"):
        stock, other = (statistics.median(run.values("tpot_ms", case, each).values()) for each in (OFF, name))
        found.append(f"{100 * (other / stock - 1):+.1f} % at {case.removeprefix('concurrency ')}")
    return ", ".join(found)


def change(run: EngineRun, metric: str, concurrency: int, name: str) -> str:
    return shown(changes(run, metric, f"concurrency {concurrency}", name))


def tpot(run: EngineRun) -> str:
    lines = ["| requests at once | stock |" + "".join(f" {name} |" for name in strategies_of(run))]
    lines.append("|---|---|" + "---|" * len(strategies_of(run)))
    for case in run.cases("tpot_ms"):
        stock = statistics.median(run.values("tpot_ms", case, OFF).values())
        cells = (shown(changes(run, "tpot_ms", case, name)) for name in strategies_of(run))
        lines.append(f"| {case.removeprefix('concurrency ')} | {stock:.2f} ms | {' | '.join(cells)} |")
    return "\n".join(lines)


def ttft(run: EngineRun) -> str:
    """The change by ``auto`` for each length of the prompt."""
    found = []
    for case in run.cases("ttft_ms"):
        stock = statistics.median(run.values("ttft_ms", case, OFF).values())
        of = shown(changes(run, "ttft_ms", case, AUTO))
        found.append(f"prompts of {case.removesuffix(' in')} tokens ({stock:.0f} ms), {of}")
    return "; ".join(found)


def decode_step() -> str:
    """What the traces of whole engines show of one GDN layer."""
    bf16, fp8 = (json.loads((RESULTS / f"h200-decode-{name}.json").read_text()) for name in ("35B-A3B", "27B-FP8"))
    about, machine = bf16["about"], Machine(**bf16["about"]["machine"])
    return f"""**One layer's decode step** with the widths of Qwen3.5-35B-A3B in bf16, in an engine with 8 layers and
{about["batch"]} requests, in CUDA graphs ({machine.hardware}, torch {machine.torch}, vLLM {machine.vllm}, driver
{machine.driver}): from the start of the
norm before the projections to the end of the recurrent kernel, {medians(bf16, WALL)}. The
kernels that read the projections: causal conv1d, {medians(bf16, "conv1d")}; recurrent kernel,
{medians(bf16, "decode")} (medians of {len(bf16["sections_us"][OFF][WALL])}:
[every part, with its spread](benchmarks/results/h200-decode-35B-A3B.md)). The picture shows one layer of median length,
up to its output projection. Around the projections all three run the same kernels.

![The kernels of one GDN layer over time, by stream](benchmarks/results/h200-timeline.png)

```
python benchmarks/gpu_models.py 35B-A3B MODEL --layers 8
python benchmarks/timeline.py record MODEL TRACES --engine '{json.dumps(about["engine"])}'
```

**FP8 and the norm.** The op keeps the quantisation of its input apart from the norm before it. So does stock vLLM
{machine.vllm} for blocks of 128 x 128, the format of the official checkpoints: its pass that fuses the two leaves out
norms whose weight has another dtype than the activations, and the weight of these models' norm is float32. In the
[traces of engines](benchmarks/results/h200-decode-27B-FP8.md) with the widths of Qwen3.5-27B they are two kernels in
both: norm, {medians(fp8, "norm")}; quantisation, {medians(fp8, "quantisation")}. From the start of
the norm to the end of the recurrent kernel: {medians(fp8, WALL)}; beside `in_proj_ba`, the FP8 GEMM
takes longer ({medians(fp8, "in_proj_qkvz")}). Other FP8 formats have not been traced."""


def medians(traced: dict[str, Any], label: str) -> str:
    """The time of one part of the traced sections, for each engine."""
    times = {"stock" if name == OFF else name: found[label] for name, found in traced["sections_us"].items()}
    return ", ".join(f"{name} {statistics.median(samples):.1f} us" for name, samples in times.items())


TOKENS = (1, 8, 64, 128, 256, 1024)


def saved(run: Run, strategies: tuple[str, ...]) -> str:
    """A row for each shape: the median over the rounds of what each strategy saves of serial's time, in percent."""
    head = ["| model | TP |" + "".join(f" {n} |" for n in TOKENS), "|---|---|" + "---|" * len(TOKENS)]
    shapes = list(dict.fromkeys(point.shape for point in run.points))
    rows = []
    for shape in shapes:
        points = {point.tokens: point for point in run.points if point.shape == shape}
        cells = (" / ".join(f"{percent(points[n], s):.0f} %" for s in strategies) for n in TOKENS)
        rows.append(f"| {shape.name} | {shape.tensor_parallel_size} | {' | '.join(cells)} |")
    return "\n".join(head + rows)


def worst_of_fused(run: Run) -> tuple[float, str]:
    """Where fused loses most against dual_stream: percent, and at which shape and number of tokens."""

    def loss(point: Point) -> float:
        fused, dual = (statistics.median(point.samples_us[s]) for s in (FUSED, DUAL_STREAM))
        return 100 * (fused / dual - 1)

    point = max(run.points, key=loss)
    shape = point.shape
    return loss(point), f"{shape.name} at TP {shape.tensor_parallel_size} and {point.tokens} tokens"


def percent(point: Point, strategy: str) -> float:
    pairs = zip(point.samples_us[strategy], point.samples_us[SERIAL], strict=True)
    return 100 * (1 - statistics.median(one / serial for one, serial in pairs))


def start_up() -> str:
    whole, pieces = (load(RESULTS / name / "compile.json") for name in ("cpu", "cpu-piecewise"))
    assert isinstance(whole, EngineRun)
    assert isinstance(pieces, EngineRun)
    return f"""vLLM's CPU engine with a tiny model, {about_machine(whole.machine)}: seconds
from the start of `vllm serve` to its first answer, median of {whole.rounds} interleaved rounds, and the change with its
95 % interval ([every number](benchmarks/results/cpu/compile.md), `python benchmarks/cpu_compile.py`).

{seconds(whole)}

And what the `LayerName` is for: compiled graphs over the number of layers, with the CPU engine made to compile
piecewise as it does on a GPU ([every number](benchmarks/results/cpu-piecewise/compile.md)).

{graphs(pieces)}"""


def seconds(run: EngineRun) -> str:
    lines = ["| caches | without the plugin | dual_stream | change |", "|---|---|---|---|"]
    for case in (COLD, WARM):
        off, on = (statistics.median(run.values("startup_s", case, name).values()) for name in (OFF, DUAL_STREAM))
        change = shown(changes(run, "startup_s", case, DUAL_STREAM))
        lines.append(f"| {'empty' if case == COLD else 'full'} | {off:.1f} s | {on:.1f} s | {change} |")
    return "\n".join(lines)


def graphs(run: EngineRun) -> str:
    cases = [case for case in run.cases("artifacts") if case not in (COLD, WARM)]
    lines = [f"| | {' | '.join(case.removeprefix(f'{COLD}, ') for case in cases)} |", "|---|" + "---|" * len(cases)]
    for name in run.variants:
        found = [run.values("artifacts", case, name) for case in cases]
        counts = " | ".join(f"{values[0]:.0f}" if values else "not measured" for values in found)
        lines.append(f"| {'without the plugin' if name == OFF else name} | {counts} |")
    return "\n".join(lines)


def wrapped(text: str) -> str:
    """The paragraphs of prose filled anew, since numbers of another length were put into them."""
    return "\n\n".join(
        part if part.startswith(("|", "```", "![")) else fill(part, 120, break_long_words=False, break_on_hyphens=False)
        for part in text.split("\n\n")
    )


def filled(text: str) -> str:
    for name, make in {
        "strategies": strategies,
        "settings": settings,
        "releases": releases,
        "results": results,
        "start-up": start_up,
    }.items():
        start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        body = f"{start}\n{wrapped(make())}\n{end}"
        text = re.sub(f"{start}.*?{end}", lambda match, body=body: body, text, flags=re.DOTALL)
    return text


def main() -> int:
    text = README.read_text()
    if "--check" in sys.argv[1:]:
        return int(filled(text) != text)
    README.write_text(filled(text))
    return 0


if __name__ == "__main__":
    sys.exit(main())
