"""How a sample is taken: a replayed CUDA graph between two events, or the wall clock on a CPU."""

import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from vllm_gdn_plugin.bench.verify import Outputs
from vllm_gdn_plugin.tune.timer import WARM_UP_ROUNDS, interleaved


class Timer(Protocol):
    """Prepares work once, then runs it and says how long it took."""

    aux_stream: Any | None
    min_layers: int

    def prepare(self, work: Callable[[], Outputs]) -> tuple[Callable[[], object], Outputs]:
        """(what is timed, the outputs of one run of it)."""

    def measure(self, prepared: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
        """Microseconds of each, by name, one value a round."""


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
