"""What the projections of Qwen3-Next give, in the order of Qwen3.5, where the decode kernel does not read it as it is.

One Triton kernel. In vLLM the compiled graph does it, also where a batch only decodes.
"""

import torch
import triton
import triton.language as tl

from vllm_gdn_plugin.run.launch import Kept

WARPS = 2


@triton.jit  # type: ignore[untyped-decorator]
def _reorder(  # type: ignore[no-untyped-def]
    mixed,
    ba,
    out,
    mixed_stride,
    ba_stride,
    out_stride,
    H: tl.constexpr,
    GROUP: tl.constexpr,  # value heads of a key head
    DIM: tl.constexpr,
    PADDED_PARTS: tl.constexpr,
    PADDED_GATES: tl.constexpr,
):
    """A program for each token and key head."""
    token, key_head = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    out += token * out_stride
    part, column = tl.arange(0, PADDED_PARTS)[:, None], tl.arange(0, DIM)[None, :]  # q, k, and the heads of v
    there = (part < 2 + GROUP) & (column >= 0)
    x = tl.load(mixed + token * mixed_stride + (key_head * (2 + 2 * GROUP) + part) * DIM + column, there)
    head = tl.where(part < 2, part * H + key_head, 2 * H + key_head * GROUP + part - 2)
    tl.store(out + head * DIM + column, x, there)
    n = tl.arange(0, PADDED_GATES)  # b and a of each head
    x = tl.load(ba + token * ba_stride + key_head * 2 * GROUP + n, n < 2 * GROUP)
    place = (2 + GROUP) * H * DIM + n // GROUP * H * GROUP + key_head * GROUP + n % GROUP
    tl.store(out + place, x, n < 2 * GROUP)


class Reorder:
    """[q | k | v] and [b | a] of what lies by key head: [q | k | v | z] and [b | a] of the first, then of the second...

    Args:
        key_heads, value_heads: of this rank.
        dim: of a head, a power of two.
    """

    def __init__(self, key_heads: int, value_heads: int, dim: int) -> None:
        group = value_heads // key_heads
        self.key_heads, self.qkv = key_heads, (2 * key_heads + value_heads) * dim
        self.end = self.qkv + 2 * value_heads
        # Triton loads and stores many at a time where the rows' stride is a multiple of 16 elements.
        self.columns = -(-self.end // 16) * 16
        padded = triton.next_power_of_2(2 + group), triton.next_power_of_2(2 * group)
        self.constants = (key_heads, group, dim, *padded)
        self.launch = Kept(_reorder, WARPS)

    def __call__(self, mixed: torch.Tensor, ba: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Views (num_tokens, (2 * key_heads + value_heads) * dim) and (num_tokens, 2 * value_heads) of one new tensor.

        Args:
            mixed: (num_tokens, 2 * (key_heads + value_heads) * dim); rows of any stride.
            ba: (num_tokens, 2 * value_heads), of the same dtype; rows of any stride.
        """
        num_tokens = len(ba)
        out = mixed.new_empty(num_tokens, self.columns)
        if num_tokens:
            strides = mixed.stride(0), ba.stride(0), self.columns
            pointers = mixed.data_ptr() | ba.data_ptr() | out.data_ptr()
            arguments = (mixed, ba, out, *strides, *self.constants)
            self.launch((num_tokens * self.key_heads, 1, 1), arguments, pointers, (strides, mixed.dtype, mixed.device))
        return out[:, : self.qkv], out[:, self.qkv : self.end]
