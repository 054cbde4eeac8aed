"""What is timed, proven and chosen for the layers of an engine, or a pipeline stage, once all of them are loaded."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, TypeVar

import torch

from vllm_gdn_plugin.decide.plan import DUAL_STREAM
from vllm_gdn_plugin.host.process import has_peers
from vllm_gdn_plugin.report import Record, unexpected, warn_once
from vllm_gdn_plugin.run.decode import KERNEL, MOST_DECODED, Decode
from vllm_gdn_plugin.run.fused import FusedWeight
from vllm_gdn_plugin.run.timing import decode_ways_of, rows_of, ways_of
from vllm_gdn_plugin.tune.settle import UNTIMED

SLOWER = "vLLM's own decode was timed as fast at every size, or the times were too noisy to tell"

Chosen = TypeVar("Chosen")


def fuse(layer: Any, record: Record, by_time: bool) -> FusedWeight:
    """The one weight of a layer that has just been constructed."""
    qkvz, ba = layer.in_proj_qkvz, layer.in_proj_ba
    outputs = qkvz.weight.shape[0] + ba.weight.shape[0]
    record.rows = or_by_rule(partial(rows_of, qkvz.weight.data, outputs), record.sizes if by_time else ())
    fused = FusedWeight(qkvz, ba, record.rows)
    # Else a smaller weight of another layer would get all of what the old one leaves: while vLLM 0.30 and later load,
    # PyTorch splits no block of 20 MiB or more.
    torch.cuda.empty_cache()
    return fused


def settle_projections(records: Iterable[Record], last: Any, by_time: bool) -> str:
    """Give the layers that run dual_stream their ways by number of tokens, and say in a phrase what they are.

    ``last`` is the layer whose loading is about to end: vLLM comes to a layer before its projections, so only the
    others' weights are as they will be used.
    """
    phrases = []
    for group in _alike((r for r in records if r.strategy == DUAL_STREAM), lambda r: (r.facts, r.sizes)):
        layers, first = [record.layer() for record in group], group[0]
        assert first.facts is not None
        ready = [layer for layer in layers if layer is not last]
        ways, phrase = or_by_rule(partial(ways_of, layers, ready, first.facts), first.sizes if by_time else ())
        for layer in layers:
            layer.gdn.ways = ways
        phrases += [f"in CUDA graphs {phrase}"] if phrase else []
    return "; ".join(phrases)


def settle_decode(stock: Any, records: Iterable[Record], everywhere: bool) -> str:
    """Turn the decode kernel on for the layers that may have it, if it is right, and say in a phrase where it runs.

    Args:
        stock: vLLM's class of the layer.
        everywhere: whether it runs wherever it is right; else where it was timed as faster.
    """
    phrases = []
    for group in _alike((r for r in records if not r.no_kernel), lambda r: (r.decode_facts, r.sizes)):
        layer, first = group[0].layer(), group[0]
        assert first.decode_facts is not None
        try:
            why_not = _why_wrong(stock, layer)
        except Exception as error:
            why_not = unexpected(error)
        ways, phrase = {MOST_DECODED: KERNEL}, f"kernel at up to {MOST_DECODED} tokens"
        if not why_not and not everywhere:
            ways, phrase = or_by_rule(partial(decode_ways_of, stock, layer, first.decode_facts), first.sizes)
            if ways and KERNEL not in ways.values() and not has_peers():
                why_not = SLOWER
        for record in group:
            record.no_kernel = why_not
            if not why_not:
                record.decodes = True
                record.layer().gdn.decode = Decode(ways)
        phrases += [phrase] if phrase and not why_not else []
    return "; ".join(phrases)


def _why_wrong(stock: Any, layer: Any) -> str | None:
    from vllm_gdn_plugin.run.proof import why_wrong  # needs Triton, which vLLM has on a GPU

    try:
        return why_wrong(stock, layer)
    finally:
        torch.cuda.empty_cache()


def _alike(records: Iterable[Record], key: Callable[[Record], object]) -> list[list[Record]]:
    groups: dict[object, list[Record]] = {}
    for record in records:
        if record.layer() is not None:
            groups.setdefault(key(record), []).append(record)
    return list(groups.values())


def or_by_rule(choose: Callable[[tuple[int, ...]], Chosen], sizes: tuple[int, ...]) -> Chosen:
    """What is chosen by the times of these sizes; where timing fails a line says why, and the rules choose."""
    if sizes:
        try:
            return choose(sizes)
        except Exception as error:
            warn_once(UNTIMED, unexpected(error))
    return choose(())
