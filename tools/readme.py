"""Write the README's tables from the code and from benchmarks/results.

    python tools/readme.py [--check]

`--check` writes nothing and exits with 1 where the README is stale.
"""

import json
import re
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby, permutations
from pathlib import Path
from textwrap import fill
from typing import Any

from vllm_gdn_plugin.bench.engine.compile import COLD, WARM
from vllm_gdn_plugin.bench.engine.results import EngineRun, Sample
from vllm_gdn_plugin.bench.engine.serve import START
from vllm_gdn_plugin.bench.engine.table import changes, shown
from vllm_gdn_plugin.bench.engine.variants import OFF
from vllm_gdn_plugin.bench.report import load
from vllm_gdn_plugin.bench.results import Machine, Point, Run
from vllm_gdn_plugin.bench.shapes import Shape
from vllm_gdn_plugin.bench.stats import Change
from vllm_gdn_plugin.bench.table import about_machine
from vllm_gdn_plugin.decide.contract import GDN_CLASSES
from vllm_gdn_plugin.decide.plan import (
    AUTO,
    DUAL_STREAM,
    FUSED,
    NARROW_KERNEL,
    NARROW_KERNEL_MAX_TOKENS,
    PADDED_TO,
    RULES,
    SERIAL,
)
from vllm_gdn_plugin.settings import describe
from vllm_gdn_plugin.tune.times import fastest

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
    # The calls of a fork and a join; an older form of dual_stream was one op, as fused is.
    calls = row["op_calls"]["test_same_as_stock"]
    older = sum(calls[case] == calls[case.replace(DUAL_STREAM, FUSED)] for case in calls if DUAL_STREAM in case)
    if older:
        engine_cell += f" ({older} with an older form of dual_stream)"
    return f"`{name}`", "holds", f"{layer} models: the same", engine_cell, row["torch"]


def results() -> str:
    bf16, fp8 = (load(RESULTS / f"h200-projections-{precision}.json") for precision in ("bfloat16", "fp8"))
    machine = bf16.machine
    entry_point = json.loads((RESULTS / "entry_point.json").read_text())
    cost = [sum(pair) for pair in zip(entry_point["import_package"], entry_point["register"], strict=True)]
    worst, where = worst_of_fused(bf16)
    assert where.startswith("Qwen3.5-9B at TP 4"), "see the text of the engines below"
    assert all(way(point, AUTO) in (FUSED, *PADDED_TO) for point in bf16.points), "see the text below"
    assert versions(fp8.machine) == versions(machine), "see the text below"
    assert fp8.machine.hardware == machine.hardware, "see the text below"
    assert not slower_than_serial(bf16) + slower_than_serial(fp8), "see the text below"
    narrow = beside_dual_stream(fp8)
    at_8, elsewhere, others, places = by_address()
    for name in ("fp8-addresses", "same-work-fp8", "same-work-bfloat16", "same-work-own-layers"):
        where_from = Machine(**json.loads((RESULTS / f"h200-{name}.json").read_text())["machine"])
        assert versions(where_from) == versions(machine), "see the text below"
    return f"""{in_short(bf16, fp8)}

Time of the two projections of one layer that is saved, stock vLLM's serial projections = 0, median of
{bf16.rounds} (bf16) or {fp8.rounds} (FP8) interleaved rounds in CUDA graphs, by number of tokens in the batch
({machine.hardware}, torch {machine.torch}, vLLM
{machine.vllm}, driver {machine.driver}; TP 4 are the shapes of one rank of four):

**bf16 throughout: fused / fused, padded where `auto` would by these times / dual_stream**

{saved(bf16, (FUSED, AUTO, DUAL_STREAM))}

**FP8 `in_proj_qkvz` (128 x 128 blocks), bf16 `in_proj_ba`: dual_stream**

{saved(fp8, (DUAL_STREAM,))}

Every number, with its spread: [bf16](benchmarks/results/h200-projections-bfloat16.md),
[FP8](benchmarks/results/h200-projections-fp8.md). The bad news in there: fused is not always the faster one (at worst
{worst:.0f} % slower than dual_stream, {where}), and from
about 128 tokens on, dual_stream hides little in bf16. By median, no strategy, and nothing that `auto` would choose, was
slower than serial at any size on this GPU.
These are the projections alone, a part of a decode step.

How long an FP8 GEMM takes depends on where its input lies in memory: at 8 tokens vLLM's takes up to {at_8:.2f} times as
long at the slowest of {places} addresses as at the fastest, at 1 and 64 tokens up to {elsewhere:.2f} times; where its
output and its scales lie makes {others:.2f} times at the most ([every
number](benchmarks/results/h200-fp8-addresses.md)). So the input is elsewhere in each layer that is timed above. Graphs
of the same work still differ, which the spreads above do not contain: with FP8 by up to
{same_work("fp8")}, in bf16 by up to {same_work("bfloat16")}
(eight graphs of each:
[FP8](benchmarks/results/h200-same-work-fp8.json), [bf16](benchmarks/results/h200-same-work-bfloat16.json)); with
weights of its own in each, bf16, Qwen3.5-27B, by up to {same_work("own-layers")}
([same](benchmarks/results/h200-same-work-own-layers.json)). In an engine the addresses are others with the
plugin than without it, as after any change.

`narrow_kernel`, the plugin's own kernel for `in_proj_ba`, takes {alone()} of cuBLAS's time alone, at 1 to
{NARROW_KERNEL_MAX_TOKENS} tokens and with every shape ([every
number](benchmarks/results/h200-narrow-kernel-few-tokens.md)). Beside an FP8 `in_proj_qkvz` most of that was hidden
already: it beats dual_stream by {100 * (1 - min(narrow.values())):.0f} % at most, and loses by more than 3 % at
{sum(one > 1.03 for one in narrow.values())} of {len(narrow)} points, by {100 * (max(narrow.values()) - 1):.0f} % at
most; `auto` takes it where it was more than 3 % faster when timed. It is meant for GPUs on which cuBLAS has no good
kernel for this shape, such as
[the RTX 5090 of vLLM #57318](https://github.com/vllm-project/vllm/pull/57318); what it gains there has not been
measured.

**Whole engines.** {engines(bf16)}

{decode_step()}

Other GPUs differ:

```
pip install 'vllm-gdn-plugin[bench]' && vllm-gdn-plugin bench projections --model PATH --output DIRECTORY
```

![Time relative to serial over the number of tokens](benchmarks/results/h200-projections-bfloat16.png)

In a process that builds no GDN layer the entry point costs {statistics.median(cost):.1f} ms (median of {len(cost)},
{min(cost):.1f} to {max(cost):.1f} ms, {entry_point["hardware"]}; `{entry_point["command"]}`)."""


