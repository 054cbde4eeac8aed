"""The gated RMSNorm for what the decode kernel does not decode, against float64."""

from typing import Any

import pytest
import torch
from reference import DEVICE, DIM, INTERPRETED, error

EPS = 1e-6
ROUNDING = 5e-3 if INTERPRETED else 2.5e-3
"""To bfloat16, once. Triton's interpreter truncates."""


@pytest.mark.parametrize("sigmoid", [False, True], ids=["silu", "sigmoid"])
@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("tokens", "heads"), [(1, 1), (3, 5), (2, 4)])
def test_each_head_is_normalised_and_gated_in_place(
    tokens: int, heads: int, weight_dtype: torch.dtype, sigmoid: bool
) -> None:
    from vllm_gdn_plugin.run.gated_norm import GatedNorm

    core, mixed, weight = tensors(tokens, heads, weight_dtype)
    want = exact(core, mixed, weight, sigmoid)
    GatedNorm(EPS, sigmoid)(core, mixed, weight)
    assert error(core, want) < ROUNDING


def test_gates_that_lie_by_key_head() -> None:
    """The last columns of each key head's, three heads of it."""
    from vllm_gdn_plugin.run.gated_norm import GatedNorm

    core, mixed, weight = tensors(3, 6, torch.float32)
    gates = mixed[:, 6 * DIM :].unflatten(-1, (2, 3 * DIM))
    by_head = torch.cat([torch.full_like(gates, torch.nan), gates], dim=-1).flatten(1)
    want = exact(core, mixed, weight, False)
    GatedNorm(EPS, False, key_heads=2)(core, by_head, weight)
    assert error(core, want) < ROUNDING


def test_what_was_compiled_is_launched_again_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter compiles nothing: there a stand-in is what was compiled."""
    from vllm_gdn_plugin.run import gated_norm

    asked: list[Any] = []

    class Compiled:
        def __getitem__(self, grid: Any) -> Any:
            return lambda *arguments: kernel[grid](*arguments, num_warps=gated_norm.WARPS)

    class Kernel:
        def __getitem__(self, grid: Any) -> Any:
            asked.append(grid)
            return lambda *arguments, **how: kernel[grid](*arguments, **how) or Compiled()

    kernel = gated_norm._norm
    monkeypatch.setattr(gated_norm, "_norm", Kernel())
    norm = gated_norm.GatedNorm(EPS, sigmoid=False)

    def call(**how: Any) -> int:
        core, mixed, weight = tensors(**{"tokens": 3, "heads": 5, "weight_dtype": torch.float32} | how)
        want = exact(core, mixed, weight, False)
        asked.clear()
        norm(core, mixed, weight)
        assert error(core, want) < ROUNDING
        return len(asked)

    assert [call(), call(), call(tokens=7), call(tokens=1)] == [1, 0, 0, 0]
    for other in ({"padding": 5}, {"shift": 1}, {"weight_dtype": torch.bfloat16}, {"heads": 6}):
        assert [call(**other), call()] == [1, 1], other
    assert call() == 0


def tensors(
    tokens: int, heads: int, weight_dtype: torch.dtype, padding: int = 16, shift: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the core gave, what the projection gave, as a fused GEMM gives it, and the norm's weight."""
    torch.manual_seed(0)
    size = heads * DIM
    core = torch.randn(shift + tokens * size, dtype=torch.bfloat16, device=DEVICE)[shift:].view(tokens, heads, DIM)
    mixed = torch.randn(tokens, 2 * size + padding, dtype=torch.bfloat16, device=DEVICE)[:, : 2 * size]
    return core, mixed, torch.randn(DIM, device=DEVICE).to(weight_dtype)


def exact(core: torch.Tensor, mixed: torch.Tensor, weight: torch.Tensor, sigmoid: bool) -> torch.Tensor:
    x, z = (t.double().reshape(len(core), -1, DIM) for t in (core, mixed[:, core[0].numel() :]))
    want = x / (x.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * weight.double()
    return want * torch.sigmoid(z) * (1 if sigmoid else z)


def test_a_head_of_zeros_stays_zeros() -> None:
    from vllm_gdn_plugin.run.gated_norm import GatedNorm

    core = torch.zeros(2, 1, DIM, dtype=torch.bfloat16, device=DEVICE)
    GatedNorm(EPS, sigmoid=False)(core, torch.randn_like(core).flatten(-2), torch.ones(DIM, device=DEVICE))
    assert not core.any()
