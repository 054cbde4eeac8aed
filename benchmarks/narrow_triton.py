"""`in_proj_ba` as a Triton kernel that splits K and adds the parts in a fixed order: the same bits at every call."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl


class Config(NamedTuple):
    """One way to cut the work into programs."""

    parts: int
    """Of K; more than one take a second kernel, which adds them up."""
    block_size: int
    """Rows of the weight in a program."""
    block_hidden: int
    """Columns of the weight that are loaded at once."""
    num_warps: int
    num_stages: int


CONFIGS = {
    "triton_1": Config(1, 16, 256, 4, 4),
    "triton_4": Config(4, 16, 256, 4, 3),
    "triton_8": Config(8, 32, 128, 4, 4),
    "triton_16": Config(16, 32, 128, 4, 3),
    "triton_20": Config(20, 16, 128, 2, 2),
}
BLOCK_TOKENS = 16
"""What a tensor core takes at least; fewer tokens are padded with zeros."""
MOST_BLOCK_TOKENS = 64
BLOCK_OUTPUTS = 256


@triton.jit
def _project_part(
    hidden_states,
    weight,
    parts,
    num_tokens,
    size,
    hidden,
    part_hidden,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
):
    """parts[p] = hidden_states @ weight.T over the p-th range of the hidden dimension, added up in float32."""
    token = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    row = tl.program_id(1) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    part = tl.program_id(2)
    total = tl.zeros((BLOCK_TOKENS, BLOCK_SIZE), tl.float32)
    for start in range(part * part_hidden, (part + 1) * part_hidden, BLOCK_HIDDEN):
        column = start + tl.arange(0, BLOCK_HIDDEN)
        x = tl.load(
            hidden_states + token[:, None] * hidden + column[None, :],
            mask=(token[:, None] < num_tokens) & (column[None, :] < hidden),
            other=0.0,
        )
        w = tl.load(
            weight + row[None, :] * hidden + column[:, None],
            mask=(row[None, :] < size) & (column[:, None] < hidden),
            other=0.0,
        )
        total += tl.dot(x, w)
    where = (part * num_tokens + token[:, None]) * size + row[None, :]
    tl.store(
        parts + where, total.to(parts.dtype.element_ty), mask=(token[:, None] < num_tokens) & (row[None, :] < size)
    )


@triton.jit
def _add_parts(parts, output, count, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """output = parts[0] + parts[1] + ..., in this order."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for part in range(PARTS):
        total += tl.load(parts + part * count + at, mask=at < count, other=0.0)
    tl.store(output + at, total.to(output.dtype.element_ty), mask=at < count)


def linear(config: Config, weight: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """Maps (num_tokens, hidden) to (num_tokens, size), as ``F.linear`` on ``weight`` (size, hidden) does."""
    size, hidden = weight.shape
    part_hidden = triton.cdiv(hidden, config.parts * config.block_hidden) * config.block_hidden
    count = triton.cdiv(hidden, part_hidden)  # rounding up may leave the last parts without work

    def project(hidden_states: torch.Tensor) -> torch.Tensor:
        num_tokens = len(hidden_states)
        block_tokens = min(MOST_BLOCK_TOKENS, max(BLOCK_TOKENS, triton.next_power_of_2(num_tokens)))
        output = hidden_states.new_empty((num_tokens, size))
        parts = output if count == 1 else hidden_states.new_empty((count, num_tokens, size), dtype=torch.float32)
        grid = (triton.cdiv(num_tokens, block_tokens), triton.cdiv(size, config.block_size), count)
        _project_part[grid](
            hidden_states,
            weight,
            parts,
            num_tokens,
            size,
            hidden,
            part_hidden,
            BLOCK_TOKENS=block_tokens,
            BLOCK_SIZE=config.block_size,
            BLOCK_HIDDEN=config.block_hidden,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
        if count > 1:
            outputs = num_tokens * size
            _add_parts[(triton.cdiv(outputs, BLOCK_OUTPUTS),)](
                parts, output, outputs, PARTS=count, BLOCK=BLOCK_OUTPUTS, num_warps=2
            )
        return output

    return project
