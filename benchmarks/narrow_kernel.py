"""Candidates for the narrow projection `in_proj_ba`: each is verified, then timed alone and beside `in_proj_qkvz`.

    python benchmarks/narrow_kernel.py --output DIRECTORY [--beside plain,fp8] [--preset NAME] [--tokens N,...]

A candidate is timed only where its error against float64 is no larger than cuBLAS's and 20 repeats give the same bits.
Writes DIRECTORY/narrow-kernel.json after each number of tokens and DIRECTORY/narrow-kernel.md at the end. Without a
GPU: `TRITON_INTERPRET=1 ... --device cpu --dtype float16 --shape 256,512,16 --tensor-parallel-size 1 --tokens 1,2`
(the interpreter multiplies no bfloat16).
"""

import argparse
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from datetime import datetime, timezone
from functools import partial
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from shape_command import parser_for_shapes, run_script, shapes_of, written_below
from tqdm import tqdm

from vllm_gdn_plugin.bench import quantized, strategies
from vllm_gdn_plugin.bench.errors import BadInput
from vllm_gdn_plugin.bench.machine import describe_machine, require_device
from vllm_gdn_plugin.bench.projections import SEED, layer_count, through
from vllm_gdn_plugin.bench.results import QKVZ, Machine
from vllm_gdn_plugin.bench.shapes import Shape, count, counts
from vllm_gdn_plugin.bench.stats import CONFIDENCE, SPREAD, Ratio, paired_ratio, summary
from vllm_gdn_plugin.bench.strategies import Linear, Projections
from vllm_gdn_plugin.bench.table import NO_DIFFERENCE, about_machine, table
from vllm_gdn_plugin.bench.timing import CpuTimer, Timer
from vllm_gdn_plugin.bench.verify import Outputs, error
from vllm_gdn_plugin.decide.plan import NARROW_KERNEL
from vllm_gdn_plugin.tune.timer import CudaTimer

REPEATS = 20
ERROR_TOLERANCE = 1.001
"""Times cuBLAS's error: two ways to add in float32 round a 16-bit output differently only near a tie."""
SLOW = 0.2
"""Where cuBLAS reaches less than this share of the measured bandwidth, a candidate may take its place ..."""
FASTER = 2.0
"""... if it is this many times as fast."""

CUBLAS = "cublas"
FIRST = ", enqueued first"
"""Beside in_proj_qkvz; else it is second. The plugin's kernel is first in the plugin."""
PLAIN, FP8 = "plain", "fp8"
Make = Callable[[torch.Tensor], Linear]
Row = dict[str, Any]


def cublas(weight: torch.Tensor) -> Linear:
    """As vLLM calls it."""
    return lambda x: F.linear(x, weight)


def transposed(weight: torch.Tensor) -> Linear:
    """The weight as (hidden, ba), contiguous."""
    weight = weight.t().contiguous()
    return lambda x: torch.mm(x, weight)


def padded(weight: torch.Tensor) -> Linear:
    """Zero rows up to a multiple of 128; the outputs are a view."""
    size = len(weight)
    weight = F.pad(weight, (0, 0, 0, -size % 128))
    return lambda x: F.linear(x, weight)[:, :size]


def candidates(device: str) -> dict[str, Make]:
    """All that can be tried here; Triton's only where there is Triton, and on a CPU only in its interpreter."""
    found: dict[str, Make] = {CUBLAS: cublas, "transposed": transposed, "padded": padded}
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if importlib.util.find_spec("triton") and (device == "cuda" or interpreted):
        import narrow_triton

        from vllm_gdn_plugin.run import narrow

        found |= {name: partial(narrow_triton.linear, config) for name, config in narrow_triton.CONFIGS.items()}
        found[NARROW_KERNEL] = lambda weight: lambda x: narrow.linear(x, weight)
    return found


