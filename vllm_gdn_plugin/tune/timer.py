"""How GPU work is timed: captured in a CUDA graph, as the engine does, and replayed between two events."""

import random
import statistics
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import torch

from vllm_gdn_plugin.host.streams import release_workspaces, unchanged_stream
from vllm_gdn_plugin.tune.times import Time, Times

WARM_UP_ROUNDS = 3
MOST_TAKEN = 2**20
"""Bytes. PyTorch keeps larger blocks apart from these; at 64 tokens and more, addresses make no difference."""

Result = TypeVar("Result")


def interleaved(names: list[str], rounds: int) -> list[list[str]]:
    """The order within each round: shuffled, so that none always follows the same other."""
    generator = random.Random(0)
    return [generator.sample(names, len(names)) for _ in range(rounds)]


class CudaTimer:
    """Captures the work in one CUDA graph and times its replay with events."""

    min_layers = 16
    """A graph costs the GPU a microsecond or two to start: this many layers share it."""

    def __init__(self) -> None:
        self.aux_stream = torch.cuda.Stream()
        self.capture_stream = torch.cuda.Stream()

    def prepare(self, work: Callable[[], Result]) -> tuple[Callable[[], object], Result]:
        """(what is timed, the result of one run of it)."""
        self.capture_stream.wait_stream(torch.cuda.current_stream())
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self.capture_stream):
            work()  # kernels are chosen and compiled, and workspaces allocated, outside the capture
            torch.cuda.synchronize()
            # Other threads of a host may use the GPU meanwhile. torch.cuda.graph would also collect garbage each time.
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                result = work()
            finally:
                graph.capture_end()
        graph.replay()
        torch.cuda.synchronize()
        return graph.replay, result

    def measure(
        self, prepared: Mapping[str, Callable[[], object]], rounds: int, warm_up: int = WARM_UP_ROUNDS
    ) -> dict[str, list[float]]:
        """Microseconds of each, by name, one value a round."""
        # All is enqueued at once, so that the GPU never waits for the CPU between two events.
        marks: dict[str, list[tuple[Any, Any]]] = {name: [] for name in prepared}
        for order in interleaved(list(prepared), warm_up + rounds):
            for name in order:
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                start.record()
                prepared[name]()
                end.record()
                marks[name].append((start, end))
        torch.cuda.synchronize()
        return {
            name: [start.elapsed_time(end) * 1e3 for start, end in pairs[warm_up:]] for name, pairs in marks.items()
        }


Works = Callable[[int], Mapping[str, Sequence[Callable[[], object]]]]
"""For a number of tokens, what each way has to do: the same steps, one for each of several layers, in one graph."""

ROUNDS = 8
SECONDS = 2.0
"""After this long no further number of tokens is timed."""


def timed(works: Works, sizes: Iterable[int], token_bytes: int, seconds: float = SECONDS) -> Times:
    """Times of one layer in some interleaved rounds; the memory that it took is given back, also where it fails.

    Args:
        sizes: numbers of tokens, timed in this order until ``seconds`` have passed.
        token_bytes: what a step allocates for a token where its input is quantised, see :func:`in_turn`.
    """
    try:
        return _timed(works, sizes, token_bytes, seconds)
    except Exception as error:
        traceback.clear_frames(error.__traceback__)  # which hold the graphs
        raise
    finally:
        release_workspaces()


def _timed(works: Works, sizes: Iterable[int], token_bytes: int, seconds: float) -> Times:
    timer = CudaTimer()
    times: Times = {}
    with unchanged_stream(), torch.inference_mode():  # the latter as the engine: Dynamo would compile twice
        end = time.perf_counter() + seconds
        for tokens in sizes:
            if time.perf_counter() > end:
                break
            steps = works(tokens)
            moved = tokens * token_bytes
            prepared = {way: timer.prepare(partial(in_turn, each, moved, "cuda"))[0] for way, each in steps.items()}
            samples = timer.measure(prepared, ROUNDS, warm_up=1)
            prepared.clear()  # a graph that ends later could give back the workspace of the next ones
            times[tokens] = {way: _time(samples[way], len(steps[way])) for way in steps}
    return times


def _time(samples: list[float], layers: int) -> Time:
    lower, median, upper = statistics.quantiles(samples, n=4)
    return Time(median / layers, (upper - lower) / median)


def in_turn(steps: Iterable[Callable[[], Result]], input_bytes: int, device: torch.device | str) -> Result:
    """Run each step, and after each take as many bytes as its quantised input has taken and given back.

    Returns what the last step gave.

    So the input lies elsewhere in each: by its address alone an FP8 GEMM of a few tokens takes up to 1.3 times as long
    (benchmarks/NOTES.md), and an engine's addresses cannot be foretold.
    """
    taken = []
    for step in steps:
        result = step()
        taken.append(torch.empty(min(input_bytes, MOST_TAKEN), dtype=torch.uint8, device=device))
    return result
