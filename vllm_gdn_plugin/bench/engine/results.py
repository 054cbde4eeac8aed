"""What a run of ``bench serve`` or ``bench compile`` found, as it lies in its JSON file."""

import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from vllm_gdn_plugin.bench.errors import BadInput
from vllm_gdn_plugin.bench.results import Machine, rounded, write

SERVE, COMPILE = "serve", "compile"
FORMATS = {kind: f"vllm-gdn-plugin bench {kind} 2" for kind in (SERVE, COMPILE)}

METRICS = {
    "output_tokens_per_s": "output tokens/s, all requests together",
    "output_tokens_per_s_per_request": "output tokens/s per request",
    "tpot_ms": "TPOT, ms: median time per output token after the first",
    "step_ms": "decode step, ms: where speculation gives several tokens a step",
    "itl_ms": "ITL, ms: median time between two answers of a stream",
    "ttft_ms": "TTFT, ms: median time to the first token",
    "startup_s": "start-up, s: of a server until /health answers, of an engine in a process until it is built",
    "host_memory_mib": "peak host memory, MiB: resident, summed over the server's processes",
    "gpu_memory_mib": "GPU memory in use at the end, MiB: all GPUs of the machine",
    "model_mib": "GPU memory of the loaded model, MiB, as vLLM logs it",
    "allocated_mib": "GPU memory that PyTorch has given out, MiB: weights, KV cache, what a CUDA graph holds",
    "reserved_mib": "GPU memory that PyTorch holds, MiB: the former and what lies between",
    "kv_cache_blocks": "blocks in the KV cache: what the engine's memory leaves for it",
    "artifacts": "compiled graphs in the cache",
    "cache_mib": "compile cache, MiB",
}
"""What is measured, in the order of the report."""


@dataclass(frozen=True)
class Sample:
    """What one engine showed in one case of one round."""

    round: int
    variant: str
    case: str
    """``start``; ``concurrency 4``; ``cold``, ``warm``."""
    values: dict[str, float]
    """By the names of :data:`METRICS`."""


@dataclass
class EngineRun:
    """One run of ``bench serve`` or ``bench compile``."""

    kind: str
    command: str
    date: str
    rounds: int
    model: str
    vllm_arguments: list[str]
    variants: dict[str, dict[str, str]]
    """The environment that each variant adds; ``off`` is the first. ``auto-2`` is a second start of ``auto``."""
    machine: Machine
    load: str = ""
    """What was asked of the engines, and how, in words."""
    verified: dict[str, str] = field(default_factory=dict)
    """By variant: how its answer compares with the stock engine's."""
    said: dict[str, str] = field(default_factory=dict)
    """By variant: the plugin's line in the log of the engine that was started last."""
    stopped: str | None = None
    """Why samples are missing, or None where none is."""
    samples: list[Sample] = field(default_factory=list)

    def is_empty(self) -> bool:
        """Whether nothing was measured."""
        return not self.samples

    def add(self, round_number: int, variant: str, case: str, values: dict[str, float]) -> None:
        """Add one sample."""
        self.samples.append(Sample(round_number, variant, case, values))

    def cases(self, metric: str) -> list[str]:
        """The cases that have samples of ``metric``, in order."""
        return list(dict.fromkeys(sample.case for sample in self.samples if metric in sample.values))

    def values(self, metric: str, case: str, variant: str) -> dict[int, float]:
        """The samples of one metric in one case, by round."""
        found = (s for s in self.samples if (s.case, s.variant) == (case, variant) and metric in s.values)
        return {sample.round: sample.values[metric] for sample in found}

    def save(self, path: Path) -> None:
        """Write the run to a JSON file."""
        samples: dict[str, dict[str, dict[str, list[float | None]]]] = {}
        for sample in self.samples:
            of_engine = samples.setdefault(sample.case, {}).setdefault(sample.variant, {})
            for metric, value in zip(sample.values, rounded(sample.values.values()), strict=True):
                by_round = of_engine.setdefault(metric, [])
                by_round += [None] * (sample.round + 1 - len(by_round))
                by_round[sample.round] = value
        data = {field.name: getattr(self, field.name) for field in fields(self)}
        write(path, {"format": FORMATS[self.kind], **data, "machine": asdict(self.machine), "samples": samples})


def parse(path: Path, data: dict[str, Any]) -> EngineRun:
    """The run that :meth:`EngineRun.save` wrote, from its decoded JSON. Raises BadInput."""
    data.pop("summary", None)
    try:
        run = EngineRun(**data | {"machine": Machine(**data["machine"]), "samples": []})
        for case, variants in data["samples"].items():
            for variant, metrics in variants.items():
                for metric, by_round in metrics.items():
                    if variant not in run.variants or metric not in METRICS:
                        raise ValueError("a sample is of no known variant or metric")
                    for number, value in enumerate(by_round):
                        if value is None:
                            continue
                        if not 0 <= value < math.inf:
                            raise ValueError("a sample is not a number from 0 on")
                        run.add(number, variant, case, {metric: value})
        if run.is_empty():
            raise ValueError("it holds no samples")
        return run
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadInput(f"{path} is damaged: {type(error).__name__}: {error}") from error