def in_short(bf16: Run, fp8: Run) -> str:
    """The ranges in which the results below lie."""
    whole, *_ = runs = [served(name) for name in MODELS]
    assert len(runs) == 4, "see the text below"
    found = [changes(run, "tpot_ms", case, AUTO) for run in runs for case in run.cases("tpot_ms")]
    shown = [change.percent for change in found if change is not None and change.shows_difference]
    faster = [-percent for percent in shown if percent < 0]
    slower = [percent for percent in shown if percent > 0]
    assert (len(slower), len(shown)) == (1, len(found)), "see the text below"
    assert slower[0] < starts(served("27B-16-layers-two-starts")), "see the text below"
    together = [starts_as_one(served(name)) for name in ONE_PROCESS]
    longest = [changes(run, "ttft_ms", "1024 in", AUTO) for run in together]
    assert max(change.percent for change in longest if change) == longest[-1].percent, "see the text below"
    short = [changes(run, "ttft_ms", case, AUTO) for run in together for case in ("8 in", "512 in")]
    assert not any(one.low > 0 for one in short if one), "see the text below"
    long = [changes(run, "ttft_ms", "8192 in", AUTO) for run in runs]
    assert all(change is not None and change.low <= 0 for change in long), "see the text below"
    both = served("27B-32-layers-fused-dual-stream")
    gpu = bf16.machine.hardware.rpartition(" x ")[2]
    return f"""In short, on an {gpu}: at 1 to {FEW} tokens the two projections take
{savings(bf16, AUTO, 1)} % less time in bf16 with fused, padded where that is faster, {savings(fp8, DUAL_STREAM, 1)} %
with FP8 and dual_stream, and {savings(bf16, AUTO, 4)} and {savings(fp8, DUAL_STREAM, 4)} % with the shapes of one rank
of four. They are a part of a decode step: in the four runs of whole engines in the table below, it is
{min(faster):.1f} to {max(faster):.1f} % shorter with `auto` at {len(faster)} of {len(found)} points, and
{slower[0]:.1f} % longer at one, which is less than two starts of stock differ by; with one rank of four of Qwen3.5-9B
no difference was shown. A prompt of 8192 tokens is shown to take longer to its first token in none of them, and one of
8 or 512, with all engines in one process, neither; one of 1024 tokens, more than CUDA graphs were captured for, may:
{longest[-1].percent:+.1f} % with FP8 on these hosts. GPU memory:
{more_memory(whole, AUTO)} of {allocated(whole, OFF) / 1024:.0f} GiB with `auto`, {more_memory(both, DUAL_STREAM)} of
{allocated(both, OFF) / 1024:.0f} GiB with dual_stream. All of it with what speaks against it:"""


ONE_PROCESS = (
    "27B-12-layers-one-process",
    "27B-12-layers-one-process-two-engines",
    "9B-rank-of-4-16-layers-one-process",
    "27B-FP8-12-layers-three-starts",
    "27B-FP8-12-layers-fork-join",
)
"""The names of the results of engines in one process."""

FEW = 64
"""Tokens, up to which the ranges in short go."""


def allocated(run: EngineRun, name: str) -> float:
    """MiB, once the engine has started."""
    (found,) = run.values("allocated_mib", START, name).values()
    return found


