"""A decode step of a GDN layer, from the end of its projections to the start of ``out_proj``, as one Triton kernel.

It computes what vLLM computes for a pure decode batch with ``causal_conv1d_update`` (width 4, SiLU, no bias),
``fused_recurrent_gated_delta_rule_packed_decode`` (l2norm of q and k in the kernel) and the gated RMSNorm, and rounds
where they round: the conv's products and result, and the recurrence's output, to bfloat16.

A program has the whole state of a value head pass through its registers: read once, written once, and the head's
output is complete there, so that the norm needs no kernel of its own. Nearly all of the traffic is that state.

Two variants share the code and give the same bits. With few tokens every value head is a program of its own (``FEW``),
so that as much of the GPU as possible works. The value heads of a key head then read the same q and k channels, whose
conv state has to move on by a token, but not before all have read it: so they count, and the last one moves it. With
many tokens a program takes a key head with all of its value heads (``MANY``): q and k are read and convolved once,
nothing is counted, and the next rows of the state are on their way while these are worked on.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import triton
import triton.language as tl

from vllm_gdn_plugin.decide.decode import CONV_WIDTH, HEAD_DIM

WARPS = 4
"""Of a program. With more, two threads would hold the same channel of q or k."""
CHUNK_BYTES = 128
"""Of the 128 keys of a row of the state, what 8 threads load together, 16 bytes each. They add up their own products
before they exchange sums: 3 times a row, where 32 threads a row would do it 5 times, each for a quarter of the rows."""
ENOUGH_PROGRAMS = 128
"""Of MANY, to keep a GPU busy: about one for each of an H200's 132 multiprocessors. There a layer of 27B (16 key
heads, float32 state) takes, between its GEMMs, 13.5 us by FEW and 15.7 by MANY with 4 tokens, 23.0 and 22.0 with 8."""

_DIM = tl.constexpr(HEAD_DIM)
_TAPS = tl.constexpr(CONV_WIDTH)
_SCALE = tl.constexpr(HEAD_DIM**-0.5)


@dataclass(frozen=True)
class Variant:
    """How the work is spread over the GPU."""

    key_head: bool
    """A program takes a key head with all of its value heads, one after the other; else a single value head."""
    rows: int
    """Values of the recurrent state that a program works on at a time."""


FEW = Variant(key_head=False, rows=HEAD_DIM)
MANY = Variant(key_head=True, rows=32)


def variant_for(num_tokens: int, key_heads: int) -> Variant:
    """The faster variant for a batch of so many tokens and a layer with so many key heads (of this rank)."""
    return MANY if num_tokens * key_heads >= ENOUGH_PROGRAMS else FEW


def counters_for(num_tokens: int, key_heads: int, device: torch.device | str) -> torch.Tensor:
    """Zeros, int32, for :func:`decode` of up to ``num_tokens``. It leaves zeros. One call uses them at a time."""
    return torch.zeros(num_tokens * key_heads, dtype=torch.int32, device=device)


@triton.jit  # type: ignore[untyped-decorator]
def _rows_and_taps(  # type: ignore[no-untyped-def]
    state, weight, channel, there, ROW: tl.constexpr
):
    """The conv state of these channels, oldest first, and their weights."""
    rows = (
        tl.load(state + channel, there),
        tl.load(state + ROW + channel, there),
        tl.load(state + 2 * ROW + channel, there),
    )
    taps = (
        tl.load(weight + channel * _TAPS, there),
        tl.load(weight + channel * _TAPS + 1, there),
        tl.load(weight + channel * _TAPS + 2, there),
        tl.load(weight + channel * _TAPS + 3, there),
    )
    return rows, taps


@triton.jit
def _product(x, tap):  # type: ignore[no-untyped-def]
    """Rounded as vLLM's conv1d does it: bfloat16 times bfloat16 is bfloat16."""
    product = x.to(tl.float32) * tap.to(tl.float32)
    if tap.dtype == tl.bfloat16:
        product = product.to(tl.bfloat16).to(tl.float32)
    return product


@triton.jit
def _conv(rows, x, taps):  # type: ignore[no-untyped-def]
    """SiLU of conv1d, rounded to bfloat16 as vLLM stores it."""
    y = _product(rows[0], taps[0]) + _product(rows[1], taps[1]) + _product(rows[2], taps[2]) + _product(x, taps[3])
    y = y / (1 + tl.exp(-y))
    return y.to(tl.bfloat16).to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator]
def _shift(state, channel, there, rows, x, ROW: tl.constexpr):  # type: ignore[no-untyped-def]
    """The conv state a step later."""
    tl.store(state + channel, rows[1], there)
    tl.store(state + ROW + channel, rows[2], there)
    tl.store(state + 2 * ROW + channel, x, there)


