"""The gated RMSNorm behind the recurrence of a GDN layer, where the decode kernel has not done it: one Triton kernel.

vLLM has this norm in its compiled graph, and a function of its own for its packed branch. The latter takes 0.2 ms of a
slow CPU's time at each call, which a prefill outside of CUDA graphs has to wait for.
"""

import torch
import triton
import triton.language as tl

from vllm_gdn_plugin.run.launch import Kept

HEADS, WARPS = 4, 2
"""Of a program. So a thread has 8 numbers side by side, which is what it loads at once: 74.8 us for a prefill of 8192
tokens of 27B on an H200, where 4 warps take 85.2."""


@triton.jit(do_not_specialize=["heads"])  # type: ignore[untyped-decorator]
def _norm(  # type: ignore[no-untyped-def]
    core,
    mixed,
    weight,
    heads,
    eps,
    row_stride,
    GATE: tl.constexpr,  # column of the first gate
    STEP: tl.constexpr,  # columns from the gates of one group to those of the next
    HV: tl.constexpr,
    GROUP: tl.constexpr,  # heads whose gates lie side by side
    DIM: tl.constexpr,
    HEADS: tl.constexpr,
    SIGMOID: tl.constexpr,
):
    head = tl.program_id(0).to(tl.int64) * HEADS + tl.arange(0, HEADS)
    column = tl.arange(0, DIM)
    there = (head < heads)[:, None]
    place = core + head[:, None] * DIM + column[None, :]
    x = tl.load(place, mask=there, other=0.0).to(tl.float32)
    first = head // HV * row_stride + head % HV // GROUP * STEP + GATE
    gate = mixed + (first + head % GROUP * DIM)[:, None] + column[None, :]
    z = tl.load(gate, mask=there, other=0.0).to(tl.float32)
    x *= tl.rsqrt(tl.sum(x * x, axis=1) / DIM + eps)[:, None]
    x *= tl.load(weight + column).to(tl.float32)[None, :]
    x *= tl.sigmoid(z) if SIGMOID else z * tl.sigmoid(z)
    tl.store(place, x.to(core.dtype.element_ty), mask=there)


class GatedNorm:
    """``core = core / rms(core) * weight * act(gate)`` for each head, in float32, in place.

    Args:
        eps: added to the mean of squares.
        sigmoid: whether act is the sigmoid; else it is SiLU.
        key_heads: where the gates lie by key head, the last of each one's columns: how many there are. Else 1.
    """

    def __init__(self, eps: float, sigmoid: bool, key_heads: int = 1) -> None:
        self.eps, self.sigmoid, self.key_heads = eps, sigmoid, key_heads
        self.launch = Kept(_norm, WARPS)

    def __call__(self, core: torch.Tensor, mixed: torch.Tensor, weight: torch.Tensor) -> None:
        """Run it.

        Args:
            core: (num_tokens, heads, dim), contiguous.
            mixed: (num_tokens, key_heads * (any + heads / key_heads * dim)), the gates last; rows of any stride.
            weight: (dim,), dim a power of two.
        """
        num_tokens, each, dim = core.shape
        heads, row_stride, group, step = (
            num_tokens * each,
            mixed.stride(0),
            each // self.key_heads,
            mixed.shape[1] // self.key_heads,
        )
        shape = row_stride, step - group * dim, step, each, group, dim
        arguments = (core, mixed, weight, heads, self.eps, *shape, HEADS, self.sigmoid)
        pointers = core.data_ptr() | mixed.data_ptr() | weight.data_ptr()
        kind = (shape, core.dtype, mixed.dtype, weight.dtype, core.device)
        self.launch((triton.cdiv(heads, HEADS), 1, 1), arguments, pointers, kind)
