"""What Qwen3-Next's projections give, in the order of Qwen3.5."""

from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from reference import DEVICE, DIM  # noqa: E402


@pytest.mark.parametrize("padding", [0, 24], ids=["apart", "fused"])
@pytest.mark.parametrize(("key_heads", "group"), [(1, 1), (2, 2), (3, 4), (2, 3)])
@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_each_part_of_all_key_heads_lies_together(tokens: int, key_heads: int, group: int, padding: int) -> None:
    from vllm_gdn_plugin.run.reorder import Reorder

    mixed, ba = projections(tokens, key_heads, group, padding)
    qkv, gates = Reorder(key_heads, key_heads * group, DIM)(mixed, ba)
    *parts, _ = mixed.unflatten(-1, (key_heads, -1)).split([DIM, DIM, group * DIM, group * DIM], dim=-1)
    assert torch.equal(qkv, torch.cat([part.flatten(1) for part in parts], dim=-1))
    assert torch.equal(gates, torch.cat([t.flatten(1) for t in ba.view(tokens, key_heads, 2, group).unbind(2)], dim=-1))


def test_rows_lie_a_multiple_of_16_numbers_apart() -> None:
    """Or Triton would store them one by one."""
    from vllm_gdn_plugin.run.reorder import Reorder

    qkv, gates = Reorder(1, 4, DIM)(*projections(3, 1, 4, 0))
    assert (qkv.stride(0) % 16, gates.stride()) == (0, qkv.stride())


def projections(tokens: int, key_heads: int, group: int, padding: int) -> tuple[Any, Any]:
    """As two GEMMs give them, or one GEMM with some columns more."""
    sizes = [2 * (1 + group) * key_heads * DIM, 2 * group * key_heads, padding]
    both = torch.randn(tokens, sum(sizes), dtype=torch.bfloat16, device=DEVICE).split(sizes, dim=-1)
    mixed, ba = (part if padding else part.contiguous() for part in both[:2])
    return mixed, ba
