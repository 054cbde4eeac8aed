"""What there is to time in a GDN layer: the one GEMM by its rows, and dual_stream against serial."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from itertools import cycle, islice
from typing import Any

import torch

from vllm_gdn_plugin.decide.decode import DecodeFacts
from vllm_gdn_plugin.decide.plan import DUAL_STREAM, SERIAL, LayerFacts
from vllm_gdn_plugin.run.decode import KERNEL, MOST_DECODED, STOCK
from vllm_gdn_plugin.run.dual_stream import MOST_OVERLAPPED, WAYS
from vllm_gdn_plugin.run.fused import rows_to_choose_from
from vllm_gdn_plugin.tune.choose import described, fastest, fastest_throughout
from vllm_gdn_plugin.tune.settle import case_of, kept, settled
from vllm_gdn_plugin.tune.timer import CudaTimer, timed
from vllm_gdn_plugin.tune.times import Case

CACHE_FILLS = 4
"""Weights that are timed in turn hold this many times what the GPU's cache holds: they come from memory."""

SCRATCH_BYTES = 256 * 2**20
"""Of recurrent states, to time the decode."""

ROWS_TIMED_TO = 256
"""Rows are chosen by the times of batches of up to so many tokens, at powers of two of them."""


def projections_case(facts: LayerFacts, hidden_size: int, device: str | None = None) -> Case:
    """What the times of a layer's projections depend on."""
    named = {
        "hidden_size": hidden_size,
        "qkvz": tuple(asdict(facts.qkvz).values()),
        "ba": tuple(asdict(facts.ba).values()),
        "quantization": facts.quantization,
        "batch_invariant": facts.batch_invariant,
    }
    return case_of("projections", named, WAYS, device)


def kept_ways_of(facts: LayerFacts, hidden_size: int, device: str) -> str:
    """What earlier starts on the GPU of that name have chosen for such layers, in a phrase; empty for nothing."""
    return described(fastest(kept(projections_case(facts, hidden_size, device)), DUAL_STREAM))


def rows_of(like: torch.Tensor, outputs: int, sizes: Sequence[int]) -> int:
    """How many rows the one weight of a layer has, for all batches: the fewest, or more where that was timed as faster.

    Timed on scratch weights: it is settled before the real one is allocated.

    Args:
        like: a weight (out, hidden_size) of the layer.
        outputs: of both projections.
        sizes: captured numbers of tokens; none where nothing may be timed.
    """
    hidden_size = like.shape[1]
    rows = rows_to_choose_from(outputs, hidden_size * like.itemsize)
    sizes = [n for n in sizes if n <= ROWS_TIMED_TO and n & (n - 1) == 0]
    if not sizes or len(rows) == 1:
        return rows[0]
    ways = [str(n) for n in rows]
    case = case_of("rows", {"hidden_size": hidden_size, "outputs": outputs, "dtype": str(like.dtype)}, ways)

    def measure(missing: list[int]) -> Any:
        own = _own_generator(like.device)
        weights = torch.randn(
            _count(hidden_size * outputs * like.itemsize),
            max(rows),
            hidden_size,
            dtype=like.dtype,
            device=like.device,
            generator=own,
        )

        def works(tokens: int) -> Mapping[str, Sequence[Any]]:
            x = torch.randn(tokens, hidden_size, dtype=like.dtype, device=like.device, generator=own)
            gemm = torch.nn.functional.linear
            return {way: [partial(gemm, x, weight[: int(way)]) for weight in weights] for way in ways}

        return timed(works, missing, 0, seconds=0.4)

    return int(fastest_throughout(settled(case, sizes, measure)[0], ways[0]))