def why_refused(run: Callable[[], object], outputs: Outputs, found: float, allowed: float) -> str | None:
    """Why a candidate with the error `found` is not timed, or None.

    Args:
        run: computes the outputs anew, and returns them or writes them where they were.
        allowed: the error of cuBLAS.
    """
    if not found <= ERROR_TOLERANCE * allowed:
        return f"its error against float64 is {found:.4e}, cuBLAS's {allowed:.4e}"
    first = [output.clone() for output in outputs]
    for _ in range(REPEATS):
        if not all(map(torch.equal, run() or outputs, first)):
            return f"{REPEATS} repeats do not give the same bits"
    return None


def prepare(
    timer: Timer, works: Mapping[str, Callable[[], Outputs]], exact: torch.Tensor
) -> tuple[dict[str, Callable[[], object]], dict[str, float], dict[str, str]]:
    """(what is to be timed, the errors of `in_proj_ba`, why others are not timed), by candidate, cuBLAS the first."""
    prepared, errors, refused = {}, {}, {}
    for name, work in works.items():
        try:
            run, outputs = timer.prepare(work)
        except Exception as failure:  # of whatever kind: a kernel that this GPU cannot run
            refused[name] = " ".join(f"{type(failure).__name__}: {failure}".split())[:200]
            continue
        errors[name] = error(outputs[-1], exact)
        why = why_refused(run, outputs, errors[name], errors.get(CUBLAS, 0.0))
        if why:
            refused[name] = why
        else:
            prepared[name] = run
    return prepared, errors, refused


def measure(timer: Timer, task: argparse.Namespace, machine: Machine, save: Callable[[Row], None]) -> None:
    """Hand a row to `save` for each shape and number of tokens."""
    torch.manual_seed(SEED)
    dtype = getattr(torch, task.dtype)
    makes = candidates(task.device)
    with torch.no_grad(), ExitStack() as stack, tqdm(total=len(task.shapes) * len(task.tokens)) as progress:
        wide_makers: dict[str, Callable[[Shape], Projections]] = {}
        if PLAIN in task.beside:
            wide_makers[PLAIN] = lambda shape: strategies.unquantized(shape, dtype, task.device)
        if FP8 in task.beside:
            wide_makers[FP8] = stack.enter_context(quantized.vllm_layers())
        for shape in task.shapes:
            count = layer_count(2 * shape.ba * shape.hidden, machine.l2_cache_bytes, timer.min_layers)
            weights = [strategies.random_weight(shape.ba, shape.hidden, dtype, task.device) for _ in range(count)]
            linears = {name: [make(weight) for weight in weights] for name, make in makes.items()}
            wide = {precision: _wide(make, shape, machine, timer) for precision, make in wide_makers.items()}
            for tokens in task.tokens:
                progress.set_description(f"{shape.name}, TP {shape.tensor_parallel_size}, {tokens} tokens")
                hidden_states = torch.randn(tokens, shape.hidden, dtype=dtype, device=task.device)
                row = _alone(timer, weights, linears, hidden_states, task.rounds)
                row["beside"] = {
                    precision: _beside(timer, weights, linears, layers, hidden_states, task.rounds)
                    for precision, layers in wide.items()
                }
                save({"shape": asdict(shape), "tokens": tokens, **row})
                progress.update()


def _wide(make: Callable[[Shape], Projections], shape: Shape, machine: Machine, timer: Timer) -> list[Projections]:
    first = make(shape)
    count = layer_count(first.weight_bytes[QKVZ], machine.l2_cache_bytes, timer.min_layers)
    return [first, *(make(shape) for _ in range(count - 1))]


def _alone(
    timer: Timer,
    weights: list[torch.nn.Parameter],
    linears: dict[str, list[Linear]],
    hidden_states: torch.Tensor,
    rounds: int,
) -> Row:
    works = {name: through(each, lambda one, x: (one(x),), hidden_states) for name, each in linears.items()}
    exact = F.linear(hidden_states.double(), weights[-1].double())
    prepared, errors, refused = prepare(timer, works, exact)
    moved = weights[0].nbytes + hidden_states.nbytes + len(hidden_states) * len(weights[0]) * hidden_states.itemsize
    samples = _per_layer(timer.measure(prepared, rounds), len(weights))
    return {"layers": len(weights), "bytes_moved": moved, "errors": errors, "refused": refused, "samples_us": samples}