def more_memory(run: EngineRun, name: str) -> str:
    return f"{allocated(run, name) - allocated(run, OFF):+.0f} MiB"


def savings(run: Run, strategy: str, tensor_parallel_size: int) -> str:
    """Percent of serial's time at few tokens, the least to the most."""
    points = (point for point in run.points if point.shape.tensor_parallel_size == tensor_parallel_size)
    found = [percent(point, strategy) for point in points if point.tokens <= FEW]
    return f"{min(found):.0f} to {max(found):.0f}"


def engines(bf16: Run) -> str:
    """What whole engines side by side show, and all that their results say against themselves."""
    whole, moe, awq, fp8 = runs = [served(name) for name in MODELS]
    before, moe_before = (served(name) for name in ("27B-again", "35B-A3B-32-layers"))
    first, one_op = (served(f"27B-{name}") for name in ("4-layers-first-tokens", "FP8-12-layers-one-process"))
    both, padded, twice = (
        served(f"27B-{name}") for name in ("32-layers-fused-dual-stream", "32-layers-padded", "16-layers-two-starts")
    )
    one, two, rank, three_fp8, one_fp8 = together = [served(name) for name in ONE_PROCESS]
    others = (before, moe_before, first, one_op, both, padded, twice, *together)
    mean, mean_fp8 = starts_as_one(two), starts_as_one(three_fp8)
    assert all(versions(run.machine) == versions(whole.machine) for run in (*runs, *others)), "see the text below"
    assert len({run.machine.hardware for run in (whole, moe, padded)}) == 1, "see the text below"
    assert all("fused at 1 to 512 tokens, padded at" in run.said[AUTO] for run in (whole, moe, padded)), (
        "see the text below"
    )
    assert "dual_stream at 1 to 32 tokens, fused at 64 to 512 tokens" in awq.said[AUTO], "see the text below"
    assert "2 tokens, narrow_kernel at 4 tokens, dual_stream at 8 to 512 tokens" in fp8.said[AUTO], "see the text below"
    assert "dual_stream at 1 to 16 tokens, fused at 32 to 512 tokens" in before.said[AUTO], "see the text below"
    assert all(nothing_shown(rank, name) for name in (AUTO, DUAL_STREAM)), "see the text below"
    assert nothing_shown(first, AUTO), "see the text below"
    longer = [change(run, "ttft_ms", "1024 in", AUTO) for run in (mean_fp8, one_fp8, one_op, mean, moe_before)]
    assert all(text.startswith("+") for text in longer), "see the text below"
    short = [
        change(run, "ttft_ms", f"{tokens} in", name)
        for run, name in (
            (one, AUTO),
            (two, AUTO),
            (two, AUTO + SECOND),
            (rank, AUTO),
            (one_fp8, AUTO),
            (mean_fp8, AUTO),
        )
        for tokens in (8, 512, 8192)
    ]
    assert all(not text or text.startswith("no difference") for text in short), "see the text below"
    assert "narrow_kernel at 4 tokens" in three_fp8.said[AUTO], "see the text below"
    assert "narrow_kernel at 4 to 8 tokens" in one_fp8.said[AUTO], "see the text below"
    return f"""Random weights, one GPU for each column (vLLM {whole.machine.vllm}, torch {whole.machine.torch}, driver
{whole.machine.driver}), without tensor parallelism: an engine of stock and one with
`auto`, each a process, stepped in turn without a server ([in_process.py](benchmarks/in_process.py)). Time per output
token (TPOT) after prompts of 8 tokens, with contexts of some 40, and time to the first token (TTFT) of one prompt. Each
cell: stock's median, then the median change with `auto` within a round and its 95 % interval over the rounds.

{beside_stock(runs)}

The first two are on GPUs of {whole.machine.hardware}, beside each other, the one with AWQ is on an
{awq.machine.hardware}, the one with FP8 on a GPU of {fp8.machine.hardware}. `auto` chose fused at every size in the
first two, padded at most of them; with FP8 dual_stream (and narrow_kernel at 4 tokens). Of what ran dual_stream, only
two results have its present form: [three engines of
each](benchmarks/results/h200-27B-FP8-12-layers-three-starts/serve.md) and [one of
each](benchmarks/results/h200-27B-FP8-12-layers-fork-join/serve.md), 12 layers in FP8. All other engines here, and the
traces below, ran an older form, one op for both projections: the same two streams in a CUDA graph, but slower outside
of one (see the bad news). The run with AWQ, whose GDN
layers are bf16, is older: dual_stream up to 32 tokens, where `auto` would fuse today. So is [one in bf16 of all 64
layers](benchmarks/results/h200-27B-again/serve.md), with dual_stream up to 16 tokens: TPOT
{medians_changed(before, AUTO)}, TTFT of 8 tokens {change(before, "ttft_ms", "8 in", AUTO)}.

Two starts of the same engine differ, too, which the intervals do not include: of stock, with
[16 layers](benchmarks/results/h200-27B-16-layers-two-starts/serve.md), by up to {starts(twice):.1f} % of TPOT. So what
one strategy gains over another cannot be told there; better with all engines in one process, which the host slows alike
(`in_process.py --one-process`). Change of TPOT, Qwen3.5-27B in bf16, 12 of its 64 layers, in
[{rounds_of(one)} rounds](benchmarks/results/h200-27B-12-layers-one-process/serve.md), and what the projections alone
foretell:

{in_one_process(one)}

In [another process](benchmarks/results/h200-27B-12-layers-one-process-two-engines/serve.md) two engines with `auto`
have {change(two, "tpot_ms", "concurrency 1", AUTO)} and {change(two, "tpot_ms", "concurrency 1", AUTO + SECOND)} at 1
request, all that is foretold, and a second engine of stock {change(two, "tpot_ms", "concurrency 1", OFF + SECOND)}. In
the first one each engine with the plugin gains less than foretold, `auto` at 1 request, too, by up to
{lacking(one):.1f} % of a step; so one process does not take away all that two runs
differ by. What it shows is padding and two streams ahead of fused as it
is, by {ahead(one, AUTO)} and {ahead(one, DUAL_STREAM)}, where {foretold_ahead(one)} are foretold. In processes of their
own, with 32 layers, TPOT with `auto`, padded, is {over_fused(padded, AUTO)} over fused as it is
([run](benchmarks/results/h200-27B-32-layers-padded/serve.md)), and with dual_stream {over_fused(both, DUAL_STREAM)}
([run](benchmarks/results/h200-27B-32-layers-fused-dual-stream/serve.md)).

On [one rank of four of Qwen3.5-9B](benchmarks/results/h200-9B-rank-of-4-16-layers-one-process/serve.md), 16 layers,
neither `auto`, which fused at every size, nor dual_stream shows a difference from stock at any number of requests,
where fused should gain {rank_foretold(rank)}. dual_stream, than which fused is up to {worst_of_fused(bf16)[0]:.0f} %
slower when timed alone, was by the medians {behind(rank)} slower than `auto` there. The likely reason, not traced: a
step, of {step_of(rank)} at 1 request, waits for the CPU of this host.
So what two streams would gain in place of one GEMM is not shown, and they take memory:
`auto` takes them only where they are far ahead.

With FP8, where two streams are all there is, Qwen3.5-27B should gain {foretold(fp8, "fp8", DUAL_STREAM)}; what it
gains too much at 8 requests is of the size that addresses make. With 12 layers in one process, [three engines of
each](benchmarks/results/h200-27B-FP8-12-layers-three-starts/serve.md), the mean of three against the mean of three in
each round: TPOT {change(mean_fp8, "tpot_ms", "concurrency 1", AUTO)} at 1 request and
{change(mean_fp8, "tpot_ms", "concurrency 8", AUTO)} at 8, where one engine of stock differs from another by up to
{most_between_starts(three_fp8):.1f} %. In [another
process](benchmarks/results/h200-27B-FP8-12-layers-fork-join/serve.md) one engine has
{change(one_fp8, "tpot_ms", "concurrency 1", AUTO)} and {change(one_fp8, "tpot_ms", "concurrency 8", AUTO)}: it had
timed its ways while other programs used the GPU, and taken narrow_kernel at 8 tokens. More runs, with fewer layers,
other formats, and through `vllm bench serve`, are in the [notes](benchmarks/NOTES.md).

TTFT of 8 to 1024 tokens scatters by tens of percent on these hosts, and two engines of stock vLLM
([the same run](benchmarks/results/h200-27B-16-layers-two-starts/serve.md), each on the same two CPUs) differ by
{change(twice, "ttft_ms", "8 in", OFF + SECOND)} at 8 tokens and {change(twice, "ttft_ms", "1024 in", OFF + SECOND)} at
1024. So what the table of engines has faster there says nothing of the plugin. In one process, with `auto`: Qwen3.5-27B
in FP8, the three engines of each, {change(mean_fp8, "ttft_ms", "8 in", AUTO)} at 8 tokens,
{change(mean_fp8, "ttft_ms", "512 in", AUTO)} at 512 and {change(mean_fp8, "ttft_ms", "8192 in", AUTO)} at 8192;
in bf16, two engines of each, {change(mean, "ttft_ms", "8 in", AUTO)} at 8 and
{change(mean, "ttft_ms", "512 in", AUTO)} at 512; the rank of Qwen3.5-9B
{change(rank, "ttft_ms", "8 in", AUTO)} at 8.

The bad news: steps with more tokens than the largest captured size, 512 here, may take longer; at 8192 none was shown
to. There Python runs the plugin's ops, and in them `in_proj_ba`, or both projections where they are fused, which in
stock are parts of the compiled graph. In one process, on two CPUs, TTFT of 1024 tokens with FP8 is
{change(mean_fp8, "ttft_ms", "1024 in", AUTO)} with three engines of each, {per_layer(mean_fp8, "1024 in", 9):.2f} ms a
layer, and {change(one_fp8, "ttft_ms", "1024 in", AUTO)} with one of each; the older form, [one op for both
projections](benchmarks/results/h200-27B-FP8-12-layers-one-process/serve.md), had
{change(one_op, "ttft_ms", "1024 in", AUTO)}. In bf16 it is {change(mean, "ttft_ms", "1024 in", AUTO)}, the
mean of the two engines; one of stock against another {change(two, "ttft_ms", "1024 in", OFF + SECOND)}.
In processes of their own, in bf16, it is
{change(moe_before, "ttft_ms", "1024 in", AUTO)} with Qwen3.5-35B-A3B in one of
[two](benchmarks/results/h200-35B-A3B-32-layers/serve.md)
[runs](benchmarks/results/h200-35B-A3B-32-layers-again/serve.md); four layers of Qwen3.5-27B
[show no difference](benchmarks/results/h200-27B-4-layers-first-tokens/serve.md). The likely reason, not traced: the GPU
waits for the CPU of these hosts. If such prompts
are what you serve, measure; where it is slower, take `VLLM_GDN_PLUGIN_STRATEGY=serial`, or have vLLM capture larger
sizes (`--max-cudagraph-capture-size`; not measured, it takes memory and time to start).

**Memory.** What PyTorch has allocated once an engine has started, in the runs above: with `auto`, Qwen3.5-27B in bf16
{memory_of(whole)}, 35B-A3B {memory_of(moe)}, FP8 {memory_of(fp8)}; with 32 layers of Qwen3.5-27B, fused
{memory_of(padded, FUSED)}, `auto` {memory_of(padded, AUTO)}, dual_stream {memory_of(both, DUAL_STREAM)}. An engine that
overlaps has a workspace of cuBLAS for the second stream, 32 MiB on this GPU; what rounding and padding add to fused
weights is shared by up to eight layers. The older run with AWQ, in which it was not, has {memory_of(awq)}. What PyTorch
holds in all, to give it out later, is {more_held(whole, AUTO)} with `auto` and Qwen3.5-27B, and {more_held(moe, AUTO)}
with 35B-A3B. Two starts of stock differ by more: with 16 layers {held(twice, OFF)} and {held(twice, OFF + SECOND)},
beside {held(twice, FUSED)} with fused and {held(twice, DUAL_STREAM)} with dual_stream.
While it loads, an engine that fuses takes up to eight layers' projections more, 1.3 GiB with Qwen3.5-27B, where there
is room, and one layer's where there is not (worked out, not measured). With tensorizer, which does not tell when it is
done, up to seven layers' may stay. Where vLLM sizes the KV cache by the memory it
finds, what stays should come out of that (not measured: these runs fix the KV cache)."""


