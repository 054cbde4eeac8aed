"""The plugin's own kernel for ``in_proj_ba``: as exact as cuBLAS's, the same bits at every call, taken where told."""

from collections.abc import Callable
from typing import Any

import pytest
from gpu_layers import SHAPES
from test_dual_stream import capture, context, op, quantized, same_bits, serial

from vllm_gdn_plugin.decide.plan import NARROW_KERNEL, NARROW_KERNEL_MAX_TOKENS

TOLERANCE = 1.001
"""Times cuBLAS's error against float64: two ways to add in float32 round a 16-bit output differently near a tie."""
TOKENS = (1, 2, 3, 4, 5, 7, NARROW_KERNEL_MAX_TOKENS, 13)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("tensor_parallel_size", [1, 4])
@pytest.mark.parametrize("model", SHAPES)
def test_as_exact_as_cublas_and_the_same_bits_at_every_call(model: str, tensor_parallel_size: int, dtype: str) -> None:
    import torch

    from vllm_gdn_plugin.run import narrow

    hidden, _, ba = SHAPES[model]
    torch.manual_seed(0)
    weight = (torch.randn(ba // tensor_parallel_size, hidden, device="cuda") * hidden**-0.5).to(getattr(torch, dtype))
    for num_tokens in TOKENS:
        x = torch.randn(num_tokens, hidden, device="cuda", dtype=weight.dtype)
        assert narrow.fits(x, weight)
        exact = x.double() @ weight.double().T
        found, cublas = narrow.linear(x, weight), torch.nn.functional.linear(x, weight)
        assert (found.shape, found.dtype, found.stride()) == (cublas.shape, cublas.dtype, cublas.stride())
        error, allowed = (found - exact).norm(), TOLERANCE * (cublas - exact).norm()
        assert error <= allowed, f"{num_tokens} tokens: {error} against {allowed}"
        for _ in range(20):
            assert torch.equal(narrow.linear(x, weight), found)


@pytest.mark.parametrize("hidden", [320, 1024, 1536])
def test_a_row_that_is_no_whole_number_of_blocks(hidden: int) -> None:
    import torch

    from vllm_gdn_plugin.run import narrow

    weight = torch.randn(7, hidden, device="cuda", dtype=torch.bfloat16)
    beyond = torch.full((1 << 16,), float("nan"), device="cuda", dtype=torch.bfloat16)  # what may lie behind a row
    x = beyond[: 5 * hidden].view(5, hidden).normal_()
    exact = x.double() @ weight.double().T
    assert (narrow.linear(x, weight) - exact).norm() <= 0.01 * exact.norm()


def test_what_does_not_fit() -> None:
    import torch

    from vllm_gdn_plugin.run import narrow

    weight, x = (torch.zeros(n, 2048, device="cuda", dtype=torch.bfloat16) for n in (64, 4))
    odd = torch.zeros(4 * 2048 + 1, device="cuda", dtype=torch.bfloat16)[1:].view(4, 2048)
    assert narrow.fits(x, weight)
    for wrong in (x.half(), x[:, ::2], x.T, x[0], odd):
        assert not narrow.fits(wrong, weight)
    assert not narrow.fits(x.float(), weight.float())
    assert not narrow.fits(x, weight.T)
    assert not narrow.fits(x.cpu(), weight)
    for wrong in (weight.float(), weight.T):
        with pytest.raises(ValueError, match="no kernel for"):
            narrow.prepare(wrong)
    with pytest.raises(ValueError, match="cpu"):  # Triton's own refusal
        narrow.prepare(weight.cpu())


@pytest.mark.parametrize("kind", ["fp8", "awq", "gptq"])
def test_the_op_takes_it_in_a_graph_of_a_size_that_was_timed_so(
    vllm_config: Any, make_layer: Callable[..., Any], kind: str
) -> None:
    """Nothing is compiled within the capture, and in_proj_qkvz is stock's, bit for bit."""
    import torch

    from vllm_gdn_plugin.run import narrow

    layer = make_layer(SHAPES["35B-A3B"], torch.bfloat16, quantized(kind))
    layer.gdn_tuned = dict.fromkeys(TOKENS, NARROW_KERNEL)
    narrow.prepare(layer.in_proj_ba.weight)
    for num_tokens in (*TOKENS, 6):
        x = torch.randn(num_tokens, 2048, device="cuda", dtype=torch.bfloat16)
        with context(vllm_config):
            assert same_bits(op(layer, x), serial(layer, x)), "outside a graph it is serial"
            graph, outputs = capture(lambda x=x: op(layer, x))
        for _ in range(3):
            x.normal_()
            for output in outputs:
                output.fill_(float("nan"))
            graph.replay()
            torch.cuda.synchronize()
            qkvz, ba = serial(layer, x)
            if num_tokens in TOKENS:
                ba = narrow.linear(x, layer.in_proj_ba.weight)
            assert same_bits(outputs, (qkvz, ba)), f"{num_tokens} tokens"
