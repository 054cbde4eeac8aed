"""The decode kernel against the recurrence in float64: outputs, both states, what it leaves alone, what it rejects."""

from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from reference import DEVICE, DIM, INTERPRETED, Step, error, make_step, nearest, reference, toward_zero  # noqa: E402

from vllm_gdn_plugin.run import decode_kernel  # noqa: E402
from vllm_gdn_plugin.run.decode_kernel import FEW, MANY, Variant, counters_for, decode, variant_for  # noqa: E402

ROUND = toward_zero if INTERPRETED else nearest
FLIPS = 1e-3
"""The error left when both sides are rounded to bfloat16: a few numbers, rounded to the other side."""
EPS = 1e-6
BF16, F32 = torch.bfloat16, torch.float32
HEADS = [(2, 2), (2, 6), (1, 4), (1, 8)]
VARIANTS = {"few": FEW, "many": MANY}
both_dtypes = pytest.mark.parametrize("state_dtype", [F32, BF16], ids=["float32", "bfloat16"])
each_variant = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)


def run(step: Step, variant: Variant = FEW, *, gate: str = "silu", counters: Any = None) -> torch.Tensor:
    """The output; the step's states are changed. Counters of its own are back at zero."""
    tokens, heads = step.b.shape[0], step.b.shape[1:].numel()
    out = torch.full((tokens, heads, DIM), torch.nan, dtype=BF16, device=DEVICE)
    key_heads = (step.conv_weight.shape[0] // DIM - heads) // 2
    used = counters_for(tokens, key_heads, DEVICE) if counters is None else counters
    decode(**vars(step), out=out, counters=used, eps=EPS, gate=gate, variant=variant)
    assert not used.any()
    return out


def before(step: Step) -> Step:
    return step.but(conv_state=step.conv_state.clone(), ssm_state=step.ssm_state.clone())


def check(step: Step, old: Step, out: torch.Tensor, gate: str = "silu") -> None:
    """Each token against float64 with vLLM's roundings; padding and all other slots as they were."""
    indices = step.state_indices.tolist()
    tokens = [token for token, slot in enumerate(indices) if slot > 0]
    touched = [indices[token] for token in tokens]
    true_out, true_conv, true_ssm = reference(old, tokens, eps=EPS, gate=gate, bf16=ROUND)
    for i, (token, slot) in enumerate(zip(tokens, touched, strict=True)):
        assert error(out[token], ROUND(true_out[i])) < FLIPS
        assert torch.equal(step.conv_state[slot, :3].double(), true_conv[i])
        assert error(step.ssm_state[slot], ROUND(true_ssm[i]) if step.ssm_state.dtype == BF16 else true_ssm[i]) < FLIPS
    assert not out[[token for token, slot in enumerate(indices) if slot <= 0]].any()
    others = [slot for slot in range(len(old.conv_state)) if slot not in touched]
    assert torch.equal(step.conv_state[others], old.conv_state[others])
    assert torch.equal(step.ssm_state[others], old.ssm_state[others])


@both_dtypes
@each_variant
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_outputs_and_states_of_a_batch(heads: tuple[int, int], variant: Variant, state_dtype: Any) -> None:
    """Padding and holes between the tokens, any order, the last slot, rows and slots that are apart in memory."""
    step = make_step(*heads, [3, 0, 5, -1, 1], slots=6, state_dtype=state_dtype, padding=16, device=DEVICE)
    old = before(step)
    check(step, old, run(step, variant))


@each_variant
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_projections_that_lie_by_key_head_give_the_same_bits(heads: tuple[int, int], variant: Variant) -> None:
    step = make_step(*heads, [3, 0, 1], slots=4, padding=16, device=DEVICE)
    other = before(step).but(**by_key_head(step, heads[0]))
    assert torch.equal(run(other, variant), run(step, variant))
    for name in ("conv_state", "ssm_state"):
        ours, theirs = (getattr(one, name).flatten(1).nan_to_num() for one in (other, step))
        assert torch.equal(ours, theirs)


def by_key_head(step: Step, key_heads: int) -> dict[str, torch.Tensor]:
    """The step's projections as Qwen3-Next has them, in the columns of one tensor."""
    tokens, value_heads = step.b.shape
    group = value_heads // key_heads
    wide = step.mixed_qkvz.split([key_heads * DIM] * 2 + [value_heads * DIM] * 2, dim=-1)
    parts = [part.unflatten(-1, (key_heads, -1)) for part in (*wide, step.b, step.a)]
    qkvz, ba = (torch.cat(some, dim=-1).flatten(1) for some in (parts[:4], parts[4:]))
    whole = torch.cat([qkvz, ba, torch.full_like(qkvz[:, :16], torch.nan)], dim=-1)
    b, a = whole[:, qkvz.shape[1] : -16].view(tokens, key_heads, 2, group).unbind(2)
    return {"mixed_qkvz": whole[:, : qkvz.shape[1]], "b": b, "a": a}


@pytest.mark.parametrize("gate", ["silu", "sigmoid"])
@pytest.mark.parametrize("parameter_dtype", [F32, BF16], ids=["float32", "bfloat16"])
def test_gates_and_parameters_of_either_dtype(parameter_dtype: Any, gate: str) -> None:
    step = make_step(2, 4, [1], slots=2, parameter_dtype=parameter_dtype, device=DEVICE)
    old = before(step)
    check(step, old, run(step, gate=gate), gate)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # the interpreter's: NumPy warns
def test_decay_of_large_gates() -> None:
    """Softplus is the identity beyond 20; its exponential overflows at 89."""
    step = make_step(1, 2, [1], slots=2, device=DEVICE)
    step = step.but(a=step.a + 100, A_log=step.A_log - 6)
    old = before(step)
    check(step, old, run(step))


@both_dtypes
@each_variant
def test_steps_in_a_row(variant: Variant, state_dtype: Any) -> None:
    """Six steps on the same states and counters, against float64 on states of its own."""
    indices = [2, 1]
    step = make_step(1, 3, indices, slots=3, state_dtype=state_dtype, parameter_dtype=BF16, device=DEVICE)
    true = step.but(conv_state=step.conv_state.double(), ssm_state=step.ssm_state.double())
    counters = counters_for(len(indices), 1, DEVICE)
    for seed in range(1, 7):
        inputs = make_step(1, 3, indices, slots=1, seed=seed, device=DEVICE)
        now = {"mixed_qkvz": inputs.mixed_qkvz, "b": inputs.b, "a": inputs.a}
        out = run(step.but(**now), variant, counters=counters)
        true_out, true.conv_state[indices], ssm = reference(true.but(**now), [0, 1], eps=EPS, gate="silu", bf16=ROUND)
        true.ssm_state[indices] = ROUND(ssm) if state_dtype == BF16 else ssm
        assert error(out, ROUND(true_out)) < FLIPS
    assert torch.equal(step.conv_state.double(), true.conv_state)
    assert error(step.ssm_state, true.ssm_state) < FLIPS


def test_a_token_has_the_same_bits_in_either_variant_alone_and_in_a_batch() -> None:
    batch = make_step(2, 6, [3, 0, 1], slots=4, device=DEVICE)
    old = before(batch)
    out = run(batch)
    for variant in VARIANTS.values():
        for token in (0, 2):
            row = slice(token, token + 1)
            alone = before(old).but(**{n: getattr(old, n)[row] for n in ("mixed_qkvz", "b", "a", "state_indices")})
            assert torch.equal(run(alone, variant)[0], out[token])
            slot = int(alone.state_indices)
            assert torch.equal(alone.ssm_state[slot], batch.ssm_state[slot])
            assert torch.equal(alone.conv_state[slot], batch.conv_state[slot])


def test_columns_of_wider_tensors() -> None:
    """Slots from a column of a block table, output into every other row, a conv state with rows for speculation."""
    step = make_step(2, 4, [1, 2], slots=3, device=DEVICE)
    old = before(step)
    table = torch.tensor([[1, 7], [2, 7]], dtype=torch.int32, device=DEVICE)
    conv_state = torch.cat([step.conv_state, step.conv_state[:, :2]], 1)
    step = step.but(state_indices=table[:, 0], conv_state=conv_state)
    rows = torch.full((4, 4, DIM), 7.0, dtype=BF16, device=DEVICE)
    decode(**vars(step), out=rows[::2], counters=counters_for(2, 2, DEVICE), eps=EPS, gate="silu", variant=FEW)
    check(step.but(conv_state=conv_state[:, :3]), old, rows[::2])
    assert (rows[1::2] == 7).all()
    assert torch.equal(conv_state[:, 3:], old.conv_state[:, :2])


def test_a_cache_of_more_than_2_31_elements() -> None:
    """Only the pages that are used take memory on a CPU."""
    step = make_step(1, 2, [1], slots=2, state_dtype=BF16, device=DEVICE)
    slots = 2**31 // step.ssm_state[0].numel() + 2
    last = torch.tensor([slots - 1], dtype=torch.int32, device=DEVICE)
    ssm_state = torch.empty(slots, 2, DIM, DIM, dtype=BF16, device=DEVICE)
    ssm_state[-1] = step.ssm_state[1]
    page = step.conv_state[0].numel()
    apart = 2**31 // (slots - 1) + page
    conv_state = torch.empty(slots * apart, dtype=BF16, device=DEVICE).as_strided(
        (slots, 3, page // 3), (apart, page // 3, 1)
    )
    conv_state[-1] = step.conv_state[1]
    old = before(step)
    out = run(step.but(state_indices=last, ssm_state=ssm_state, conv_state=conv_state))
    step.ssm_state[1], step.conv_state[1] = ssm_state[-1], conv_state[-1]
    check(step, old, out)


def test_no_tokens() -> None:
    step = make_step(2, 4, [1], slots=2, device=DEVICE)
    assert run(step.but(**{n: getattr(step, n)[:0] for n in ("mixed_qkvz", "b", "a", "state_indices")})).shape[0] == 0


def test_the_variant_of_a_batch() -> None:
    """MANY from the 128th key head on, and it leaves the counters alone."""
    assert [variant_for(n, 16) for n in (1, 7, 8, 512)] == [FEW, FEW, MANY, MANY]
    assert [variant_for(n, 4) for n in (16, 31, 32)] == [FEW, FEW, MANY]
    step = make_step(2, 4, [1], slots=2, device=DEVICE)
    old, counters = before(step), torch.full((2,), 7, dtype=torch.int32, device=DEVICE)
    out = torch.empty(1, 4, DIM, dtype=BF16, device=DEVICE)
    decode(**vars(step), out=out, counters=counters, eps=EPS, gate="silu", variant=MANY)
    check(step, old, out)
    assert (counters == 7).all()


def every_other(t: torch.Tensor) -> torch.Tensor:
    """The same shape, its last stride 2."""
    return torch.stack([t, t], -1)[..., 0]


WRONG: dict[str, Any] = {
    **{f"{name}-dtype": (name, lambda t: t.double()) for name in ("mixed_qkvz", "b", "a", "conv_state", "conv_weight")},
    **{
        f"{name}-dtype": (name, lambda t: t.double())
        for name in ("A_log", "dt_bias", "ssm_state", "norm_weight", "out")
    },
    "state_indices-dtype": ("state_indices", lambda t: t.long()),
    **{f"{name}-stride": (name, every_other) for name in ("mixed_qkvz", "b", "a", "conv_state", "conv_weight")},
    **{f"{name}-stride": (name, every_other) for name in ("A_log", "dt_bias", "ssm_state", "norm_weight", "out")},
    **{
        f"{name}-rows": (name, lambda t: t[:-1])
        for name in ("a", "conv_weight", "A_log", "dt_bias", "norm_weight", "out")
    },
    "state_indices-rows": ("state_indices", lambda t: t[:-1]),
    "conv_state-rows": ("conv_state", lambda t: t[:, :2]),
    "conv_state-channels": ("conv_state", lambda t: t[..., :-1]),
    "ssm_state-heads": ("ssm_state", lambda t: t[:, :-1]),
    "ssm_state-keys-first": ("ssm_state", lambda t: t.transpose(-1, -2)),
    "mixed_qkvz-columns": ("mixed_qkvz", lambda t: t[:, :-1]),
    "counters-few": ("counters", lambda t: t[:-1]),
    "counters-dtype": ("counters", lambda t: t.long()),
    "gate": ("gate", lambda _: "relu"),
}


@pytest.mark.parametrize(("name", "spoil"), WRONG.values(), ids=WRONG)
def test_what_does_not_fit_is_told_in_one_line(name: str, spoil: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_kernel, "_decode", None)  # nothing is launched
    step = make_step(2, 4, [1, 2], slots=3, device=DEVICE)
    out = torch.empty(2, 4, DIM, dtype=BF16, device=DEVICE)
    arguments: dict[str, Any] = {**vars(step), "out": out, "counters": counters_for(2, 2, DEVICE), "gate": "silu"}
    arguments[name] = spoil(arguments[name])
    with pytest.raises(ValueError, match=rf"^decode takes {name}[^\n]*$"):
        decode(**arguments, eps=EPS, variant=FEW)


def test_b_and_a_by_key_head_that_do_not_fit_one_another() -> None:
    step = make_step(2, 4, [1], slots=2, device=DEVICE)
    lying = by_key_head(step, 2)
    for wrong in (step.a, lying["a"].contiguous(), lying["a"][:, :, :1]):
        with pytest.raises(ValueError, match=r"^decode takes a of"):
            run(step.but(**lying | {"a": wrong}))


@pytest.mark.parametrize(("columns", "heads"), [(8, 8), (8, 4), (10, 3)])
def test_heads_that_are_not_shared_evenly(columns: int, heads: int) -> None:
    step = make_step(2, 4, [1], slots=2, device=DEVICE)
    wrong = step.but(mixed_qkvz=step.mixed_qkvz[:, : columns * DIM], b=torch.zeros(1, heads, dtype=BF16, device=DEVICE))
    with pytest.raises(ValueError, match="multiple of H"):
        run(wrong)