SECOND = "-2"
"""After a variant's name: its second engine."""


def served(name: str) -> EngineRun:
    run = load(RESULTS / f"h200-{name}" / "serve.json")
    assert isinstance(run, EngineRun)
    return run


def nothing_shown(run: EngineRun, name: str) -> bool:
    """Whether neither TPOT nor TTFT shows a difference in any case."""
    found = [changes(run, metric, case, name) for metric in ("tpot_ms", "ttft_ms") for case in run.cases(metric)]
    return not any(change is None or change.shows_difference for change in found)


def beside_stock(runs: Sequence[EngineRun]) -> str:
    """Stock's times and their change by ``auto``: a row for each case, a column for each model."""
    heads = [
        f"{title} ([{rounds_of(run)} rounds](benchmarks/results/h200-{name}/serve.md))"
        for run, (name, title) in zip(runs, MODELS.items(), strict=True)
    ]
    lines = [f"| | {' | '.join(heads)} |", "|---|" + "---|" * len(runs)]
    for metric, title, unit in (("tpot_ms", "TPOT", "requests at once"), ("ttft_ms", "TTFT", "tokens")):
        for case in runs[0].cases(metric):
            number = case.removeprefix("concurrency ").removesuffix(" in")
            cells = " | ".join(beside(run, metric, case) for run in runs)
            lines.append(f"| {title}, {'1 request' if case == 'concurrency 1' else f'{number} {unit}'} | {cells} |")
    return "\n".join(lines)


