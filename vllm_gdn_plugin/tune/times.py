"""Which way is the fastest for each number of tokens, by the times of this very GPU, and where those are kept.

``auto`` plans a layer by rules. Where these leave a choice, the ways to run the layer are timed once for each batch
size for which vLLM captures a CUDA graph (:mod:`vllm_gdn_plugin.tune.ways`), and the times are kept for the next start.
"""

import hashlib
import json
import time
import weakref
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any
from uuid import uuid4

import vllm_gdn_plugin
from vllm_gdn_plugin import host
from vllm_gdn_plugin.decide.plan import (
    DUAL_STREAM,
    FUSED,
    NARROW_KERNEL,
    PADDED_TO,
    LayerFacts,
    ProjectionFacts,
    choices,
    choices_at,
)
from vllm_gdn_plugin.report import unexpected, warn_once

Times = dict[int, dict[str, float]]
"""Microseconds for one layer, by number of tokens and by way."""

NOISE = {FUSED: 0.01, DUAL_STREAM: 0.03}
"""Share of its time by which another way has to beat the planned one: graphs of the same work differ by so much at
most points, more where a projection is quantised, whose input lies elsewhere in each (benchmarks/NOTES.md)."""
TWO_STREAMS = 0.1
"""The same for two streams in place of one GEMM. Where they were 4 to 8 % faster when timed, some engines were faster
for it and some slower (benchmarks/NOTES.md), and they take a workspace of cuBLAS more."""


@dataclass(frozen=True)
class Case:
    """What the times depend on: the GPU, the versions, batch invariance, and layers of this shape and precision."""

    gpu: str
    driver: str
    torch: str
    vllm: str
    plugin: str
    hidden_size: int
    qkvz: ProjectionFacts
    ba: ProjectionFacts
    quantization: str
    batch_invariant: bool
    ways: tuple[str, ...]
    """What there is to choose from, the planned strategy first."""

    def file(self, directory: Path) -> Path:
        """Where the times of this case are kept below ``directory``."""
        return directory / f"{hashlib.sha256(repr(self).encode()).hexdigest()[:24]}.json"


def case_of(facts: LayerFacts, hidden_size: int, gpu: str) -> Case:
    """The case of a layer with these facts on the GPU of that name, with the installed versions."""
    import torch

    return Case(
        gpu,
        host.driver(),
        str(torch.__version__),
        host.version(),
        vllm_gdn_plugin.__version__,
        hidden_size,
        facts.qkvz,
        facts.ba,
        facts.quantization,
        facts.batch_invariant,
        choices(facts),
    )


def margin(planned: str, way: str) -> float:
    """The share of its time by which ``way`` has to beat the ``planned`` one."""
    return TWO_STREAMS if (planned, way) == (FUSED, DUAL_STREAM) else NOISE[planned]


def fastest(times: Times, ways: tuple[str, ...]) -> dict[int, str]:
    """The way for each number of tokens: the first of ``ways``, or where another beats it by its :func:`margin`, the
    fastest of all; one GEMM is first compared with itself padded, and the faster of these with the others."""
    planned = ways[0]
    chosen = {}
    for tokens, microseconds in sorted(times.items()):
        present = choices_at(ways, tokens)
        padded = [way for way in present if way in PADDED_TO]
        best = _unless_beaten(planned, planned, padded, microseconds)
        chosen[tokens] = _unless_beaten(best, planned, present, microseconds)
    return chosen


def _unless_beaten(way: str, planned: str, others: Iterable[str], microseconds: Mapping[str, float]) -> str:
    """``way``, or where another beats it by its margin over the ``planned`` one, the fastest of all."""
    limits = {other: microseconds[way] * (1 - margin(planned, other)) for other in others}
    beaten = any(microseconds[other] < limit for other, limit in limits.items())
    return min([way, *others], key=microseconds.__getitem__) if beaten else way


def described(chosen: Mapping[int, str]) -> str:
    """``dual_stream at 1 to 64 tokens, fused at 72 to 512 tokens, padded at 9 of 31 sizes``."""
    runs = [
        (way, [tokens for tokens, _ in run])
        for way, run in groupby(sorted(chosen.items()), key=lambda one: FUSED if one[1] in PADDED_TO else one[1])
    ]
    text = ", ".join(f"{way} at {_span(run)} token{'' if run == [1] else 's'}" for way, run in runs)
    padded = sum(way in PADDED_TO for way in chosen.values())
    return f"{text}, padded at {padded} of {len(chosen)} sizes" if padded else text


def _span(run: list[int]) -> str:
    return f"{run[0]} to {run[-1]}" if len(run) > 1 else str(run[0])


def recall(case: Case, directory: Path) -> Times:
    """The times that were kept for this case; none where there is no file, or one that cannot be used."""
    with suppress(Exception):
        kept = json.loads(case.file(directory).read_text(encoding="utf-8"))
        if kept["case"] == json.loads(json.dumps(asdict(case))):
            return {
                int(tokens): {way: float(microseconds[way]) for way in choices_at(case.ways, int(tokens))}
                for tokens, microseconds in kept["microseconds"].items()
            }
    return {}


