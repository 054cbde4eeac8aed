"""The run itself: for each shape and each number of tokens, verify the ways and then time them."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from vllm_gdn_plugin.bench import quantized, strategies
from vllm_gdn_plugin.bench.errors import BadInput, WrongResult
from vllm_gdn_plugin.bench.results import Point, Run
from vllm_gdn_plugin.bench.shapes import Shape
from vllm_gdn_plugin.bench.strategies import Projections
from vllm_gdn_plugin.bench.timing import CpuTimer, Timer
from vllm_gdn_plugin.bench.verify import Outputs, verify
from vllm_gdn_plugin.tune.timer import CudaTimer, in_turn

SEED = 0


@dataclass(frozen=True)
class Task:
    """What is to be measured."""

    shapes: list[Shape]
    tokens: list[int]
    device: str
    dtype: str
    quantization: str | None
    rounds: int

    @property
    def precision(self) -> str:
        """How the two weights are kept."""
        return f"{self.quantization} in_proj_qkvz and {self.dtype} in_proj_ba" if self.quantization else self.dtype

    @property
    def name(self) -> str:
        """The stem of the files that are written."""
        return f"projections-{self.quantization or self.dtype}"

    def require(self) -> None:
        """Raises BadInput where the quantised layer cannot do this."""
        if self.quantization is None:
            return
        if self.device != "cuda" or self.dtype != "bfloat16":
            raise BadInput(f"--quantization {self.quantization} needs --device cuda and --dtype bfloat16")
        for shape in self.shapes:
            quantized.require_blocks(shape)


def layer_count(layer_bytes: int, cache_bytes: int, at_least: int) -> int:
    """Copies of the weights that one sample goes through: together they exceed twice the cache, so that each is read
    from memory, as in a model."""
    return max(at_least, 2 * cache_bytes // layer_bytes + 1)


def measure(task: Task, run: Run, progress: Any) -> None:
    """Append every point to ``run`` as it is done; ``progress`` is a tqdm over all of them.

    Raises:
        WrongResult: at the first point that does not verify; it is not timed.
        BadInput: where a point does not fit the GPU, or the quantised layer is not to be had.
    """
    torch.manual_seed(SEED)
    dtype = getattr(torch, task.dtype)
    timer: Timer = CudaTimer() if task.device == "cuda" else CpuTimer()
    makers: AbstractContextManager[Callable[[Shape], Projections]] = (
        quantized.vllm_layers()
        if task.quantization
        else nullcontext(lambda shape: strategies.unquantized(shape, dtype, task.device))
    )
    with torch.no_grad(), makers as make:
        for shape in task.shapes:
            first = make(shape)
            count = layer_count(max(first.weight_bytes.values()), run.machine.l2_cache_bytes, timer.min_layers)
            layers = [first, *(make(shape) for _ in range(count - 1))]

            def point(tokens: int, shape: Shape = shape, layers: list[Projections] = layers) -> Point:
                hidden_states = torch.randn(tokens, shape.hidden, dtype=dtype, device=task.device)
                return measure_point(timer, shape, layers, hidden_states, task.rounds)

            at_each_size(run, shape, task.tokens, point, progress)


def at_each_size(run: Run, shape: Shape, sizes: Iterable[int], point: Callable[[int], Point], progress: Any) -> None:
    """Append the ``point`` of each number of tokens to ``run`` as it is done; raises what :func:`measure` does."""
    for tokens in sizes:
        where = f"{shape.name}, TP {shape.tensor_parallel_size}, {tokens} tokens"
        progress.set_description(where)
        try:
            run.points.append(point(tokens))
        except WrongResult as wrong:
            raise WrongResult(f"{where}: {wrong}") from wrong
        except torch.OutOfMemoryError as error:
            raise BadInput(f"{where}: the memory of the GPU is too small for it") from error
        progress.update()


def measure_point(
    timer: Timer, shape: Shape, layers: list[Projections], hidden_states: torch.Tensor, rounds: int
) -> Point:
    """Verify, then time, every way on the same layers and the same ``hidden_states`` (num_tokens, hidden)."""
    ways, last = strategies.ways(layers[0], timer.aux_stream), layers[-1]
    prepared, outputs = prepare(timer, ways, layers, hidden_states)
    verify(outputs, last.reference(hidden_states))
    moved = {way: strategies.bytes_moved(last, way, hidden_states, outputs[way]) for way in prepared}
    per_layer = times_of_a_layer(timer, prepared, rounds, len(layers))
    return Point(shape, len(hidden_states), len(layers), moved, per_layer)


def prepare(
    timer: Timer,
    ways: Mapping[str, Callable[[Any, torch.Tensor], Outputs]],
    layers: Sequence[Any],
    hidden_states: torch.Tensor,
) -> tuple[dict[str, Callable[[], object]], dict[str, Outputs]]:
    """By way: what is timed, one layer after the other, and the outputs of the last one."""
    steps = {way: [partial(step, layer, hidden_states) for layer in layers] for way, step in ways.items()}
    size, device = hidden_states.numel(), hidden_states.device  # as large as an input in FP8
    both = {way: timer.prepare(partial(in_turn, each, size, device)) for way, each in steps.items()}
    return {way: run for way, (run, _) in both.items()}, {way: outputs for way, (_, outputs) in both.items()}


def times_of_a_layer(
    timer: Timer, prepared: Mapping[str, Callable[[], object]], rounds: int, layers: int
) -> dict[str, list[float]]:
    """Microseconds of one layer by way, one value a round."""
    return {way: [value / layers for value in values] for way, values in timer.measure(prepared, rounds).items()}