def beside(run: EngineRun, metric: str, case: str) -> str:
    stock = run.values(metric, case, OFF).values()
    return f"{statistics.median(stock):.4g} ms: {change(run, metric, case, AUTO)}" if stock else "not measured"


MODELS = {
    "27B-padded": "Qwen3.5-27B, bf16, all 64 layers",
    "35B-A3B-32-layers-padded": "Qwen3.5-35B-A3B, bf16, 32 of 40 layers",
    "27B-AWQ": "Qwen3.5-27B, AWQ with GDN layers in bf16, all 64 layers",
    "27B-FP8": "Qwen3.5-27B, FP8 in blocks, all 64 layers",
}
"""Those of the table, by the names of their results."""


def memory_of(run: EngineRun, name: str = AUTO) -> str:
    stock, ours = allocated(run, OFF), allocated(run, name)
    return f"{stock:.0f} MiB {ours - stock:+.0f} MiB, {100 * (ours / stock - 1):.2f} %"


def foretold(run: EngineRun, precision: str, strategy: str) -> str:
    """What a strategy saves of the projections of Qwen3.5-27B's 48 GDN layers, as a share of the engine's steps."""
    return range_of(shares(run, precision, strategy, 48))


DENSE, RANK = ("Qwen3.5-27B", 1), ("Qwen3.5-9B", 4)


