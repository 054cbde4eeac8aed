"""How long vLLM's FP8 GEMM of `in_proj_qkvz` takes by where its operands lie in memory, all else being the same.

    python benchmarks/fp8_addresses.py --output DIRECTORY [--preset NAME] [--tokens N,...] [--places N]

The call of the GEMM is recorded in each layer, down to its tensors, and then made again with one operand after the
other at each of several places, the rest where they were. Writes DIRECTORY/fp8-addresses.json and .md. Without a GPU,
with torch's bf16 GEMM: `--device cpu --shape 256,512,16`.
"""

import argparse
import json
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from shape_command import parser_for_shapes, result_of, run_script, shapes_of, written_below
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

from vllm_gdn_plugin.bench import quantized, strategies
from vllm_gdn_plugin.bench.errors import BadInput
from vllm_gdn_plugin.bench.machine import describe_machine, require_device
from vllm_gdn_plugin.bench.projections import SEED, layer_count
from vllm_gdn_plugin.bench.results import QKVZ, Machine
from vllm_gdn_plugin.bench.shapes import Shape, count, counts
from vllm_gdn_plugin.bench.stats import summary
from vllm_gdn_plugin.bench.strategies import Projections
from vllm_gdn_plugin.bench.table import about_machine, table
from vllm_gdn_plugin.bench.timing import CpuTimer, Timer
from vllm_gdn_plugin.tune.timer import CudaTimer

ALIGNMENT = 512
"""Bytes: where PyTorch's blocks begin."""
SPAN = 32 * 2**20
"""Bytes in which the places lie."""
NOTHING = "nothing"
Row = dict[str, Any]


@dataclass(frozen=True)
class Call:
    """One call of an op."""

    function: Callable[..., object]
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]

    def __call__(self) -> None:
        self.function(*self.arguments, **self.keywords)


class Recorder(TorchDispatchMode):  # type: ignore[misc]
    """Notes every op that is called below it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        self.calls.append(Call(function, arguments, keywords or {}))
        return function(*arguments, **(keywords or {}))


def gemm_of(layer: Projections, shape: Shape, hidden_states: torch.Tensor) -> Call:
    """The last op that gets as many values as the weight of `in_proj_qkvz` has. Raises BadInput without any."""
    with Recorder() as recorder:
        layer.qkvz(hidden_states)
    for call in reversed(recorder.calls):
        if any(isinstance(a, torch.Tensor) and a.numel() == shape.hidden * shape.qkvz for a in call.arguments):
            return call
    raise BadInput(f"{shape.name}: no op gets the weight of in_proj_qkvz")


def operands(call: Call, other: Call) -> dict[str, int]:
    """What of a call's arguments belongs to the tokens, so has another shape in a call with other tokens: a name and
    the argument's number. Raises BadInput where one is too large."""
    found = {}
    for number, (argument, with_others) in enumerate(zip(call.arguments, other.arguments, strict=True)):
        if isinstance(argument, torch.Tensor) and argument.shape != with_others.shape:
            if argument.untyped_storage().nbytes() > SPAN:
                raise BadInput(f"an operand of {tuple(argument.shape)} is too large: take fewer tokens")
            dtype = str(argument.dtype).removeprefix("torch.")
            found[f"argument {number}, {dtype} {'x'.join(map(str, argument.shape))}"] = number
    return found


def placed(argument: torch.Tensor, memory: torch.Tensor, offset: int) -> torch.Tensor:
    """A copy of `argument` that begins `offset` bytes into `memory`, a tensor of bytes."""
    size = argument.untyped_storage().nbytes()
    copy = memory[offset : offset + size].view(argument.dtype).as_strided(argument.shape, argument.stride())
    return copy.copy_(argument)