def ways_of(
    layers: Sequence[Any], ready: Sequence[Any], facts: LayerFacts, sizes: Sequence[int]
) -> tuple[dict[int, str], str]:
    """dual_stream or serial for each captured number of tokens, and a phrase that tells it.

    Args:
        layers: loaded and alike.
        ready: those of them whose weights are as they will be used.
        facts: theirs.
        sizes: captured numbers of tokens; none where nothing may be timed.
    """
    hidden_size = layers[0].in_proj_qkvz.input_size
    sizes = [n for n in sizes if n <= MOST_OVERLAPPED]
    if not sizes or not ready:
        return {}, ""
    case = projections_case(facts, hidden_size)

    def measure(missing: list[int]) -> Any:
        weight_bytes = sum(parameter.nbytes for parameter in ready[0].in_proj_qkvz.parameters())
        different = ready[: _count(weight_bytes)]
        turns = list(islice(cycle(different), max(len(different), CudaTimer.min_layers)))
        weight = next(ready[0].in_proj_ba.parameters())
        own = _own_generator(weight.device)
        dtype = getattr(torch, facts.activation_dtype)

        def works(tokens: int) -> Mapping[str, Sequence[Any]]:
            x = torch.randn(tokens, hidden_size, dtype=dtype, device=weight.device, generator=own)
            return {way: [partial(run, layer, x) for layer in turns] for way, run in WAYS.items()}

        with torch.inference_mode():  # what vLLM would compile later at any rate is not on the timer's account
            for step in (missing[0], missing[-1]):
                works(step)[SERIAL][0]()
        return timed(works, missing, hidden_size)

    chosen_from, how = settled(case, sizes, measure)
    chosen = fastest(chosen_from, DUAL_STREAM)
    return chosen, f"{described(chosen)} ({how})" if chosen else ""


def decode_case(facts: DecodeFacts, value_heads: int, qkv: int, device: str | None = None) -> Case:
    """What the times of a layer's decode depend on; value heads, and channels of conv1d, are those of a rank."""
    named = {"decode": tuple(asdict(facts).values()), "heads": value_heads, "qkv": qkv}
    return case_of("decode", named, (STOCK, KERNEL), device)


def kept_decode_ways_of(facts: DecodeFacts, value_heads: int, qkv: int, device: str) -> str:
    """What earlier starts on the GPU of that name have chosen for such layers, in a phrase; empty for nothing."""
    return described(fastest(kept(decode_case(facts, value_heads, qkv, device)), STOCK))


def decode_ways_of(stock: Any, layer: Any, facts: DecodeFacts, sizes: Sequence[int]) -> tuple[dict[int, str], str]:
    """The decode kernel or vLLM's own for each captured number of tokens, and a phrase that tells it.

    Timed on scratch states; those of the steps in turn mostly do not fit the cache. Batches too large for
    :data:`SCRATCH_BYTES` are left out.

    Args:
        layer: one of those that are alike.
        sizes: captured numbers of tokens; none where nothing may be timed.
    """
    from vllm_gdn_plugin.run.proof import ScratchLayer  # needs Triton

    heads, dim = layer.A_log.shape[0], layer.head_v_dim
    slot_bytes = heads * dim * dim * layer.get_state_dtype()[1].itemsize
    slots = SCRATCH_BYTES // slot_bytes
    larger = " and more" if any(slots < n <= MOST_DECODED for n in sizes) else ""
    sizes = [n for n in sizes if n <= min(MOST_DECODED, slots)]
    if not sizes:
        return {}, ""
    case = decode_case(facts, heads, layer.conv1d.weight.shape[0])

    def measure(missing: list[int]) -> Any:
        scratch = ScratchLayer(layer, slots + 1, max(missing))
        out = scratch.empty_output()

        def works(tokens: int) -> Mapping[str, Sequence[Any]]:
            turns = min(CudaTimer.min_layers, slots // tokens)
            numbers = 1 + torch.arange(turns * tokens, dtype=torch.int32, device=out.device).view(turns, tokens)
            # Each row at an address that is a multiple of 16: for another Triton would compile all of it once more.
            each = torch.nn.functional.pad(numbers, (0, -tokens % 4))[:, :tokens]
            return {
                KERNEL: [partial(scratch.decode_by_kernel, indices, out) for indices in each],
                STOCK: [partial(scratch.decode_by_vllm, stock, indices, out) for indices in each],
            }

        with torch.inference_mode():  # Triton compiles at first: not on the timer's account
            for tokens in missing:
                for steps in works(tokens).values():
                    steps[0]()
        return timed(works, missing, 0)

    times, how = settled(case, sizes, measure)
    chosen = fastest(times, STOCK)
    return chosen, f"{described(chosen)}{larger} ({how})" if chosen else ""


def _own_generator(device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(0)  # the engine samples with the default one


def _count(weight_bytes: int) -> int:
    """How many weights to time in turn."""
    cache = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    return int(max(2, -(-CACHE_FILLS * cache // weight_bytes)))
