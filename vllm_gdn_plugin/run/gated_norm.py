"""The gated RMSNorm behind the recurrence of a GDN layer, where the decode kernel has not done it: one Triton kernel.

vLLM has this norm in its compiled graph, and a function of its own for its packed branch. The latter takes 0.2 ms of a
slow CPU's time at each call, which a prefill outside of CUDA graphs has to wait for.
"""

from typing import Any

import torch
import triton
import triton.language as tl

HEADS, WARPS = 4, 2
"""Of a program. So a thread has 8 numbers side by side, which is what it loads at once: 74.8 us for a prefill of 8192
tokens of 27B on an H200, where 4 warps take 85.2."""

ALIGNED = 16
"""Bytes. Triton compiles for pointers that are multiples of it, or are not."""


@triton.jit(do_not_specialize=["heads"])  # type: ignore[untyped-decorator]
def _norm(  # type: ignore[no-untyped-def]
    core,
    mixed,
    weight,
    heads,
    row_stride,
    eps,
    GATE: tl.constexpr,  # column of the first gate
    HV: tl.constexpr,
    DIM: tl.constexpr,
    HEADS: tl.constexpr,
    SIGMOID: tl.constexpr,
):
    head = tl.program_id(0).to(tl.int64) * HEADS + tl.arange(0, HEADS)
    column = tl.arange(0, DIM)
    there = (head < heads)[:, None]
    place = core + head[:, None] * DIM + column[None, :]
    x = tl.load(place, mask=there, other=0.0).to(tl.float32)
    gate = mixed + (head // HV * row_stride + GATE + head % HV * DIM)[:, None] + column[None, :]
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
    """

    def __init__(self, eps: float, sigmoid: bool) -> None:
        self.eps, self.sigmoid = eps, sigmoid
        self.kept: tuple[object, Any] | None = None
        """What the last call was compiled for, besides this layer's constants, and the kernel. To launch it anew takes
        a fraction of the CPU's time in which Triton finds it."""

    def __call__(self, core: torch.Tensor, mixed: torch.Tensor, weight: torch.Tensor) -> None:
        """Run it.

        Args:
            core: (num_tokens, heads, dim), contiguous.
            mixed: (num_tokens, any + heads * dim), the gate in its last columns; rows of any stride.
            weight: (dim,), dim a power of two.
        """
        num_tokens, each, dim = core.shape
        heads, row_stride, gate = num_tokens * each, mixed.stride(0), mixed.shape[1] - each * dim
        arguments = (core, mixed, weight, heads, row_stride, self.eps, gate, each, dim, HEADS, self.sigmoid)
        grid = (triton.cdiv(heads, HEADS), 1, 1)
        is_aligned = (core.data_ptr() | mixed.data_ptr() | weight.data_ptr()) % ALIGNED == 0
        kind = (is_aligned, each, dim, row_stride, gate, core.dtype, mixed.dtype, weight.dtype, core.device)
        kept = self.kept
        if kept is not None and is_aligned and kept[0] == kind:
            kept[1][grid](*arguments)
            return
        compiled = _norm[grid](*arguments, num_warps=WARPS)
        self.kept = None if compiled is None else (kind, compiled)  # Triton's interpreter gives none