def shares(run: EngineRun, precision: str, strategy: str, layers: int, shape: tuple[str, int] = DENSE) -> list[float]:
    """What a strategy saves of the projections of so many GDN layers of this shape, in percent of the engine's step at
    each number of requests."""
    projections = load(RESULTS / f"h200-projections-{precision}.json")
    points = {p.tokens: p for p in projections.points if (p.shape.name, p.shape.tensor_parallel_size) == shape}
    found = []
    for case in run.cases("tpot_ms"):
        point = points[int(case.removeprefix("concurrency "))]
        step_us = 1e3 * statistics.median(run.values("tpot_ms", case, OFF).values())
        found.append(100 * layers * (us(point, SERIAL) - us(point, strategy)) / step_us)
    return found


def rank_foretold(run: EngineRun) -> str:
    """What fused saves of the projections of 12 GDN layers of one rank of four of Qwen3.5-9B."""
    return range_of(shares(run, "bfloat16", FUSED, 12, RANK))


def tpot_changes(run: EngineRun, name: str, baseline: str = OFF) -> list[Change]:
    """How an engine's TPOT compares with another's, within the rounds, at each number of requests."""
    found = [changes(run, "tpot_ms", case, name, baseline) for case in run.cases("tpot_ms")]
    return [one for one in found if one is not None]


def range_of(found: Sequence[float]) -> str:
    """Of percents, the least to the most."""
    return f"{min(found):.1f} to {max(found):.1f} %"


def ahead(run: EngineRun, name: str) -> str:
    """By how much an engine's TPOT is shorter than fused's."""
    found = [-one.percent for one in tpot_changes(run, name, FUSED)]
    assert min(found) > 0, "see the text that this is for"
    return range_of(found)


def over_fused(run: EngineRun, name: str) -> str:
    """How TPOT lies over fused's at each number of requests, the median within the rounds."""
    cases = [case.removeprefix("concurrency ") for case in run.cases("tpot_ms")]
    found = tpot_changes(run, name, FUSED)
    return ", ".join(f"{one.percent:+.1f} % at {n}" for n, one in zip(cases, found, strict=True))


def step_of(run: EngineRun) -> str:
    """Stock's TPOT of one request, the median."""
    return f"{statistics.median(run.values('tpot_ms', 'concurrency 1', OFF).values()):.1f} ms"


def foretold_ahead(run: EngineRun) -> str:
    """By how much ``auto`` and dual_stream should be ahead of fused."""
    fused, *others = (shares(run, "bfloat16", name, 9) for name in (FUSED, AUTO, DUAL_STREAM))
    return range_of([one - other for ours in others for one, other in zip(ours, fused, strict=True)])


def behind(run: EngineRun) -> str:
    """By how much TPOT with two streams is longer than with ``auto``."""
    found = tpot_changes(run, DUAL_STREAM, AUTO)
    medians = [one.percent for one in found]
    assert min(medians) > 0, "see the text that this is for"
    sure = sum(one.shows_difference for one in found)
    return f"{range_of(medians)} (shown at {sure} of {len(found)} numbers of requests)"


def lacking(run: EngineRun) -> float:
    """By how much of a step the engines in one process gain less than foretold, at the most, in percent."""
    found = []
    for name in (FUSED, AUTO, DUAL_STREAM):
        expected = shares(run, "bfloat16", name, 9)
        found += [share + one.percent for share, one in zip(expected, tpot_changes(run, name), strict=True)]
    assert min(found) > 0, "see the text that this is for"
    return max(found)


def rounds_of(run: EngineRun) -> str:
    """How many rounds the cases have: not all have the last one."""
    found = sorted(
        {len(run.values(metric, case, OFF)) for metric in ("tpot_ms", "ttft_ms") for case in run.cases(metric)}
    )
    return " or ".join(map(str, found))


def ratios_of_medians(run: EngineRun, name: str) -> dict[str, float]:
    """The median of TPOT over stock's, for each number of requests."""
    found = {}
    for case in run.cases("tpot_ms"):
        stock, other = (statistics.median(run.values("tpot_ms", case, each).values()) for each in (OFF, name))
        found[case.removeprefix("concurrency ")] = other / stock
    return found


def medians_changed(run: EngineRun, name: str) -> str:
    """How far apart the medians of TPOT are, for each number of requests."""
    return ", ".join(f"{100 * (ratio - 1):+.1f} % at {n}" for n, ratio in ratios_of_medians(run, name).items())