def _beside(
    timer: Timer,
    weights: list[torch.nn.Parameter],
    linears: dict[str, list[Linear]],
    layers: list[Projections],
    hidden_states: torch.Tensor,
    rounds: int,
) -> Row:
    """in_proj_qkvz alone, and dual_stream with each candidate as in_proj_ba."""
    works = {}
    for name, each in linears.items():
        placed = [replace(wide, ba=one) for wide, one in zip(layers, each, strict=False)]
        for ba_first in (False, True) if name in (CUBLAS, NARROW_KERNEL) else (False,):
            step = strategies.dual_stream(timer.aux_stream, ba_first)
            works[name + FIRST * ba_first] = through(placed, step, hidden_states)
    exact = F.linear(hidden_states.double(), weights[len(layers) - 1].double())
    prepared, _, refused = prepare(timer, works, exact)
    prepared[QKVZ] = timer.prepare(through(layers, strategies.qkvz_alone, hidden_states))[0]
    return {"refused": refused, "samples_us": _per_layer(timer.measure(prepared, rounds), len(layers))}


def _per_layer(samples: Mapping[str, list[float]], layers: int) -> dict[str, list[float]]:
    return {name: [value / layers for value in values] for name, values in samples.items()}


def markdown(result: Mapping[str, Any]) -> str:
    """The tables of what was written as JSON."""
    machine = Machine(**result["machine"])
    parts = [
        f"# Candidates for `in_proj_ba`, {result['dtype']}",
        f"- {about_machine(machine)}; {result['date']}\n"
        f"- `{result['command']}`\n"
        f"- us: microseconds per layer, median of {result['rounds']} rounds ({SPREAD[0]}th to {SPREAD[1]}th"
        f" percentile), in CUDA graphs on a GPU; x of {CUBLAS}: with its {CONFIDENCE:.0%} interval\n"
        + (f"- measured bandwidth of a copy: {machine.bandwidth_gb_s:.0f} GB/s\n" if machine.bandwidth_gb_s else "")
        + f"- a candidate is taken where {CUBLAS} reaches less than {SLOW:.0%} of it and the interval says at least"
        f" {FASTER:g} times as fast",
    ]
    for shape, group in groupby(result["rows"], key=lambda row: row["shape"]):
        rows = list(group)
        size = f"hidden {shape['hidden']}, ba {shape['ba']}"
        parts.append(f"### {shape['name']}, TP {shape['tensor_parallel_size']} ({size})")
        taken = [[str(row["tokens"]), choice(row, machine.bandwidth_gb_s)] for row in rows]
        parts.append(table([["tokens", "taken"], *taken]))
        parts.append("<details><summary>Every number</summary>")
        parts.append(table(_alone_lines(rows, machine.bandwidth_gb_s)))
        parts += [table(_beside_lines(rows, precision)) for precision in rows[0]["beside"]]
        parts.append("</details>")
    return "\n\n".join(parts) + "\n"


def choice(row: Row, bandwidth: float | None) -> str:
    """Which candidate the rule above takes, or why none."""
    samples = row["samples_us"]
    if CUBLAS not in samples:
        return f"nothing to compare with: {row['refused'][CUBLAS]}"
    if not bandwidth:
        return "bandwidth not measured"
    share = _share(row, CUBLAS, bandwidth)
    if share >= SLOW:
        return f"none: {CUBLAS} reaches {share:.0%}"
    best = min(samples, key=lambda name: summary(samples[name]).median)
    ratio = paired_ratio(samples[best], samples[CUBLAS])
    if best == CUBLAS or ratio.high * FASTER > 1:
        return f"none: {CUBLAS} reaches {share:.0%}, the fastest is {best} at {_times(ratio)}"
    return f"{best} at {_times(ratio)}, {_share(row, best, bandwidth):.0%} instead of {share:.0%}"


