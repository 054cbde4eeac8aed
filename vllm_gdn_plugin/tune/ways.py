"""Times the ways to run loaded layers on this GPU."""

import statistics
import time
import traceback
from collections.abc import Callable
from functools import partial
from itertools import cycle, islice
from typing import Any

import torch

from vllm_gdn_plugin import host
from vllm_gdn_plugin.decide.plan import DUAL_STREAM, FUSED, NARROW_KERNEL, PADDED_TO, SERIAL, choices_at
from vllm_gdn_plugin.report import unexpected, warn_once
from vllm_gdn_plugin.run.dual_stream import fork, project_apart, project_ba_narrow, project_fused_apart
from vllm_gdn_plugin.tune.timer import CudaTimer, apart, one_after_the_other
from vllm_gdn_plugin.tune.times import Case, Times

SECONDS = 5.0
"""After this long no further number of tokens is timed: at the next start, the rest."""

WARM_UPS, ROUNDS = 1, 8
LAYERS = {FUSED: 8, DUAL_STREAM: CudaTimer.min_layers}
"""By planned strategy: how many share what it costs to start a graph, at the least. More where the input is quantised,
since that lies elsewhere in each of them (:func:`vllm_gdn_plugin.tune.timer.one_after_the_other`)."""
CACHE_FILLS = 4
"""The layers that are timed in turn hold this many times what the GPU's cache holds, if ``CudaTimer.min_layers`` of
them do: their weights come from memory."""


def timed(layers: list[Any], case: Case, sizes: list[int]) -> Times:
    """What :func:`_timed` gives; the memory that it took is given back, also where it fails."""
    try:
        return _timed(layers, case, sizes)
    except Exception as error:
        traceback.clear_frames(error.__traceback__)  # which hold the graphs
        raise
    finally:
        try:
            host.release_workspaces()
        except Exception as error:
            warn_once("the memory that timing the layers took is not given back", unexpected(error))


def _timed(layers: list[Any], case: Case, sizes: list[int]) -> Times:
    """Microseconds of one layer, the median of :data:`ROUNDS` interleaved rounds, each of several in one CUDA graph.

    Args:
        layers: loaded and alike.
        sizes: numbers of tokens, smallest first; timed in this order until :data:`SECONDS` have passed.
    """
    timer = CudaTimer()
    weight_bytes = sum(parameter.nbytes for parameter in layers[0].in_proj_qkvz.parameters())
    cache_bytes = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    count = min(timer.min_layers, max(4, CACHE_FILLS * cache_bytes // weight_bytes))
    different = apart(layers[:count])
    turns = list(islice(cycle(different), max(len(different), LAYERS[case.ways[0]])))
    ways = WAYS[case.ways[0]]
    dtype = getattr(torch, case.qkvz.dtype)
    device = layers[0].in_proj_ba.weight.device
    times: Times = {}
    own = torch.Generator(device).manual_seed(0)  # the engine samples with the default one
    with host.unchanged_stream(), torch.inference_mode():  # the latter as the engine: Dynamo would compile twice
        xs = {n: torch.randn(n, case.hidden_size, dtype=dtype, device=device, generator=own) for n in sizes}
        for tokens in (sizes[0], sizes[-1]):  # what vLLM would compile later at any rate is not on our account
            ways[SERIAL](layers[0], xs[tokens])
        host.prepare_aux_stream()
        end = time.perf_counter() + SECONDS
        for tokens, x in xs.items():
            if time.perf_counter() > end:
                break
            prepared = {
                way: timer.prepare(partial(one_after_the_other, ways[way], turns, x))[0]
                for way in choices_at(case.ways, tokens)
            }
            samples = timer.measure(prepared, ROUNDS, WARM_UPS)
            prepared.clear()  # a graph that ends later could give back the workspace of the next ones
            times[tokens] = {way: statistics.median(values) / len(turns) for way, values in samples.items()}
    return times


Way = Callable[[Any, torch.Tensor], object]


def _one_gemm(way: str, layer: Any, x: torch.Tensor) -> object:
    return layer.gdn_fused.apply(x, way)


WAYS: dict[str, dict[str, Way]] = {
    FUSED: {
        **{way: partial(_one_gemm, way) for way in (FUSED, *PADDED_TO)},
        DUAL_STREAM: lambda layer, x: project_fused_apart(layer, x, fork(layer, x)),
        SERIAL: lambda layer, x: project_fused_apart(layer, x, None),
    },
    DUAL_STREAM: {
        DUAL_STREAM: lambda layer, x: project_apart(layer, x, fork(layer, x)),
        NARROW_KERNEL: lambda layer, x: project_apart(layer, x, fork(layer, x), project_ba_narrow),
        SERIAL: lambda layer, x: project_apart(layer, x, None),
    },
}
"""By planned strategy: the ways in which the ops run such a layer."""
