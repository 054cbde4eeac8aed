"""One GEMM for both projections on a GPU: as close to float64 as the two are, in one weight that takes hardly more."""

import gc
from collections.abc import Callable
from typing import Any

import pytest
from gpu_layers import SHAPES, TOKENS

TOLERANCE = 1.05
"""The error against float64 may be at most this many times that of the two separate projections."""
ROUNDED_TO = 2 * 2**20
"""Bytes: what PyTorch's allocator asks the GPU for is a multiple of this."""


def rows_to_choose_from(hidden: int, qkvz: int, ba: int) -> list[int]:
    from vllm_gdn_plugin.run import fused

    return fused.rows_to_choose_from(qkvz + ba, 2 * hidden)


@pytest.mark.parametrize("tensor_parallel_size", [1, 4])
@pytest.mark.parametrize("model", SHAPES)
def test_as_exact_as_serial(make_layer: Callable[..., Any], model: str, tensor_parallel_size: int) -> None:
    import torch

    from vllm_gdn_plugin.run.fused import FusedWeight

    hidden, qkvz, ba = SHAPES[model]
    sizes = [qkvz // tensor_parallel_size, ba // tensor_parallel_size]
    layer = make_layer((hidden, *sizes))
    linears = layer.in_proj_qkvz, layer.in_proj_ba
    weights = [linear.weight.clone() for linear in linears]
    exact_weight = torch.cat(weights).double()
    two = {}
    for num_tokens in TOKENS:
        x = torch.randn(num_tokens, hidden, device="cuda", dtype=torch.bfloat16)
        two[num_tokens] = x, [linear(x)[0] for linear in linears]
    for rows in rows_to_choose_from(hidden, *sizes):
        fused = FusedWeight(*linears, rows)
        assert fused.is_of(layer)
        assert all(torch.equal(linear.weight, weight) for linear, weight in zip(linears, weights, strict=True))
        for num_tokens, (x, stock) in two.items():
            exact = (x.double() @ exact_weight.T).split(sizes, dim=-1)
            got = fused.project(x)
            assert {one.stride(0) for one in got} == {rows}
            for ours, theirs, want in zip(got, stock, exact, strict=True):
                error, allowed = (ours - want).norm(), (theirs - want).norm()
                assert error <= TOLERANCE * allowed, f"{rows} rows, {num_tokens} tokens: {error} against {allowed}"


@pytest.mark.parametrize("most_rows", [False, True])
@pytest.mark.parametrize("tensor_parallel_size", [1, 4])
@pytest.mark.parametrize("model", SHAPES)
def test_takes_hardly_more_memory_than_the_two_weights(
    make_layer: Callable[..., Any],
    model: str,
    tensor_parallel_size: int,
    most_rows: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of the GPU's, too: vLLM loads with an allocator that does not split what is left by rounding, nor what the two
    weights leave, where a slightly smaller one comes next."""
    import torch

    from vllm_gdn_plugin.report import Record
    from vllm_gdn_plugin.run import engine

    def held() -> int:
        gc.collect()
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved()

    def taken(rows: int) -> int:
        return -(-rows * hidden * 2 // ROUNDED_TO) * ROUNDED_TO

    hidden, qkvz, ba = SHAPES[model]
    sizes = qkvz // tensor_parallel_size, ba // tensor_parallel_size
    rows = rows_to_choose_from(hidden, *sizes)[-1 if most_rows else 0]
    monkeypatch.setattr(engine, "rows_of", lambda *arguments: rows)
    others = sizes[0] * 15 // 16
    before, kept = held(), []
    torch.cuda.memory._set_allocator_settings("max_split_size_mb:20")
    try:
        for _ in range(7):
            layer = make_layer((hidden, *sizes))
            kept += [layer, engine.fuse(layer, Record(lambda: None), by_time=False)]
            kept += [torch.empty(others, hidden, dtype=torch.bfloat16, device="cuda")]
        one = held() - before - 7 * taken(others)
    finally:
        torch.cuda.memory._set_allocator_settings("")
    print(f"{rows} rows: {sum(sizes) * hidden * 2} bytes of weights take {one / 7}")
    assert one - 7 * taken(rows) <= ROUNDED_TO


@pytest.mark.parametrize("captured", [False, True])
def test_what_is_written_into_the_parameters_is_used(make_layer: Callable[..., Any], captured: bool) -> None:
    import torch
    from test_dual_stream import capture

    from vllm_gdn_plugin.run.fused import FusedWeight

    layer = make_layer(SHAPES["9B"])
    fused = FusedWeight(layer.in_proj_qkvz, layer.in_proj_ba, 12352)
    x = torch.randn(5, 4096, device="cuda", dtype=torch.bfloat16)
    graph, outputs = capture(lambda: fused.project(x)) if captured else (None, fused.project(x))
    if graph is not None:
        graph.replay()
    before = outputs[1].clone()
    layer.in_proj_ba.weight.data.mul_(2)
    if graph is None:
        outputs = fused.project(x)
    else:
        graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(outputs[1], 2 * before)
    assert fused.is_of(layer)


def test_a_replaced_weight_is_noticed_and_taken_back(make_layer: Callable[..., Any]) -> None:
    import torch

    from vllm_gdn_plugin.run.fused import FusedWeight

    layer = make_layer(SHAPES["9B"])
    fused = FusedWeight(layer.in_proj_qkvz, layer.in_proj_ba, 12352)
    x = torch.randn(5, 4096, device="cuda", dtype=torch.bfloat16)
    _, before = fused.project(x)
    layer.in_proj_ba.weight.data = 2 * layer.in_proj_ba.weight.data
    assert not fused.is_of(layer)
    assert torch.equal(fused.project(x)[1], before)
    assert fused.take_back(layer)
    assert fused.is_of(layer)
    assert torch.equal(fused.project(x)[1], 2 * before)