def keep(case: Case, times: Times, directory: Path) -> None:
    """Keep the times for the next start, also while other ranks do the same. Raises OSError."""
    file = case.file(directory)
    directory.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(f".{uuid4().hex}")  # containers that share the directory may share process ids
    unfinished.write_text(json.dumps({"case": asdict(case), "microseconds": times}, indent=1), encoding="utf-8")
    unfinished.replace(file)


UNTIMED = "the ways to run the layers were not timed, auto goes by its rules alone"


class Tuner:
    """The layers of an engine for which the rules leave a choice, until they are loaded."""

    def __init__(self) -> None:
        self.waiting: dict[str, tuple[Callable[[], Any], Case, list[int]]] = {}
        """By name of the layer, which is only referred to: an engine that failed to load must not be kept in memory."""

    def add(self, layer: Any, facts: LayerFacts) -> tuple[str, ...]:
        """A layer has been planned by ``auto``. Returns the ways that will be timed, or were at an earlier start."""
        try:
            sizes = sorted(n for n in host.captured_sizes() if n <= layer.gdn_max_tokens)
            if sizes and choices(facts):
                case = case_of(facts, layer.in_proj_qkvz.input_size, host.gpu())
                self.waiting[layer.prefix] = (weakref.ref(layer), case, sizes)
                return case.ways
        except Exception as error:
            warn_once(UNTIMED, unexpected(error))
        return ()

    def run(self, last: Any) -> str:
        """Give every layer that was added ``gdn_tuned``, its ways by number of tokens, and say in a phrase what they
        are. Where timing fails the layers stay as planned, and a line says why.

        ``last`` is the layer whose loading is about to end: vLLM comes to a layer before its projections, so only the
        others' weights are as they will be used.
        """
        waiting, self.waiting = [(layer(), *rest) for layer, *rest in self.waiting.values()], {}
        phrases = []
        for case in dict.fromkeys(case for _, case, _ in waiting):
            alike = [(layer, sizes) for layer, its_case, sizes in waiting if its_case == case and layer is not None]
            layers = [layer for layer, _ in alike if layer.gdn_strategy == case.ways[0]]
            if not layers:
                continue
            try:
                chosen, how = _chosen(case, layers, last, alike[-1][1])
            except Exception as error:
                warn_once(UNTIMED, unexpected(error))
                continue
            for layer in layers:
                layer.gdn_tuned = chosen
            if chosen:
                phrases.append(f"{described(chosen)} ({how})")
        if any(
            {DUAL_STREAM, NARROW_KERNEL} & {*layer.gdn_tuned.values()} for layer, *_ in waiting if layer is not None
        ):
            try:  # after all cases: the timing of one gives back what another has prepared
                host.prepare_aux_stream()
            except Exception as error:
                warn_once("the second stream's workspace is left to the first capture", unexpected(error))
        return "; ".join(phrases)


def without_narrow_kernel(case: Case) -> Case:
    """The case where the plugin's own kernel does not run."""
    return replace(case, ways=tuple(way for way in case.ways if way != NARROW_KERNEL))


def _narrow_kernel_runs(layer: Any) -> bool:
    """Whether it does, of which a line tells if not. It is ready after it, also for a capture."""
    try:
        from vllm_gdn_plugin.run import narrow

        narrow.prepare(layer.in_proj_ba.weight)
    except Exception as error:
        warn_once(f"{NARROW_KERNEL} does not run here and is left out", unexpected(error))
        return False
    return True


def _chosen(case: Case, layers: list[Any], last: Any, sizes: list[int]) -> tuple[dict[int, str], str]:
    """The ways for these numbers of tokens, and when they were timed."""
    directory = host.tuning_directory()
    ready = [layer for layer in layers if layer is not last]
    times = recall(case, directory)
    missing = [tokens for tokens in sizes if tokens not in times]
    chosen = fastest({tokens: times[tokens] for tokens in sizes if tokens in times}, case.ways)
    to_be_timed = bool(missing and ready)
    needed = NARROW_KERNEL in (case.ways if to_be_timed else chosen.values())
    if needed and not _narrow_kernel_runs((ready or layers)[0]):
        return _chosen(without_narrow_kernel(case), layers, last, sizes)
    if not to_be_timed:
        return chosen, "timed at an earlier start"
    from vllm_gdn_plugin.tune.ways import timed

    began = time.perf_counter()
    times |= timed(ready, case, missing)
    how = f"timed in {time.perf_counter() - began:.1f} s"
    try:
        keep(case, times, directory)
    except OSError as error:
        warn_once("the times of the ways to run the layers are not kept for the next start", str(error))
    return fastest({tokens: times[tokens] for tokens in sizes if tokens in times}, case.ways), how


tuner = Tuner()
