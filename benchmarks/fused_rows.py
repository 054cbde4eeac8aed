"""How long the one GEMM of fused takes by the number of rows to which its weight is padded.

    python benchmarks/fused_rows.py --output DIRECTORY [--preset NAME] [--tokens N,...] [--multiples N,...] [--rounds N]

cuBLAS chooses its kernel by the shape, so a few rows more may be faster. Beside `in_proj_qkvz` alone, each number of
rows is timed that padding to one of the multiples gives. Once all are timed and written, the kernel of each is noted as
well: a GPU that has been profiled may be slower. Writes DIRECTORY/fused-rows.json and .md. Without a GPU, where no
kernel is noted: `--device cpu --shape 256,512,16`.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from shape_command import parser_for_shapes, result_of, run_script, shapes_of, written_below
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from vllm_gdn_plugin.bench.machine import describe_machine, require_device
from vllm_gdn_plugin.bench.projections import SEED, layer_count
from vllm_gdn_plugin.bench.results import Machine
from vllm_gdn_plugin.bench.shapes import Shape, count, counts
from vllm_gdn_plugin.bench.stats import summary
from vllm_gdn_plugin.bench.strategies import random_weight
from vllm_gdn_plugin.bench.table import about_machine, table
from vllm_gdn_plugin.bench.timing import CpuTimer, Timer
from vllm_gdn_plugin.decide.plan import padded
from vllm_gdn_plugin.tune.timer import CudaTimer, one_after_the_other

Row = dict[str, Any]


def kernels_of(call: Callable[[], object]) -> list[str]:
    """The names of the kernels that it launches on the GPU."""
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        call()
        torch.cuda.synchronize()
    return [event.name for event in found.events() if event.device_type == DeviceType.CUDA]


def gemm(rows: int, weight: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
    return F.linear(hidden_states, weight[:rows])


def sizes_of(shape: Shape, multiples: Sequence[int]) -> list[int]:
    """The numbers of rows that are timed, the most last."""
    return sorted({shape.qkvz, *(padded(shape.qkvz + shape.ba, multiple) for multiple in multiples)})


def measure(timer: Timer, task: argparse.Namespace, machine: Machine) -> Iterator[Row]:
    """A row for each shape and number of tokens: by the number of rows, the samples in us a layer."""
    torch.manual_seed(SEED)
    with torch.no_grad(), tqdm(total=len(task.shapes) * len(task.tokens)) as progress:
        for shape in task.shapes:
            sizes = sizes_of(shape, task.multiples)
            make = partial(random_weight, sizes[-1], shape.hidden, torch.bfloat16, task.device)
            first = make()
            layers = [first]
            layers += [make() for _ in range(layer_count(first.nbytes, machine.l2_cache_bytes, timer.min_layers) - 1)]
            for tokens in task.tokens:
                x = torch.randn(tokens, shape.hidden, dtype=torch.bfloat16, device=task.device)
                prepared = {
                    str(rows): timer.prepare(partial(one_after_the_other, partial(gemm, rows), layers, x))[0]
                    for rows in sizes
                }
                samples = timer.measure(prepared, task.rounds)
                prepared.clear()
                yield {
                    "shape": asdict(shape),
                    "tokens": tokens,
                    "samples_us": {rows: [value / len(layers) for value in found] for rows, found in samples.items()},
                }
                progress.update()


def note_kernels(rows: Sequence[Row], multiples: Sequence[int], device: str) -> None:
    """Add to each row the names of the kernels of each GEMM."""
    with torch.no_grad():
        for row in rows:
            shape = Shape(**row["shape"])
            sizes = sizes_of(shape, multiples)
            weight = random_weight(sizes[-1], shape.hidden, torch.bfloat16, device)
            x = torch.randn(row["tokens"], shape.hidden, dtype=torch.bfloat16, device=device)
            row["kernels"] = {str(size): kernels_of(partial(gemm, size, weight, x)) for size in sizes}


def markdown(result: Mapping[str, Any]) -> str:
    """The table of what was written as JSON."""
    lines = [["shape", "tokens", "in_proj_qkvz us", *(f"to {n}: rows, us (x)" for n in result["multiples"])]]
    for row in result["rows"]:
        shape = Shape(**row["shape"])
        medians = {int(rows): summary(samples).median for rows, samples in row["samples_us"].items()}
        alone = medians[shape.qkvz]
        sizes = [padded(shape.qkvz + shape.ba, multiple) for multiple in result["multiples"]]
        cells = [f"{rows}, {medians[rows]:.2f} ({medians[rows] / alone:.3f}x)" for rows in sizes]
        lines.append([f"{shape.name}, TP {shape.tensor_parallel_size}", str(row["tokens"]), f"{alone:.2f}", *cells])
    return "\n\n".join(
        [
            "# The one GEMM of fused by the multiple to which its rows are padded",
            f"- {about_machine(Machine(**result['machine']))}; {result['date']}\n"
            f"- `{result['command']}`\n"
            f"- bf16, in CUDA graphs on a GPU; median of {result['rounds']} interleaved rounds, one layer;"
            " x: of `in_proj_qkvz` alone",
            table(lines),
        ]
    )


def main(arguments: Sequence[str]) -> int:
    return run_script("fused_rows.py", arguments, lambda command: run(parsed(arguments), command), "nothing is written")


def parsed(arguments: Sequence[str]) -> argparse.Namespace:
    """The options, with `shapes`, `tokens`, `multiples` and `rounds` as values. Raises BadInput."""
    parser = parser_for_shapes(__doc__, tensor_parallel_size="1,4", tokens="1,2,4,8,16,32,64,128,256")
    multiples = "16,32,64,128,256,512"
    parser.add_argument("--multiples", metavar="N,...", default=multiples, help=f"default {multiples}")
    parser.add_argument("--rounds", default="20", help="samples of each; default 20")
    task = parser.parse_args(arguments)
    task.shapes = shapes_of(task)
    task.tokens, task.multiples = counts("--tokens", task.tokens), counts("--multiples", task.multiples)
    task.rounds = count("--rounds", task.rounds)
    return task


def run(task: argparse.Namespace, command: str) -> int:
    require_device(task.device)
    machine = describe_machine(task.device, bandwidth=True)
    with written_below(task.output):
        rows = measure(CudaTimer() if task.device == "cuda" else CpuTimer(), task, machine)
        result = result_of(command, machine, rows, multiples=task.multiples, rounds=task.rounds)
        path = task.output / "fused-rows.json"
        path.write_text(json.dumps(result) + "\n")
        text = markdown(result)
        path.with_suffix(".md").write_text(f"{text}\n")
        if task.device == "cuda":
            note_kernels(result["rows"], task.multiples, task.device)
            path.write_text(json.dumps(result) + "\n")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