def places(count: int) -> list[int]:
    """Offsets in bytes, the same ones every time."""
    generator = random.Random(SEED)
    return [ALIGNMENT * generator.randrange(SPAN // ALIGNMENT) for _ in range(count)]


def moved(calls: list[Call], number: int | None, memory: torch.Tensor, offset: int) -> list[Call]:
    """The calls, one of whose arguments, if any, lies elsewhere: in each of them at the same place."""
    return [
        Call(
            call.function,
            tuple(placed(a, memory, offset) if n == number else a for n, a in enumerate(call.arguments)),
            call.keywords,
        )
        for call in calls
    ]


def measure_point(timer: Timer, calls: list[Call], movable: dict[str, int | None], task: argparse.Namespace) -> Row:
    """Microseconds of one call at each place of each operand; of `nothing` moved as often as there are places."""
    prepared = {}
    memories = {name: torch.empty(2 * SPAN, dtype=torch.uint8, device=task.device) for name in movable}
    for name, number in movable.items():
        for place in places(task.places):
            here = moved(calls, number, memories[name], place)
            prepared[f"{name}@{place}"] = timer.prepare(lambda here=here: tuple(call() for call in here))[0]
    samples = timer.measure(prepared, task.rounds)
    found: dict[str, dict[int, float]] = {name: {} for name in movable}
    for key, values in samples.items():
        name, _, place = key.rpartition("@")
        found[name][int(place)] = summary([value / len(calls) for value in values]).median
    return {"gemm": str(calls[0].function), "layers": len(calls), "us": found}


def measure(timer: Timer, task: argparse.Namespace, machine: Machine) -> Iterator[Row]:
    """A row for each shape and number of tokens."""
    torch.manual_seed(SEED)
    makers: AbstractContextManager[Callable[[Shape], Projections]] = (
        quantized.vllm_layers()
        if task.device == "cuda"
        else nullcontext(lambda shape: strategies.unquantized(shape, torch.bfloat16, task.device))
    )
    with torch.no_grad(), makers as make, tqdm(total=len(task.shapes) * len(task.tokens)) as progress:
        for shape in task.shapes:
            first = make(shape)
            at_least = layer_count(first.weight_bytes[QKVZ], machine.l2_cache_bytes, timer.min_layers)
            layers = [first, *(make(shape) for _ in range(at_least - 1))]
            for tokens in task.tokens:
                hidden_states = torch.randn(tokens, shape.hidden, dtype=torch.bfloat16, device=task.device)
                more = hidden_states.new_zeros((tokens + 1, shape.hidden))
                for x in (hidden_states, more):
                    first.qkvz(x)  # what is compiled at the first call is not recorded
                calls = [gemm_of(layer, shape, hidden_states) for layer in layers]
                movable = {NOTHING: None, **operands(calls[0], gemm_of(first, shape, more))}
                yield {"shape": asdict(shape), "tokens": tokens, **measure_point(timer, calls, movable, task)}
                progress.update()


def markdown(result: Mapping[str, Any]) -> str:
    """The tables of what was written as JSON."""
    lines = [["shape", "tokens", "moved", "us: fastest place", "median", "slowest", "slowest / fastest"]]
    for row in result["rows"]:
        for name, by_place in row["us"].items():
            times = sorted(by_place.values())
            spread = [f"{time:.2f}" for time in (times[0], summary(times).median, times[-1])]
            shape = f"{row['shape']['name']}, TP {row['shape']['tensor_parallel_size']}"
            lines.append([shape, str(row["tokens"]), name, *spread, f"{times[-1] / times[0]:.2f}"])
    return "\n\n".join(
        [
            "# vLLM's FP8 GEMM by the addresses of its operands",
            f"- {about_machine(Machine(**result['machine']))}; {result['date']}\n"
            f"- `{result['command']}`\n"
            f"- {', '.join(sorted({row['gemm'] for row in result['rows']}))}, its arguments numbered from 0, in CUDA"
            " graphs on a GPU: each layer its own weight, what is moved at the same place in all layers\n"
            f"- us: microseconds of one call, at each place the median of {result['rounds']} interleaved rounds;"
            f" {result['places']} places, for nothing moved as many graphs",
            table(lines),
        ]
    )


def main(arguments: Sequence[str]) -> int:
    return run_script(
        "fp8_addresses.py", arguments, lambda command: run(parsed(arguments), command), "nothing is written"
    )


def parsed(arguments: Sequence[str]) -> argparse.Namespace:
    """The options, with `shapes`, `tokens`, `places` and `rounds` as values. Raises BadInput."""
    parser = parser_for_shapes(__doc__, tensor_parallel_size="1", tokens="1,8,64")
    parser.add_argument("--places", default="24", help="addresses of each operand; default 24")
    parser.add_argument("--rounds", default="6", help="samples at each place; default 6")
    task = parser.parse_args(arguments)
    task.shapes = shapes_of(task)
    if task.device == "cuda":
        for shape in task.shapes:
            quantized.require_blocks(shape)
    task.tokens = counts("--tokens", task.tokens)
    task.places, task.rounds = count("--places", task.places), count("--rounds", task.rounds)
    return task


def run(task: argparse.Namespace, command: str) -> int:
    require_device(task.device)
    path = task.output / "fp8-addresses.json"
    machine = describe_machine(task.device, bandwidth=True)
    with written_below(task.output):
        rows = measure(CudaTimer() if task.device == "cuda" else CpuTimer(), task, machine)
        result = result_of(command, machine, rows, places=task.places, rounds=task.rounds)
        path.write_text(json.dumps(result) + "\n")
        text = markdown(result)
        path.with_suffix(".md").write_text(text + "\n")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