def in_one_process(run: EngineRun) -> str:
    """How TPOT changes with 9 GDN layers of Qwen3.5-27B in bf16, and what the projections foretell: a row for each
    engine with the plugin, a column for each number of requests."""
    sizes = [case.removeprefix("concurrency ") for case in run.cases("tpot_ms")]
    lines = [f"| requests | {' | '.join(sizes)} |", "|---|" + "---|" * len(sizes)]
    for name, label in ((FUSED, "fused as it is"), (AUTO, "`auto`: fused, padded"), (DUAL_STREAM, "dual_stream")):
        cells = [change(run, "tpot_ms", case, name) for case in run.cases("tpot_ms")]
        lines.append(f"| {label} | {' | '.join(cells)} |")
        cells = [f"-{share:.1f} %" for share in shares(run, "bfloat16", name, 9)]
        lines.append(f"| foretold | {' | '.join(cells)} |")
    return "\n".join(lines)


def per_layer(run: EngineRun, case: str, layers: int) -> float:
    """By how many milliseconds TTFT is longer for each GDN layer with ``auto``, the median over the rounds."""
    stock, ours = (run.values("ttft_ms", case, name) for name in (OFF, AUTO))
    return statistics.median(ours[number] - stock[number] for number in stock.keys() & ours.keys()) / layers


def starts_as_one(run: EngineRun) -> EngineRun:
    """The run as if there were one engine of each, which took the mean of theirs in each round that has all of them."""
    found: dict[tuple[int, str], dict[str, list[Sample]]] = {}
    for sample in run.samples:
        kinds = found.setdefault((sample.round, sample.case), {})
        kinds.setdefault(sample.variant.partition("-")[0], []).append(sample)
    samples = [
        Sample(number, kind, case, mean_of(engines))
        for (number, case), kinds in found.items()
        if sum(map(len, kinds.values())) == len(run.variants)
        for kind, engines in kinds.items()
    ]
    return replace(run, samples=samples)


def mean_of(samples: Sequence[Sample]) -> dict[str, float]:
    return {metric: statistics.mean(one.values[metric] for one in samples) for metric in samples[0].values}


def most_between_starts(run: EngineRun) -> float:
    """The most by which TPOT of a stock engine differs from another's, in percent, the median within the rounds."""
    stock = [name for name in run.variants if name.partition("-")[0] == OFF]
    pairs = [tpot_changes(run, one, other) for one, other in permutations(stock, 2)]
    return max(abs(found.percent) for changed in pairs for found in changed)


def starts(run: EngineRun) -> float:
    """The most by which the medians of TPOT of two stock engines differ, in percent."""
    return max(100 * abs(ratio - 1) for ratio in ratios_of_medians(run, OFF + SECOND).values())


def reserved(run: EngineRun, name: str) -> float:
    """MiB, once the engine has started."""
    (found,) = run.values("reserved_mib", START, name).values()
    return found


def held(run: EngineRun, name: str) -> str:
    return f"{reserved(run, name):.0f} MiB"


def more_held(run: EngineRun, name: str) -> str:
    return f"{reserved(run, name) - reserved(run, OFF):+.0f} MiB"


def change(run: EngineRun, metric: str, case: str, name: str) -> str:
    return shown(changes(run, metric, case, name))


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

