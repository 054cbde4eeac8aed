"""One GEMM for both projections on a GPU: as close to float64 as the two are, and never on a stale weight."""

import gc
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from gpu_layers import SHAPES, TOKENS

from vllm_gdn_plugin.decide.plan import FUSED, PADDED_TO

TOLERANCE = 1.05
"""The error against float64 may be at most this many times that of the two separate projections."""
LAYERS = 4
ROUNDED_TO = 2 * 2**20
"""Bytes: what PyTorch's allocator asks the GPU for is a multiple of this."""


@pytest.mark.parametrize("tensor_parallel_size", [1, 4])
@pytest.mark.parametrize("model", SHAPES)
def test_as_exact_as_serial(make_layer: Callable[..., Any], model: str, tensor_parallel_size: int) -> None:
    import torch

    from vllm_gdn_plugin.run.fused import FusedProjections

    hidden, qkvz, ba = SHAPES[model]
    sizes = [qkvz // tensor_parallel_size, ba // tensor_parallel_size]
    neighbour, layer = (make_layer((hidden, *sizes)) for _ in range(2))
    qkvz_before, ba_before = layer.in_proj_qkvz.weight.clone(), layer.in_proj_ba.weight.clone()
    beyond, fused = (FusedProjections(one.in_proj_qkvz, one.in_proj_ba, PADDED_TO) for one in (neighbour, layer))
    assert len(fused.rows) > 1
    assert fused.weight.data_ptr() + fused.weight.nbytes == beyond.weight.data_ptr()
    neighbour.in_proj_qkvz.weight.data.fill_(float("nan"))
    assert torch.equal(layer.in_proj_qkvz.weight, qkvz_before)
    assert torch.equal(layer.in_proj_ba.weight, ba_before)
    exact_weight = torch.cat([qkvz_before, ba_before]).double()
    for num_tokens in TOKENS:
        x = torch.randn(num_tokens, hidden, device="cuda", dtype=torch.bfloat16)
        exact = (x.double() @ exact_weight.T).split(sizes, dim=-1)
        two = layer.in_proj_qkvz(x)[0], layer.in_proj_ba(x)[0]
        for way in fused.rows:
            one = fused.apply(x, way).split([*sizes, fused.padding], dim=-1)
            for got, stock, want in zip(one, two, exact, strict=False):
                error, allowed = (got - want).norm(), (stock - want).norm()
                assert error <= TOLERANCE * allowed, f"{way}, {num_tokens} tokens: {error} against {allowed}"


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("layers", [1, 7])
@pytest.mark.parametrize("model", SHAPES)
def test_takes_hardly_more_memory_than_the_two_weights(
    make_layer: Callable[..., Any], model: str, layers: int, padded: bool
) -> None:
    """Also of the GPU's: vLLM loads with an allocator that does not split what is left by rounding."""
    import torch

    from vllm_gdn_plugin.run.fused import FusedProjections, release_replaced

    def held() -> int:
        gc.collect()
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved()

    before = held()
    torch.cuda.memory._set_allocator_settings("max_split_size_mb:20")
    try:
        made = [make_layer(SHAPES[model]) for _ in range(layers)]
        two = held() - before
        exact = sum(linear.weight.nbytes for layer in made for linear in (layer.in_proj_qkvz, layer.in_proj_ba))
        for layer in made:
            layer.gdn_fused = FusedProjections(layer.in_proj_qkvz, layer.in_proj_ba, PADDED_TO if padded else ())
        release_replaced()
        assert all(layer.gdn_fused.is_loaded() for layer in made)
        one = held() - before
    finally:
        torch.cuda.memory._set_allocator_settings("")
    rows = made[0].gdn_fused.rows
    assert (len(rows) > 1) == padded
    beyond = (max(rows.values()) - rows[FUSED]) * made[0].in_proj_ba.weight[0].nbytes
    print(f"{exact} bytes of weights: two each {two}, one each {one}, with {beyond} behind them")
    limit = beyond + max(layers * ROUNDED_TO // 2, ROUNDED_TO)
    assert one - exact <= limit, "each in an allocation of its own takes more"


def test_leaves_no_gaps_between_the_weights_of_a_model(vllm_config: Any) -> None:
    """Other layers' weights, a little smaller, are not laid into the place of a weight that was replaced."""
    import torch

    from vllm_gdn_plugin.run.fused import FusedProjections, release_replaced

    hidden, qkvz, ba = SHAPES["27B"]

    def linear(rows: int) -> Any:
        made = torch.nn.Linear(hidden, rows, bias=False, dtype=torch.bfloat16, device="cuda").requires_grad_(False)
        made.quant_method = SimpleNamespace(process_weights_after_loading=lambda layer: None)
        return made

    def gaps() -> int:
        gc.collect()
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved() - torch.cuda.memory_allocated()

    before, kept = gaps(), []
    for _ in range(LAYERS):
        release_replaced()
        fused = FusedProjections(linear(qkvz), linear(ba))
        kept += [fused, linear(qkvz * 7 // 8)]
    release_replaced()
    assert all(one.is_loaded() for one in kept[::2])
    assert gaps() - before <= (LAYERS + 1) * ROUNDED_TO


def test_a_weight_written_in_place_is_seen_and_a_moved_one_is_noticed(make_layer: Callable[..., Any]) -> None:
    import torch

    from vllm_gdn_plugin.run.fused import FusedProjections

    layer = make_layer(SHAPES["9B"])
    fused = FusedProjections(layer.in_proj_qkvz, layer.in_proj_ba)
    x = torch.randn(5, 4096, device="cuda", dtype=torch.bfloat16)
    before = fused.apply(x)
    layer.in_proj_ba.weight.data.mul_(2)
    assert torch.equal(fused.apply(x)[:, 12288:], before[:, 12288:] * 2)
    assert fused.why_broken(layer, x) is None
    layer.in_proj_ba.weight.data = layer.in_proj_ba.weight.data.clone()
    assert fused.why_broken(layer, x) is not None