def _alone_lines(rows: Sequence[Row], bandwidth: float | None) -> list[list[str]]:
    lines = [["tokens", "alone", "us", f"x of {CUBLAS}", "share of bandwidth", f"error, x of {CUBLAS}'s"]]
    for row in rows:
        for name, found in row["errors"].items():
            relative = f"{found / row['errors'][CUBLAS]:.4f}" if row["errors"].get(CUBLAS) else ""
            share = f"{_share(row, name, bandwidth):.1%}" if bandwidth and name in row["samples_us"] else ""
            lines.append([str(row["tokens"]), name, *_timed(row, name, CUBLAS), share, relative])
    return lines


def _beside_lines(rows: Sequence[Row], precision: str) -> list[list[str]]:
    head = f"dual_stream beside {precision} in_proj_qkvz"
    lines = [["tokens", head, "us", f"x of {CUBLAS}", "x of qkvz alone"]]
    for row in rows:
        beside = row["beside"][precision]
        for name in (*beside["samples_us"], *beside["refused"]):
            of_qkvz = _timed(beside, name, QKVZ)[1] if name in beside["samples_us"] else ""
            lines.append([str(row["tokens"]), name, *_timed(beside, name, CUBLAS), of_qkvz])
    return lines


def _timed(row: Row, name: str, baseline: str) -> list[str]:
    """Microseconds and their ratio, or why there are none."""
    samples = row["samples_us"]
    if name not in samples:
        return [f"not timed: {row['refused'][name]}", ""]
    found = summary(samples[name])
    ratio = _times(paired_ratio(samples[name], samples[baseline])) if baseline in samples else ""
    return [f"{found.median:.2f} ({found.low:.2f} to {found.high:.2f})", "1" if name == baseline else ratio]


def _times(ratio: Ratio) -> str:
    interval = f"{ratio.median:.3f}x ({ratio.low:.3f} to {ratio.high:.3f})"
    return interval if ratio.shows_difference else f"{NO_DIFFERENCE}: {interval}"


def _share(row: Row, name: str, bandwidth: float) -> float:
    return float(row["bytes_moved"] / (summary(row["samples_us"][name]).median * 1e-6) / 1e9 / bandwidth)


def main(arguments: Sequence[str]) -> int:
    return run_script(
        "narrow_kernel.py",
        arguments,
        lambda command: run(parsed(arguments), command),
        "the JSON holds what was measured",
    )


def parsed(arguments: Sequence[str]) -> argparse.Namespace:
    """The options, with `shapes`, `tokens`, `beside` and `rounds` as values. Raises BadInput."""
    parser = parser_for_shapes(__doc__, tensor_parallel_size="1,4", tokens="1,2,3,4,8,16,32,64,128,256")
    parser.add_argument(
        "--beside", default=PLAIN, help=f"in_proj_qkvz: {PLAIN} (of the same dtype), {FP8} (needs vLLM), or both"
    )
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--rounds", default="30", help="samples of each candidate; default 30")
    task = parser.parse_args(arguments)
    task.beside = task.beside.split(",")
    for precision in task.beside:
        if precision not in (PLAIN, FP8):
            raise BadInput(f"--beside {precision!r} is neither {PLAIN} nor {FP8}")
    if FP8 in task.beside and (task.device, task.dtype) != ("cuda", "bfloat16"):
        raise BadInput(f"--beside {FP8} needs --device cuda and --dtype bfloat16")
    task.shapes = shapes_of(task)
    if FP8 in task.beside:
        for shape in task.shapes:
            quantized.require_blocks(shape)
    task.tokens = counts("--tokens", task.tokens)
    task.rounds = count("--rounds", task.rounds)
    return task


def run(task: argparse.Namespace, command: str) -> int:
    require_device(task.device)
    path = task.output / "narrow-kernel.json"
    machine = describe_machine(task.device, bandwidth=True)
    result: dict[str, Any] = {
        "command": command,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seed": SEED,
        "rounds": task.rounds,
        "dtype": task.dtype,
        "machine": asdict(machine),
        "rows": [],
    }

    def save(row: Row) -> None:
        result["rows"].append(row)
        path.write_text(json.dumps(result) + "\n")

    with written_below(task.output):
        measure(CudaTimer() if task.device == "cuda" else CpuTimer(), task, machine, save)
        text = markdown(result)
        path.with_suffix(".md").write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