@triton.jit
def _add(a0, b0, a1, b1):  # type: ignore[no-untyped-def]
    return a0 + a1, b0 + b1


# The one number here that changes while an engine serves must not have Triton compile again.
@triton.jit(do_not_specialize=["index_stride"])  # type: ignore[untyped-decorator]
def _decode(  # type: ignore[no-untyped-def]
    mixed_qkvz,
    b,
    a,
    conv_state,
    conv_weight,
    A_log,
    dt_bias,
    ssm_state,
    state_indices,
    norm_weight,
    out,
    counters,
    eps,
    qkvz_stride,
    b_stride,
    a_stride,
    index_stride,
    out_stride,
    CONV_SLOT: tl.constexpr,
    CONV_ROW: tl.constexpr,
    SSM_SLOT: tl.constexpr,
    BY_KEY_HEAD: tl.constexpr,  # mixed_qkvz, b and a have all of one key head side by side
    BA_STEP: tl.constexpr,  # columns of b, and of a, from one key head to the next
    H: tl.constexpr,
    HV: tl.constexpr,
    HEADS: tl.constexpr,  # value heads of a program
    PADDED_HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    SIGMOID: tl.constexpr,
):
    GROUP: tl.constexpr = HV // H  # value heads of a key head
    READERS: tl.constexpr = GROUP // HEADS  # programs that share q and k channels
    PROGRAMS: tl.constexpr = HV // HEADS
    PARTS: tl.constexpr = _DIM // ROWS
    TILES: tl.constexpr = HEADS * PARTS
    PADDED_TILES: tl.constexpr = PADDED_HEADS * PARTS
    CHUNKS: tl.constexpr = _DIM // KEYS  # the state's tile is (chunk, row, key): a thread gets all chunks of a key

    token = (tl.program_id(0) // PROGRAMS).to(tl.int64)
    first_head = tl.program_id(0) % PROGRAMS * HEADS
    key_head = first_head // GROUP
    slot = tl.load(state_indices + token * index_stride).to(tl.int64)

    # (head, value) of what goes in and out, (tile, row) of the same numbers in the loop.
    head = tl.arange(0, PADDED_HEADS)[:, None]
    wide = first_head * _DIM + head * _DIM + tl.arange(0, _DIM)[None, :]
    wide_there = (head < HEADS) & (wide >= 0)
    out += token * out_stride
    if slot <= 0:  # padding
        tl.store(out + wide, tl.zeros([PADDED_HEADS, _DIM], out.dtype.element_ty), wide_there)
        return

    row = tl.arange(0, ROWS)
    tile = tl.arange(0, PADDED_TILES)
    chunk = tl.arange(0, CHUNKS)
    key = tl.arange(0, KEYS)
    tile_there = tile < TILES
    tile_head = first_head + tile // PARTS
    value = first_head * _DIM + tile[:, None] * ROWS + row[None, :]
    value_there = tile_there[:, None] & (row >= 0)[None, :]

    q_channel = key_head * _DIM + chunk[:, None] * KEYS + key[None, :]
    k_channel = H * _DIM + q_channel
    v_channel = 2 * H * _DIM + value
    ssm_state += slot * SSM_SLOT + first_head * _DIM * _DIM
    ssm_state += row[None, :, None] * _DIM + chunk[:, None, None] * KEYS + key[None, None, :]
    if TILES > 1:
        state = tl.load(ssm_state)
    conv_state += slot * CONV_SLOT
    q_rows, q_taps = _rows_and_taps(conv_state, conv_weight, q_channel, None, CONV_ROW)
    k_rows, k_taps = _rows_and_taps(conv_state, conv_weight, k_channel, None, CONV_ROW)
    v_rows, v_taps = _rows_and_taps(conv_state, conv_weight, v_channel, value_there, CONV_ROW)
    rate = -tl.exp(tl.load(A_log + tile_head, tile_there).to(tl.float32))
    bias = tl.load(dt_bias + tile_head, tile_there).to(tl.float32)
    scale = tl.load(norm_weight + tl.arange(0, _DIM)).to(tl.float32)

    mixed_qkvz += token * qkvz_stride
    q_column, k_column, v_column = q_channel, k_channel, v_channel
    z_column = (2 * H + HV) * _DIM + wide
    if BY_KEY_HEAD:
        q_column += key_head * (1 + 2 * GROUP) * _DIM
        k_column = q_column + _DIM
        v_column = (key_head * (2 + GROUP) + 2) * _DIM + value
        z_column = (key_head * (2 + GROUP) + 2 + GROUP) * _DIM + wide
    q_in = tl.load(mixed_qkvz + q_column)
    k_in = tl.load(mixed_qkvz + k_column)
    v_in = tl.load(mixed_qkvz + v_column, value_there)
    ba_column = key_head * (BA_STEP - GROUP) + tile_head
    a_in = tl.load(a + token * a_stride + ba_column, tile_there).to(tl.float32)
    b_in = tl.load(b + token * b_stride + ba_column, tile_there).to(tl.float32)
    z = tl.load(mixed_qkvz + z_column, wide_there).to(tl.float32)
    if TILES == 1:  # all of the state: it comes after what conv1d waits for (27B, 1 token, H200: 8.0 us, before it 8.6)
        state = tl.load(ssm_state)

    q = _conv(q_rows, q_in, q_taps)
    k = _conv(k_rows, k_in, k_taps)
    v = _conv(v_rows, v_in, v_taps)
    # Both at a time: every exchange between warps makes all of them wait.
    q_squares, k_squares = tl.reduce(tl.reduce((q * q, k * k), 1, _add), 0, _add)
    q = (q / tl.sqrt(q_squares + 1e-6) * _SCALE)[:, None, :]
    k = (k / tl.sqrt(k_squares + 1e-6))[:, None, :]
    gate = a_in + bias
    decay = tl.exp(rate * tl.where(gate <= 20.0, tl.log(1.0 + tl.exp(gate)), gate))
    beta = tl.sigmoid(b_in)

    tl.debug_barrier()  # several threads may have to read a channel
    _shift(conv_state, v_channel, value_there, v_rows, v_in, CONV_ROW)
    last = True
    if READERS > 1:
        # Relaxed, since no program has to see what another wrote. But none may count before all of its threads have
        # read: so what it adds comes from a sum over all that they read.
        counter = counters + token * H + key_head
        last = tl.atomic_add(counter, tl.where(q_squares + k_squares < 0, 0, 1), sem="relaxed") == READERS - 1
        tl.store(counter, 0, last)
    _shift(conv_state, q_channel, last, q_rows, q_in, CONV_ROW)
    _shift(conv_state, k_channel, last, k_rows, k_in, CONV_ROW)

    o = tl.zeros([PADDED_TILES, ROWS], tl.float32)
    for t in tl.range(TILES, num_stages=1):
        here = tile == t
        h = state.to(tl.float32) * tl.sum(tl.where(here, decay, 0.0))
        if TILES > 1:
            state = tl.load(ssm_state + (t + 1) * ROWS * _DIM, t + 1 < TILES)
        new = tl.sum(tl.where(here[:, None], v, 0.0), 0) - tl.sum(tl.sum(h * k, 0), 1)
        new *= tl.sum(tl.where(here, beta, 0.0))
        h += new[None, :, None] * k
        o = tl.where(here[:, None], tl.sum(tl.sum(h * q, 0), 1)[None, :], o)
        tl.store(ssm_state + t * ROWS * _DIM, h.to(ssm_state.dtype.element_ty))

    o = tl.reshape(o, [PADDED_HEADS, _DIM]).to(tl.bfloat16).to(tl.float32)
    o *= tl.rsqrt(tl.sum(o * o, 1) / _DIM + eps)[:, None] * scale[None, :]
    if SIGMOID:
        o *= tl.sigmoid(z)
    else:
        o *= z * tl.sigmoid(z)
    tl.store(out + wide, o.to(out.dtype.element_ty), wide_there)


def decode(
    mixed_qkvz: torch.Tensor,
    b: torch.Tensor,
    a: torch.Tensor,
    conv_state: torch.Tensor,
    conv_weight: torch.Tensor,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    ssm_state: torch.Tensor,
    state_indices: torch.Tensor,
    norm_weight: torch.Tensor,
    out: torch.Tensor,
    counters: torch.Tensor,
    *,
    eps: float,
    gate: Literal["silu", "sigmoid"],
    variant: Variant,
) -> None:
    """One step of each token: changes ``out`` and, at its slot, ``conv_state`` and ``ssm_state``. No copies, no sync.

    H key heads, HV value heads (a multiple of H), qkv = (2 * H + HV) * 128. A token whose index is 0 or less is
    padding: its row of ``out`` is zeros, no state is touched. Two tokens of one call never share a slot.

    Args:
        mixed_qkvz: (num_tokens, qkv + HV * 128) bfloat16, [q | k | v | z] as ``in_proj_qkvz`` gives it; any row stride.
        b, a: (num_tokens, HV) bfloat16, as ``split_ba`` gives them; any row stride. Or (num_tokens, H, HV / H), of
            like strides between key heads: then mixed_qkvz has [q | k | v | z] of each key head in turn (Qwen3-Next).
        conv_state: (slots, 3 or more, qkv) bfloat16, the oldest input first, any strides but the last. Only the first
            three rows are used.
        conv_weight: (qkv, 4) bfloat16 or float32, contiguous.
        A_log: (HV,) float32.
        dt_bias: (HV,) float32 or bfloat16.
        ssm_state: (slots, HV, 128 values, 128 keys) float32 or bfloat16; a slot is contiguous, its stride is any.
        state_indices: (num_tokens,) int32, the slot of each token.
        norm_weight: (128,) bfloat16 or float32.
        out: (num_tokens, HV, 128) bfloat16, normalised and gated; any stride between tokens.
        counters: from :func:`counters_for`, on the same device; not shared by calls that may overlap. MANY leaves them
            alone.
        eps: of the norm.
        gate: its activation, applied to z.

    Raises ValueError for anything else, or what Triton raises. Source of the arithmetic: the three functions of vLLM
    that the module names.
    """
    num_tokens, value_heads = b.shape[0], b.shape[1:].numel()
    key_heads = (mixed_qkvz.shape[-1] // HEAD_DIM - 2 * value_heads) // 2
    by_key_head = b.dim() == 3
    qkv = (2 * key_heads + value_heads) * HEAD_DIM
    if key_heads < 1 or value_heads % key_heads:
        raise ValueError(
            f"decode takes mixed_qkvz of (2 * H + 2 * HV) * {HEAD_DIM} columns, where HV, the columns of b, is a "
            f"multiple of H: not {tuple(mixed_qkvz.shape)} with b {tuple(b.shape)}"
        )
    square, group = HEAD_DIM * HEAD_DIM, value_heads // key_heads
    of_heads = (key_heads, group) if by_key_head else (value_heads,)
    ba_step = b.stride(1) if by_key_head else group
    bf16, f32, i32 = torch.bfloat16, torch.float32, torch.int32
    for name, tensor, shape, dtypes, strides in (
        ("mixed_qkvz", mixed_qkvz, (num_tokens, qkv + value_heads * HEAD_DIM), (bf16,), (1,)),
        ("b", b, (num_tokens, *of_heads), (bf16,), (1,)),
        ("a", a, (num_tokens, *of_heads), (bf16,), (ba_step, 1) if by_key_head else (1,)),
        ("conv_state", conv_state, (conv_state.shape[0], max(CONV_WIDTH - 1, conv_state.shape[1]), qkv), (bf16,), (1,)),
        ("conv_weight", conv_weight, (qkv, CONV_WIDTH), (bf16, f32), (CONV_WIDTH, 1)),
        ("A_log", A_log, (value_heads,), (f32,), (1,)),
        ("dt_bias", dt_bias, (value_heads,), (bf16, f32), (1,)),
        (
            "ssm_state",
            ssm_state,
            (ssm_state.shape[0], value_heads, HEAD_DIM, HEAD_DIM),
            (bf16, f32),
            (square, HEAD_DIM, 1),
        ),
        ("state_indices", state_indices, (num_tokens,), (i32,), ()),
        ("norm_weight", norm_weight, (HEAD_DIM,), (bf16, f32), (1,)),
        ("out", out, (num_tokens, value_heads, HEAD_DIM), (bf16,), (HEAD_DIM, 1)),
        ("counters", counters, (max(num_tokens * key_heads, counters.numel()),), (i32,), (1,)),
    ):
        if (
            tensor.shape != shape
            or tensor.dtype not in dtypes
            or tensor.device != mixed_qkvz.device
            or tensor.stride()[len(shape) - len(strides) :] != strides
        ):
            raise ValueError(
                f"decode takes {name} of {' or '.join(map(str, dtypes))} {shape} on {mixed_qkvz.device}, its last "
                f"strides {strides}: not {tensor.dtype} {tuple(tensor.shape)} on {tensor.device} with strides "
                f"{tensor.stride()}"
            )
    if gate not in ("silu", "sigmoid"):
        raise ValueError(f"decode takes gate 'silu' or 'sigmoid': not {gate!r}")
    if not num_tokens:
        return

    heads = group if variant.key_head else 1
    _decode[(num_tokens * (value_heads // heads),)](
        mixed_qkvz,
        b,
        a,
        conv_state,
        conv_weight,
        A_log,
        dt_bias,
        ssm_state,
        state_indices,
        norm_weight,
        out,
        counters,
        eps,
        mixed_qkvz.stride(0),
        b.stride(0),
        a.stride(0),
        state_indices.stride(0),
        out.stride(0),
        CONV_SLOT=conv_state.stride(0),
        CONV_ROW=conv_state.stride(1),
        SSM_SLOT=ssm_state.stride(0),
        BY_KEY_HEAD=by_key_head,
        BA_STEP=ba_step,
        H=key_heads,
        HV=value_heads,
        HEADS=heads,
        PADDED_HEADS=triton.next_power_of_2(heads),
        ROWS=variant.rows,
        KEYS=CHUNK_BYTES // ssm_state.element_size(),
        SIGMOID=gate == "sigmoid",
        num_warps=WARPS,
    )
