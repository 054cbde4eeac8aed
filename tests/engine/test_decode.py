"""What a step of a layer with the decode kernel runs, on stand-ins that count; the kernel itself: tests/kernel."""

from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("vllm", reason="vllm isn't installed: run `python3.11 dev.py test`")

HEADS, DIM, QKV = 2, 128, 6 * 128
DECODE = {"spec_sequence_masks": None, "num_prefills": 0, "num_decodes": 3, "num_actual_tokens": 3}
ROWS = 4  # one more than the step has tokens


class Stock:
    """vLLM's class: its dry run is all that is called of it by name."""

    @staticmethod
    def _forward_core_fused_norm_packed(layer: Any, mixed_qkvz: Any, ba: Any, core_attn_out: Any) -> None:
        layer.calls.append("dry run")


def zeros(core_attn_out: Any) -> list[int]:
    """The rows that are zeros."""
    return [row for row, values in enumerate(core_attn_out) if not values.any()]


@pytest.fixture
def step(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`step(**metadata)` runs core and norm of a layer as the packed branch does, and gives what was called."""
    from vllm_gdn_plugin.run import decode

    calls: list[str] = []
    layer = SimpleNamespace(
        prefix="layer",
        calls=calls,
        conv1d=SimpleNamespace(weight=torch.empty(QKV, 1, 4)),
        A_log=torch.empty(HEADS),
        head_v_dim=DIM,
        gqa_interleaved_layout=False,
        kv_cache=(torch.empty(0), torch.empty(0)),
        split_ba=lambda ba: ba.chunk(2, dim=-1),
        gdn=SimpleNamespace(decode=decode.Decode()),
    )

    def forward_core(mixed_qkv: Any, b: Any, a: Any, core_attn_out: Any) -> None:
        run.zeros = zeros(core_attn_out)  # type: ignore[attr-defined]
        assert torch.equal(mixed_qkv, run.qkvz[:, :QKV])  # type: ignore[attr-defined]
        assert torch.equal(torch.cat([b, a], dim=-1), ba)
        run.contiguous = [b.is_contiguous(), a.is_contiguous()]  # type: ignore[attr-defined]
        calls.append("vLLM's core")

    def run_kernel(_: Any, qkvz: Any, b: Any, a: Any, conv: Any, ssm: Any, indices: Any, out: Any) -> None:
        if layer.fails:
            raise RuntimeError("planted by the test")
        assert {len(t) for t in (qkvz, b, a, indices, out)} == {DECODE["num_actual_tokens"]}
        assert out.isnan().all(), "nothing is written beforehand"
        out.fill_(1)
        calls.append("kernel")

    layer._forward_core, layer.fails = forward_core, False
    ba = torch.randn(ROWS, 2 * HEADS)
    monkeypatch.setattr(decode, "run_kernel", run_kernel)
    monkeypatch.setattr(decode, "normalise", lambda *_: calls.append("norm"))
    monkeypatch.setattr(decode, "new_counters", lambda *_: torch.zeros(8, dtype=torch.int32))
    monkeypatch.setattr(decode, "layer_by_name", lambda name: layer)

    def reorder(mixed_qkvz: Any, ba: Any) -> Any:
        calls.append("reorder")
        return mixed_qkvz.flip(-1)[:, :QKV], ba.flip(-1)

    layer.gdn.decode.reorder = reorder

    def run(piecewise: bool = False, interleaved: bool = False, **metadata: Any) -> list[str]:
        layer.gqa_interleaved_layout = interleaved
        calls.clear()
        found = SimpleNamespace(non_spec_state_indices_tensor=torch.arange(ROWS), **metadata) if metadata else None
        monkeypatch.setattr(decode, "attention_metadata", lambda _: found)
        monkeypatch.setattr(decode, "in_piecewise_graph", lambda: piecewise)
        qkvz, out = torch.randn(ROWS, QKV + HEADS * DIM), torch.full((ROWS, HEADS, DIM), torch.nan)
        run.qkvz = qkvz  # type: ignore[attr-defined]
        decode.run_core(Stock, layer, *((one.flip(-1) for one in (qkvz, ba)) if interleaved else (qkvz, ba)), out)
        run.zeros_at_last = zeros(out)  # type: ignore[attr-defined]
        decode.gdn_gated_norm(out, qkvz, "layer")
        return list(calls)

    run.layer = layer  # type: ignore[attr-defined]
    return run


def test_a_pure_decode_takes_the_kernel_which_normalises(step: Any) -> None:
    assert step(**DECODE) == ["kernel"]


@pytest.mark.parametrize(
    "change",
    [{"num_prefills": 1}, {"num_decodes": 0, "num_prefills": 2}, {"spec_sequence_masks": torch.ones(3)}],
    ids=["mixed", "prefill", "speculation"],
)
def test_all_else_takes_vllms_core_and_the_norm(step: Any, change: dict[str, Any]) -> None:
    assert step(**DECODE | change) == ["vLLM's core", "norm"]
    assert step(**DECODE) == ["kernel"]
    assert step(**DECODE | change) == ["vLLM's core", "norm"], "a step that was normalised says nothing of the next"


@pytest.mark.parametrize(
    ("change", "rows"),
    [
        ({"num_prefills": 1}, [3]),
        ({"num_prefills": 1, "num_actual_tokens": 4}, []),
        ({"num_prefills": 1, "spec_sequence_masks": torch.ones(3)}, [0, 1, 2, 3]),
        ({"num_decodes": 0}, [0, 1, 2, 3]),
        ({}, [0, 1, 2, 3]),
    ],
    ids=["prefill", "no padding", "speculation", "nothing to do", "a decode by vLLM's kernels"],
)
def test_zeros_are_written_where_vllms_code_may_write_nothing(
    step: Any, change: dict[str, Any], rows: list[int]
) -> None:
    step.layer.gdn.decode.ways = {4: "stock"}
    step(**DECODE | change)
    assert step.zeros == rows


def test_what_lies_by_key_head_is_put_in_order_for_vllms_code_alone(step: Any) -> None:
    """Also in a dry run, so that it is compiled by then. Here it lies the other way round."""
    assert step(interleaved=True) == ["reorder", "dry run", "norm"]
    assert step(interleaved=True, **DECODE) == ["kernel"]
    assert step(interleaved=True, **DECODE | {"num_prefills": 1}) == ["reorder", "vLLM's core", "norm"]


def test_the_kernel_gets_b_and_a_as_they_lie() -> None:
    from vllm_gdn_plugin.run.decode import as_it_lies

    layer = SimpleNamespace(
        A_log=torch.empty(6), head_v_dim=DIM, conv1d=SimpleNamespace(weight=torch.empty(10 * DIM, 1, 4))
    )
    layer.gqa_interleaved_layout, layer.split_ba = True, None
    b, a = as_it_lies(layer, torch.arange(24).view(2, 12))
    assert b[0].tolist() == [[0, 1, 2], [6, 7, 8]]
    assert a[1].tolist() == [[15, 16, 17], [21, 22, 23]]
    assert b.untyped_storage().data_ptr() == a.untyped_storage().data_ptr()


def test_the_kernel_writes_all_but_padding(step: Any) -> None:
    step(**DECODE)
    assert step.zeros_at_last == [3]
    step()
    assert step.zeros_at_last == [0, 1, 2, 3], "a dry run computes nothing"


def test_b_and_a_are_copied_where_they_lie_too_far_apart_for_vllms_kernel(
    step: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm_gdn_plugin.run import decode

    prefill = DECODE | {"num_prefills": 1}
    assert step(**prefill) == ["vLLM's core", "norm"]
    assert step.contiguous == [False, False]
    monkeypatch.setattr(decode, "INT32", ROWS * 2 * HEADS)
    assert step(**prefill) == ["vLLM's core", "norm"]
    assert step.contiguous == [True, True]


def test_in_piecewise_graphs_the_norm_is_captured_so_the_core_never_normalises(step: Any) -> None:
    assert step(piecewise=True, **DECODE) == ["vLLM's core", "norm"]


def test_a_dry_run_warms_vllms_kernels_up_and_captures_the_norm(step: Any) -> None:
    step(**DECODE)
    assert step() == ["dry run", "norm"]


def test_a_dry_run_after_a_core_whose_norm_never_came(step: Any) -> None:
    step.layer.gdn.decode.normalised = True
    assert step() == ["dry run", "norm"]


def test_sizes_that_were_timed_as_slower_take_vllms_own(step: Any) -> None:
    step.layer.gdn.decode.ways = {2: "kernel", 3: "stock", 8: "kernel"}
    assert step(**DECODE) == ["vLLM's core", "norm"]
    step.layer.gdn.decode.ways = {2: "stock", 8: "kernel"}
    assert step(**DECODE) == ["kernel"], "the next larger size that was timed"


def test_the_counters_come_with_the_first_step_never_in_a_capture(step: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before it, vLLM allocates what sleep mode gives away; within a capture, what belongs to the graph."""
    from vllm_gdn_plugin.run import decode

    assert step.layer.gdn.decode.counters is None
    monkeypatch.setattr(decode, "is_captured", lambda tensor: True)
    assert step(**DECODE) == ["vLLM's core", "norm"]
    monkeypatch.setattr(decode, "is_captured", lambda tensor: False)
    assert step() == ["dry run", "norm"]
    kept = step.layer.gdn.decode.counters
    assert step(**DECODE) == ["kernel"]
    assert step.layer.gdn.decode.counters is kept


def test_where_nothing_was_timed_few_tokens_take_it(step: Any) -> None:
    step()
    decode = step.layer.gdn.decode
    assert [n for n in (1, 16, 17, 512) if decode.takes(n)] == [1, 16]


def test_a_kernel_that_fails_is_left_out_for_good_and_said_once(step: Any, warnings: list[str]) -> None:
    step.layer.fails = True
    assert step(**DECODE) == ["vLLM's core", "norm"]
    step.layer.fails = False
    assert step(**DECODE) == ["vLLM's core", "norm"]
    (line,) = warnings
    assert "the decode kernel failed and is left out: unexpected RuntimeError: planted by the test" in line


def test_the_norm_op_says_what_it_changes() -> None:
    import vllm_gdn_plugin.run.decode  # noqa: F401

    schema = torch.ops.vllm_gdn_plugin.gdn_gated_norm.default._schema
    assert [argument.alias_info is not None for argument in schema.arguments] == [True, False, False]
    assert not schema.returns


@pytest.mark.parametrize("version_2", [False, True], ids=["as in vLLM", "as PyTorch has it by default"])
def test_compiled_it_normalises_the_very_buffer_that_the_core_has_filled(
    monkeypatch: pytest.MonkeyPatch, version_2: bool
) -> None:
    """No copy is made of what the core gave: functionalization and Inductor see that it may be changed."""
    import torch._inductor.config
    from vllm.utils.torch_utils import _encode_layer_name

    from vllm_gdn_plugin.run import decode

    core, weight = torch.randn(ROWS, HEADS, DIM), torch.randn(8, HEADS * DIM)
    layer = SimpleNamespace(gdn=SimpleNamespace(decode=decode.Decode()))
    layer.out_proj = lambda x: (torch.nn.functional.linear(x, weight), None)
    places = []

    def double(_: Any, core: Any, qkvz: Any) -> None:
        places.append(core.data_ptr())
        core.mul_(2)

    monkeypatch.setattr(decode, "normalise", double)
    monkeypatch.setattr(decode, "layer_by_name", lambda name: layer)

    want = torch.nn.functional.linear(2 * core.flatten(-2), weight)
    qkvz, name = torch.randn(ROWS, QKV + HEADS * DIM), _encode_layer_name("layer")
    for tensor in (core, qkvz):
        torch._dynamo.mark_dynamic(tensor, 0)
    try:
        with torch._inductor.config.patch(enable_auto_functionalized_v2=version_2):
            got = torch.compile(decode.output_projection, fullgraph=True)(layer, qkvz, core, name)
    finally:
        torch._dynamo.reset()
    assert torch.allclose(got, want, rtol=1e-5)
    assert places == [core.data_ptr()]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_the_forward_hands_both_projections_to_the_core_and_the_result_to_out_proj(
    step: Any, monkeypatch: pytest.MonkeyPatch, compiled: bool
) -> None:
    from vllm.model_executor.layers.mamba.gdn import qwen_gdn_linear_attn as host

    from vllm_gdn_plugin.run import decode

    layer, qkvz, ba = step.layer, torch.randn(ROWS, QKV + HEADS * DIM), torch.randn(ROWS, 2 * HEADS)
    layer.num_v_heads, layer.tp_size = 2 * HEADS, 2
    layer.out_proj = lambda x: (x * 2, None)

    def core(mixed_qkvz: Any, ba: Any, core_attn_out: Any) -> None:
        assert core_attn_out.shape == (ROWS, HEADS, DIM)
        assert torch.equal(mixed_qkvz, qkvz)
        core_attn_out.copy_((mixed_qkvz[:, QKV:] + ba.sum()).unflatten(-1, (HEADS, DIM)))

    layer._forward_core_fused_norm_packed = core
    context = SimpleNamespace(no_compile_layers={"layer": layer}, attn_metadata=None)
    monkeypatch.setattr(host, "get_forward_context", lambda: context)
    monkeypatch.setattr(decode, "normalise", lambda _, core, __: core.add_(1))
    try:
        forward = torch.compile(decode.forward_packed, fullgraph=True) if compiled else decode.forward_packed
        got = forward(layer, qkvz, ba)
    finally:
        torch._dynamo.reset()
    assert torch.allclose(got, 2 * (qkvz[:, QKV:] + ba.sum() + 1))


@pytest.mark.parametrize(
    ("split_at", "within"), [("as vLLM does", False), (["vllm::qwen_gdn_attention_core"], True), ([], False)], ids=str
)
def test_a_graph_that_is_split_elsewhere_is_seen(split_at: Any, within: bool) -> None:
    from vllm.config import VllmConfig, set_current_vllm_config

    from vllm_gdn_plugin.host import facts

    if not any("fused_norm_packed" in op for op in VllmConfig().compilation_config._attention_ops):
        pytest.skip("this release has no such op")
    config = VllmConfig()
    own = config.compilation_config._attention_ops
    config.compilation_config.splitting_ops = list(own) if split_at == "as vLLM does" else split_at
    of_layer = SimpleNamespace(
        platform="cuda",
        cuda_graphs=True,
        lora=False,
        batch_invariant=False,
        offload=False,
        ubatching=False,
        activation_dtype="bfloat16",
    )
    layer = SimpleNamespace(
        get_state_dtype=lambda: (torch.bfloat16, torch.float32),
        enable_packed_recurrent_decode=True,
        gqa_interleaved_layout=False,
        head_k_dim=DIM,
        head_v_dim=DIM,
        conv_kernel_size=4,
        conv1d=SimpleNamespace(bias=None),
        activation="silu",
        norm=SimpleNamespace(
            activation="silu", group_size=None, norm_before_gate=True, weight=SimpleNamespace(dtype=torch.float32)
        ),
    )
    with set_current_vllm_config(config):
        assert facts.decode_facts(layer, of_layer).core_within_graph is within  # type: ignore[arg-type]