**FP8 and the norm.** The fork keeps the quantisation of its input apart from the norm before it. So does stock vLLM
{machine.vllm} for blocks of 128 x 128, the format of the official checkpoints: its pass that fuses the two leaves out
norms whose weight has another dtype than the activations, and the weight of these models' norm is float32. In the
[traces of engines](benchmarks/results/h200-decode-27B-FP8.md) with the widths of Qwen3.5-27B they are two kernels in
both: norm, {medians(fp8, "norm")}; quantisation, {medians(fp8, "quantisation")}. From the start of
the norm to the end of the recurrent kernel: {medians(fp8, WALL)}; of that, the FP8 GEMM
{medians(fp8, "in_proj_qkvz")}, a difference of the size that its input's address makes. Other FP8 formats have not been
traced."""


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
    """Where fused as it is loses most against dual_stream: percent, and at which point."""

    def loss(point: Point) -> float:
        return 100 * (us(point, FUSED) / us(point, DUAL_STREAM) - 1)

    point = max(run.points, key=loss)
    shape = point.shape
    return loss(point), f"{shape.name} at TP {shape.tensor_parallel_size} and {point.tokens} tokens"


def way(point: Point, strategy: str) -> str:
    """What runs with this strategy; with ``auto`` what it would choose for a bf16 layer by these times."""
    if strategy != AUTO:
        return strategy
    medians = {name: statistics.median(samples) for name, samples in point.samples_us.items()}
    ways = tuple(name for name in (FUSED, *PADDED_TO, DUAL_STREAM, SERIAL) if name in medians)
    return fastest({point.tokens: medians}, ways)[point.tokens]


def us(point: Point, strategy: str) -> float:
    """Median microseconds of a layer."""
    return statistics.median(point.samples_us[way(point, strategy)])


def slower_than_serial(run: Run) -> list[Point]:
    """Where any strategy is, or what ``auto`` would choose, by the median."""
    return [point for point in run.points if any(percent(point, strategy) < 0 for strategy in ours(point))]


def ours(point: Point) -> list[str]:
    there = [strategy for strategy in (FUSED, DUAL_STREAM, NARROW_KERNEL) if strategy in point.samples_us]
    return [*there, AUTO] if FUSED in there else there


def versions(machine: Machine) -> Machine:
    """The machine but for how many GPUs it has, what differs from one to the next, and what is not always asked."""
    return replace(machine, hardware="", bandwidth_gb_s=None, l2_cache_bytes=0)


def by_address() -> tuple[float, float, float, int]:
    """The time of an FP8 GEMM at the slowest place over that at the fastest, the most over the shapes: of its input at
    8 tokens, of its input at other numbers, of its other operands; and how many places there were."""
    most = [0.0, 0.0, 0.0]
    result = json.loads((RESULTS / "h200-fp8-addresses.json").read_text())
    for row in result["rows"]:
        for moved, by_place in row["us"].items():
            kind = 2 if "float8" not in moved else 0 if row["tokens"] == 8 else 1
            most[kind] = max(most[kind], max(by_place.values()) / min(by_place.values()))
    return most[0], most[1], most[2], result["places"]


def same_work(name: str) -> str:
    """How much the times of graphs of the same work differ at the most, for each number of tokens."""
    most: dict[int, float] = {}
    for row in json.loads((RESULTS / f"h200-same-work-{name}.json").read_text())["rows"]:
        most[row["tokens"]] = max(most.get(row["tokens"], 0.0), max(row["us"]) / min(row["us"]))
    return ", ".join(f"{100 * (ratio - 1):.1f} % at {tokens}" for tokens, ratio in most.items()) + " tokens"


def beside_dual_stream(run: Run) -> dict[tuple[Shape, int], float]:
    """The time of narrow_kernel over dual_stream's, by shape and number of tokens at which ``auto`` may take it."""
    return {
        (point.shape, point.tokens): paired(point, NARROW_KERNEL, DUAL_STREAM)
        for point in run.points
        if NARROW_KERNEL in point.samples_us and point.tokens <= NARROW_KERNEL_MAX_TOKENS
    }


def alone() -> str:
    """The time of narrow_kernel over cuBLAS's, from the best to the worst of the medians."""
    rows = json.loads((RESULTS / "h200-narrow-kernel-few-tokens.json").read_text())["rows"]
    found = [
        statistics.median(row["samples_us"][NARROW_KERNEL]) / statistics.median(row["samples_us"]["cublas"])
        for row in rows
        if row["tokens"] <= NARROW_KERNEL_MAX_TOKENS
    ]
    return f"{min(found):.2f} to {max(found):.2f}"


def percent(point: Point, strategy: str) -> float:
    return 100 * (1 - paired(point, strategy, SERIAL))


def paired(point: Point, strategy: str, baseline: str) -> float:
    """The median over the rounds of a strategy's time over another's."""
    pairs = zip(point.samples_us[way(point, strategy)], point.samples_us[baseline], strict=True)
    return statistics.median(one / other for one, other in pairs)


def start_up() -> str:
    names = ("cpu", "cpu-piecewise", "h200-27B-4-layers-start-up")
    whole, pieces, gpu = (load(RESULTS / name / "compile.json") for name in names)
    assert isinstance(whole, EngineRun)
    assert isinstance(gpu, EngineRun)
    assert isinstance(pieces, EngineRun)
    return f"""Seconds from the start of `vllm serve` until `/health` answers, median of {gpu.rounds} rounds, and the
change with its 95 % interval; caches are vLLM's, Inductor's and Triton's. The widths of Qwen3.5-27B, 4 layers, random
weights, {about_machine(gpu.machine)}, all ten engines starting at the same time, which is why it takes so long
([every number, and the command](benchmarks/results/h200-27B-4-layers-start-up/compile.md)):

{seconds(gpu, AUTO)}

vLLM's CPU engine with a tiny model, {about_machine(whole.machine)}, {whole.rounds} interleaved rounds
([every number](benchmarks/results/cpu/compile.md), `python benchmarks/cpu_compile.py`):

{seconds(whole, DUAL_STREAM)}

And what the `LayerName` is for: compiled graphs over the number of layers, with the CPU engine made to compile
piecewise as it does on a GPU ([every number](benchmarks/results/cpu-piecewise/compile.md)). dual_stream is the older
form of one op in both tables of this engine.

{graphs(pieces)}"""


def seconds(run: EngineRun, name: str) -> str:
    lines = [f"| caches | without the plugin | {name} | change |", "|---|---|---|---|"]
    for case in (COLD, WARM):
        off, on = (statistics.median(run.values("startup_s", case, each).values()) for each in (OFF, name))
        found = change(run, "startup_s", case, name)
        lines.append(f"| {'empty' if case == COLD else 'full'} | {off:.1f} s | {on:.1f} s | {found} |")
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
