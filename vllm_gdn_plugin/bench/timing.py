"""How a sample is taken: a replayed CUDA graph between two events, or the wall clock on a CPU."""

import random
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch

from vllm_gdn_plugin.bench.verify import Outputs

WARM_UP_ROUNDS = 3


class Timer(Protocol):
    """Prepares work once, then runs it and says how long it took."""

    aux_stream: Any | None
    min_layers: int

    def prepare(self, work: Callable[[], Outputs]) -> tuple[Callable[[], object], Outputs]:
        """(what is timed, the outputs of one run of it)."""

    def measure(self, prepared: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
        """Microseconds of each, by name, one value a round."""


def interleaved(names: list[str], rounds: int, seed: int = 0) -> list[list[str]]:
    """The order within each round: shuffled, so that none always follows the same other."""
    generator = random.Random(seed)
    return [generator.sample(names, len(names)) for _ in range(rounds)]


class CudaTimer:
    """Captures the work in one CUDA graph, as the engine does, and times its replay with events."""

    min_layers = 16
    """A graph costs the GPU a microsecond or two to start: this many layers share it."""

    def __init__(self) -> None:
        self.aux_stream = torch.cuda.Stream()
        self.capture_stream = torch.cuda.Stream()

    def prepare(self, work: Callable[[], Outputs]) -> tuple[Callable[[], object], Outputs]:
        self.capture_stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.capture_stream):
            work()  # kernels are chosen and compiled, and workspaces allocated, outside the capture
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.capture_stream):
            outputs = work()
        graph.replay()
        torch.cuda.synchronize()
        return graph.replay, outputs

    def measure(self, prepared: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
        # All is enqueued at once, so that the GPU never waits for the CPU between two events.
        marks: dict[str, list[tuple[Any, Any]]] = {name: [] for name in prepared}
        for order in interleaved(list(prepared), WARM_UP_ROUNDS + rounds):
            for name in order:
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                start.record()
                prepared[name]()
                end.record()
                marks[name].append((start, end))
        torch.cuda.synchronize()
        return {
            name: [start.elapsed_time(end) * 1e3 for start, end in pairs[WARM_UP_ROUNDS:]]
            for name, pairs in marks.items()
        }


class CpuTimer:
    """Calls the work and reads the clock. There is no second stream: dual_stream runs serially."""

    aux_stream = None
    min_layers = 2

    def prepare(self, work: Callable[[], Outputs]) -> tuple[Callable[[], object], Outputs]:
        return work, work()

    def measure(self, prepared: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
        samples: dict[str, list[float]] = {name: [] for name in prepared}
        for order in interleaved(list(prepared), WARM_UP_ROUNDS + rounds):
            for name in order:
                start = time.perf_counter()
                prepared[name]()
                samples[name].append((time.perf_counter() - start) * 1e6)
        return {name: values[WARM_UP_ROUNDS:] for name, values in samples.items()}
