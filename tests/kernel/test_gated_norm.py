"""The gated RMSNorm for what the decode kernel does not decode, against float64."""

import pytest
import torch

DIM = 128
EPS = 1e-6
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROUNDING = 2.5e-3 if DEVICE == "cuda" else 5e-3
"""To bfloat16, once. Triton's interpreter truncates."""


@pytest.mark.parametrize("sigmoid", [False, True], ids=["silu", "sigmoid"])
@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("tokens", "heads"), [(1, 1), (3, 5), (2, 4)])
def test_each_head_is_normalised_and_gated_in_place(
    tokens: int, heads: int, weight_dtype: torch.dtype, sigmoid: bool
) -> None:
    """At the first call and at later ones, which launch what the first has compiled; also for other rows in memory."""
    from vllm_gdn_plugin.run.gated_norm import GatedNorm

    torch.manual_seed(0)
    norm = GatedNorm(EPS, sigmoid)
    weight = torch.randn(DIM, device=DEVICE).to(weight_dtype)
    for num_tokens, more in ((tokens, 16), (tokens, 16), (tokens + 2, 16), (tokens, 5), (tokens, 16)):
        core = torch.randn(num_tokens, heads * DIM, dtype=torch.bfloat16, device=DEVICE)
        wide = torch.randn(num_tokens, 2 * heads * DIM + more, dtype=torch.bfloat16, device=DEVICE)
        mixed = wide[:, : 2 * heads * DIM]  # as a fused GEMM gives it
        x, z = (t.double().view(num_tokens, heads, DIM) for t in (core, mixed[:, heads * DIM :].contiguous()))
        want = x / (x.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * weight.double()
        want *= torch.sigmoid(z) * (1 if sigmoid else z)
        norm(core, mixed, weight)
        error = (core.double().view_as(want) - want).norm() / want.norm()
        assert error < ROUNDING


def test_a_head_of_zeros_stays_zeros() -> None:
    from vllm_gdn_plugin.run.gated_norm import GatedNorm

    core = torch.zeros(2, DIM, dtype=torch.bfloat16, device=DEVICE)
    GatedNorm(EPS, sigmoid=False)(core, torch.randn_like(core), torch.ones(DIM, device=DEVICE))
    assert not core.any()
