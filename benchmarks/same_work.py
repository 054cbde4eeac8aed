"""How much the times of CUDA graphs of the same work differ, which the rounds of one graph cannot show.

    python benchmarks/same_work.py --output DIRECTORY [--quantization fp8] [--preset NAME] [--tokens N,...] [--graphs N]
        [--own-layers]

Each way to run the projections is captured several times, and all graphs are replayed in turn. With `--own-layers` the
weights, too, lie elsewhere in each graph, as in engines that start anew. Writes DIRECTORY/same-work.json. Without a
GPU, where nothing is captured: `--device cpu --shape 256,512,16`.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from shape_command import parser_for_shapes, result_of, run_script, shapes_of, written_below

from vllm_gdn_plugin.bench import quantized, strategies
from vllm_gdn_plugin.bench.errors import BadInput
from vllm_gdn_plugin.bench.machine import describe_machine, require_device
from vllm_gdn_plugin.bench.projections import SEED, through
from vllm_gdn_plugin.bench.shapes import Shape, count, counts
from vllm_gdn_plugin.bench.stats import summary
from vllm_gdn_plugin.bench.strategies import Projections
from vllm_gdn_plugin.bench.timing import CpuTimer, Timer
from vllm_gdn_plugin.tune.timer import CudaTimer

Row = dict[str, Any]


def measure(timer: Timer, task: argparse.Namespace) -> Iterator[Row]:
    """A row for each shape, number of tokens and way: of each graph, the median of its rounds in us a layer."""
    torch.manual_seed(SEED)
    makers: AbstractContextManager[Callable[[Shape], Projections]] = (
        quantized.vllm_layers()
        if task.quantization
        else nullcontext(lambda shape: strategies.unquantized(shape, torch.bfloat16, task.device))
    )
    with torch.no_grad(), makers as make:
        for shape in task.shapes:
            stacks = [
                [make(shape) for _ in range(timer.min_layers)] for _ in range(task.graphs if task.own_layers else 1)
            ]
            for tokens in task.tokens:
                hidden_states = torch.randn(tokens, shape.hidden, dtype=torch.bfloat16, device=task.device)
                ways = strategies.steps(stacks[0][0], timer.aux_stream, tokens)
                graphs = {
                    f"{way} {number}": timer.prepare(through(stacks[number % len(stacks)], step, hidden_states))[0]
                    for number in range(task.graphs)
                    for way, step in ways.items()
                }
                samples = timer.measure(graphs, task.rounds)
                for way in ways:
                    times = [summary(samples[f"{way} {number}"]).median for number in range(task.graphs)]
                    us = [time / timer.min_layers for time in times]
                    yield {"shape": shape.name, "tokens": tokens, "way": way, "us": us}


def main(arguments: Sequence[str]) -> int:
    return run_script("same_work.py", arguments, lambda command: run(parsed(arguments), command), "nothing is written")


def parsed(arguments: Sequence[str]) -> argparse.Namespace:
    """The options, with `shapes`, `tokens`, `graphs` and `rounds` as values. Raises BadInput."""
    parser = parser_for_shapes(__doc__, tensor_parallel_size="1", tokens="2,8,16")
    parser.add_argument("--quantization", choices=("fp8",), help="of in_proj_qkvz; default bfloat16")
    parser.add_argument("--graphs", default="8", help="of each way; default 8")
    parser.add_argument("--rounds", default="6", help="samples of each graph; default 6")
    parser.add_argument("--own-layers", action="store_true", help="each graph has weights of its own")
    task = parser.parse_args(arguments)
    if task.quantization and task.device != "cuda":
        raise BadInput("--quantization fp8 needs --device cuda")
    task.shapes = shapes_of(task)
    if task.quantization:
        for shape in task.shapes:
            quantized.require_blocks(shape)
    task.tokens = counts("--tokens", task.tokens)
    task.graphs, task.rounds = count("--graphs", task.graphs), count("--rounds", task.rounds)
    return task


def run(task: argparse.Namespace, command: str) -> int:
    require_device(task.device)
    machine = describe_machine(task.device)
    with written_below(task.output):
        rows = measure(CudaTimer() if task.device == "cuda" else CpuTimer(), task)
        result = result_of(command, machine, rows, rounds=task.rounds, own_layers=task.own_layers)
        (task.output / "same-work.json").write_text(json.dumps(result, indent=1) + "\n")
    for row in result["rows"]:
        print(f"{row['shape']}, {row['tokens']} tokens, {row['way']}: {max(row['us']) / min(row['us']):.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
