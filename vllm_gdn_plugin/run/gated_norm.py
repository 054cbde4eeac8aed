"""The gated RMSNorm behind the recurrence of a GDN layer, where the decode kernel has not done it: one Triton kernel.

vLLM has this norm in its compiled graph, and a function of its own for its packed branch. The latter takes 0.2 ms of a
slow CPU's time at each call, which a prefill outside of CUDA graphs has to wait for.
"""

import torch
import triton
import triton.language as tl

HEADS = 4
"""Heads of a program."""


@triton.jit(do_not_specialize=["heads"])  # type: ignore[untyped-decorator]
def _norm(  # type: ignore[no-untyped-def]
    core,
    gate,
    weight,
    heads,
    gate_stride,
    eps,
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
    z = tl.load(gate + (head // HV * gate_stride + head % HV * DIM)[:, None] + column[None, :], mask=there, other=0.0)
    z = z.to(tl.float32)
    x *= tl.rsqrt(tl.sum(x * x, axis=1) / DIM + eps)[:, None]
    x *= tl.load(weight + column).to(tl.float32)[None, :]
    x *= tl.sigmoid(z) if SIGMOID else z * tl.sigmoid(z)
    tl.store(place, x.to(core.dtype.element_ty), mask=there)


def gated_norm(core: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, eps: float, sigmoid: bool) -> None:
    """``core = core / rms(core) * weight * act(gate)`` for each head, in float32, in place.

    Args:
        core: (num_tokens, heads * dim), contiguous.
        gate: (num_tokens, heads * dim), rows of any stride.
        weight: (dim,), dim a power of two.
        eps: added to the mean of squares.
        sigmoid: whether act is the sigmoid; else it is SiLU.
    """
    num_tokens, size = core.shape
    dim = weight.shape[0]
    heads = num_tokens * (size // dim)
    _norm[(triton.cdiv(heads, HEADS),)](
        core,
        gate,
        weight,
        heads,
        gate.stride(0),
        eps,
        HV=size // dim,
        DIM=dim,
        HEADS=HEADS,
        SIGMOID=sigmoid,
        num_warps=HEADS,
    )
