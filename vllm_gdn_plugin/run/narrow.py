"""``in_proj_ba`` for a few tokens: a Triton kernel with a program for each output, whose threads share its sum."""

import torch
import triton
import triton.language as tl

MAX_BLOCK_TOKENS = 4
"""Tokens of one program: it reads a row of the weight once for all of them."""
BLOCK_HIDDEN = 1024
"""Columns that a program loads at once. The loop over them is unrolled, so that no load has to wait for another: with
this little to read, waiting for the memory is what takes the time."""
NUM_WARPS = 4
ALIGNMENT = 16
"""Bytes: Triton compiles another kernel for data that lie elsewhere, which :func:`prepare` does not do."""
DTYPES = (torch.bfloat16, torch.float16)


@triton.jit(do_not_specialize=["num_tokens", "size"])  # type: ignore[untyped-decorator]
def _project(  # type: ignore[no-untyped-def]
    hidden_states,
    weight,
    output,
    num_tokens,
    size,
    HIDDEN: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
):
    row = tl.program_id(0)
    token = tl.program_id(1) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    total = tl.zeros((BLOCK_TOKENS, BLOCK_HIDDEN), tl.float32)
    for start in tl.static_range(0, HIDDEN, BLOCK_HIDDEN):
        column = start + tl.arange(0, BLOCK_HIDDEN)
        there = column < HIDDEN
        x = tl.load(
            hidden_states + token[:, None] * HIDDEN + column[None, :],
            mask=(token < num_tokens)[:, None] & there[None, :],
            other=0.0,
        )
        w = tl.load(weight + row * HIDDEN + column, mask=there, other=0.0)
        total += x.to(tl.float32) * w.to(tl.float32)[None, :]
    result = tl.sum(total, axis=1).to(output.dtype.element_ty)
    tl.store(output + token * size + row, result, mask=token < num_tokens)


def fits(hidden_states: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether :func:`linear` takes these."""
    return (
        hidden_states.device == weight.device
        and hidden_states.dtype == weight.dtype
        and weight.dtype in DTYPES
        and hidden_states.dim() == weight.dim() == 2
        and hidden_states.is_contiguous()
        and weight.is_contiguous()
        and not (hidden_states.data_ptr() | weight.data_ptr()) % ALIGNMENT
    )


def linear(hidden_states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``F.linear(hidden_states, weight)``, summed in float32 and rounded once; the same bits at every call with
    so many tokens.

    Args:
        hidden_states: (num_tokens, hidden_size), contiguous.
        weight: (size, hidden_size), contiguous, of the same dtype, one of :data:`DTYPES`; see :func:`fits`.

    Raises ValueError where they do not fit, or what Triton raises.

    Returns:
        (num_tokens, size), contiguous, in that dtype.
    """
    if not fits(hidden_states, weight):
        told = [f"{t.dtype} {tuple(t.shape)} on {t.device} with strides {t.stride()}" for t in (hidden_states, weight)]
        raise ValueError(f"no kernel for {' and '.join(told)}")
    num_tokens, hidden_size = hidden_states.shape
    output = hidden_states.new_empty((num_tokens, weight.shape[0]))
    block_tokens = min(MAX_BLOCK_TOKENS, triton.next_power_of_2(num_tokens))
    _project[(weight.shape[0], triton.cdiv(num_tokens, block_tokens))](
        hidden_states,
        weight,
        output,
        num_tokens,
        weight.shape[0],
        HIDDEN=hidden_size,
        BLOCK_TOKENS=block_tokens,
        BLOCK_HIDDEN=BLOCK_HIDDEN,
        num_warps=NUM_WARPS,
    )
    return output


def prepare(weight: torch.Tensor) -> None:
    """Have the kernel compiled, and loaded, for ``weight`` and each number of tokens: within a capture it cannot be.

    Raises what :func:`linear` raises.
    """
    num_tokens = 1
    while num_tokens <= MAX_BLOCK_TOKENS:
        linear(weight.new_zeros((num_tokens, weight.shape[-1])), weight)
        num_tokens *= 2
