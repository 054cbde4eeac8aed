"""The kernel proves itself: it is trusted where a host that computes the same agrees, and nowhere else."""

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from reference import DEVICE, DIM

from vllm_gdn_plugin.decide.contract import GDN_CLASSES

pytest.importorskip("vllm", reason="the plugin's ops are registered with vLLM's help")

HEADS, KEY_HEADS = 4, 2
QKV = (2 * KEY_HEADS + HEADS) * DIM


class Stock:
    """vLLM's decode, written out in float32; and how it orders what lies by key head."""

    decay = 1.0

    @classmethod
    def _forward_core_decode_non_spec(
        cls, layer: Any, mixed_qkv: Any, b: Any, a: Any, core_attn_out: Any, attn_metadata: Any
    ) -> None:
        weight = layer.conv1d.weight.float().view(QKV, 4)
        for token, slot in enumerate(attn_metadata.non_spec_state_indices_tensor.tolist()):
            if slot <= 0:
                continue
            conv, state = layer.kv_cache[0][slot], layer.kv_cache[1][slot]
            taps = torch.cat([conv, mixed_qkv[token, None]])
            y = torch.nn.functional.silu((taps.float() * weight.T).sum(0)).bfloat16().float()
            conv.copy_(taps[1:].clone())
            mixed_qkv[token] = y.bfloat16()  # as vLLM does
            q, k, v = y[: KEY_HEADS * DIM], y[KEY_HEADS * DIM : 2 * KEY_HEADS * DIM], y[2 * KEY_HEADS * DIM :]
            q, k = (t.view(KEY_HEADS, DIM) for t in (q, k))
            q, k = (t / (t.pow(2).sum(-1, keepdim=True) + 1e-6).sqrt() for t in (q, k))
            q, k = (t.repeat_interleave(HEADS // KEY_HEADS, 0) for t in (q * DIM**-0.5, k))
            gate = torch.nn.functional.softplus(a[token].float() + layer.dt_bias.float())
            h = state.float() * (cls.decay * -layer.A_log.exp() * gate).exp()[:, None, None]
            new = (v.view(HEADS, DIM) - (h * k[:, None]).sum(-1)) * b[token].float().sigmoid()[:, None]
            h += new[:, :, None] * k[:, None]
            state.copy_(h)
            core_attn_out[token] = (h * q[:, None]).sum(-1)

    @staticmethod
    def fix_query_key_value_ordering(layer: Any, mixed_qkvz: Any, mixed_ba: Any) -> Any:
        from vllm.model_executor.layers.mamba.gdn import qwen_gdn_linear_attn as host

        stock = getattr(host, GDN_CLASSES[host.__name__])
        return stock.fix_query_key_value_ordering(layer, mixed_qkvz, mixed_ba)

    @staticmethod
    def _rms_norm_gated_cuda(layer: Any, x: Any, output_gate: Any, out: Any) -> None:
        y = x.float() / (x.float().pow(2).mean(-1, keepdim=True) + layer.norm.eps).sqrt() * layer.norm.weight
        out.copy_(y * torch.nn.functional.silu(output_gate.float()))


def make_layer(state_dtype: torch.dtype, rows: int | None, interleaved: bool = False) -> Any:
    """What the proof asks of a layer; with `rows` it is fused."""
    fused = None if rows is None else SimpleNamespace(weight=torch.empty(rows, 1))
    return SimpleNamespace(
        A_log=torch.empty(HEADS, device=DEVICE),
        dt_bias=torch.empty(HEADS, dtype=torch.bfloat16, device=DEVICE),
        conv1d=SimpleNamespace(weight=torch.empty(QKV, 1, 4, dtype=torch.bfloat16, device=DEVICE)),
        norm=SimpleNamespace(weight=torch.empty(DIM, device=DEVICE), eps=1e-6, activation="silu"),
        head_k_dim=DIM,
        head_v_dim=DIM,
        num_k_heads=2 * KEY_HEADS,
        num_v_heads=2 * HEADS,
        tp_size=2,
        gqa_interleaved_layout=interleaved,
        gdn=SimpleNamespace(fused=fused),
        get_state_dtype=lambda: (torch.bfloat16, state_dtype),
    )


def test_trusted_where_the_host_agrees_also_on_a_fused_layer_s_strides() -> None:
    from vllm_gdn_plugin.run.proof import why_wrong

    assert why_wrong(Stock, make_layer(torch.bfloat16, QKV + HEADS * DIM + 2 * HEADS + 8)) is None


def test_trusted_with_what_lies_by_key_head_where_the_host_orders_it_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_gdn_plugin.run import reorder
    from vllm_gdn_plugin.run.proof import why_wrong

    layer = make_layer(torch.float32, QKV + HEADS * DIM + 2 * HEADS + 8, interleaved=True)
    assert why_wrong(Stock, layer) is None

    class OtherOrder(Stock):
        @staticmethod
        def fix_query_key_value_ordering(layer: Any, mixed_qkvz: Any, mixed_ba: Any) -> Any:
            q, k, *rest = Stock.fix_query_key_value_ordering(layer, mixed_qkvz, mixed_ba)
            return k, q, *rest

    assert "its output differs" in (why_wrong(OtherOrder, layer) or "")
    stock_order = reorder.Reorder.__call__
    monkeypatch.setattr(reorder.Reorder, "__call__", lambda *args: tuple(t.flip(-1) for t in stock_order(*args)))
    assert "what runs beside it differs" in (why_wrong(Stock, layer) or "")


@pytest.mark.parametrize("interleaved", [False, True], ids=["flat", "interleaved"])
def test_what_is_proven_and_timed_has_the_rows_of_the_layers_projections(interleaved: bool) -> None:
    from vllm_gdn_plugin.run.proof import ScratchLayer

    rows = QKV + HEADS * DIM + 2 * HEADS + 8
    fused = ScratchLayer(make_layer(torch.float32, rows, interleaved), 3, 2)
    assert (fused.qkvz.stride(0), fused.ba.stride(0)) == (rows, rows)
    apart = ScratchLayer(make_layer(torch.float32, None, interleaved), 3, 2)
    assert apart.qkvz.is_contiguous()
    assert apart.ba.is_contiguous()


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the second variant is proven with a batch that an interpreter gets through."""
    from vllm_gdn_plugin.run import decode_kernel, proof

    for module in (decode_kernel, proof):
        monkeypatch.setattr(module, "ENOUGH_PROGRAMS", 12)


def test_both_variants_are_proven(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_gdn_plugin.run import decode_kernel, proof

    proven = set()
    variant_for = decode_kernel.variant_for

    def noting(num_tokens: int, key_heads: int) -> Any:
        proven.add(variant_for(num_tokens, key_heads))
        return variant_for(num_tokens, key_heads)

    monkeypatch.setattr(decode_kernel, "variant_for", noting)
    assert proof.why_wrong(Stock, make_layer(torch.float32, None)) is None
    assert proven == {decode_kernel.FEW, decode_kernel.MANY}


def test_not_trusted_where_the_host_computes_something_else() -> None:
    from vllm_gdn_plugin.run.proof import why_wrong

    class Other(Stock):
        decay = 1.05

    reason = why_wrong(Other, make_layer(torch.float32, None))
    assert reason is not None
    assert "differs from vLLM's by" in reason


def test_the_norm_beside_the_kernel_is_proven_too(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_gdn_plugin.run import gated_norm, proof

    class Wrong(gated_norm.GatedNorm):
        def __init__(self, eps: float, sigmoid: bool, key_heads: int) -> None:
            super().__init__(1.0, sigmoid, key_heads)

    monkeypatch.setattr(gated_norm, "GatedNorm", Wrong)
    reason = proof.why_wrong(Stock, make_layer(torch.float32, None))
    assert reason is not None
    assert reason.startswith("what runs beside it differs")


def test_what_the_kernel_is_timed_against_fills_with_zeros_as_the_layer_does() -> None:
    from vllm_gdn_plugin.run.proof import ScratchLayer

    class WritesNothing:
        @staticmethod
        def _forward_core_decode_non_spec(*args: Any, **named: Any) -> None: ...

    scratch = ScratchLayer(make_layer(torch.float32, None), 3, 2)
    out = torch.full_like(scratch.empty_output(), torch.nan)
    scratch.decode_by_vllm(WritesNothing, torch.arange(1, 3, dtype=torch.int32), out)
    assert not out.any()


@pytest.mark.parametrize("tokens", [1, 3, 4, 6])
def test_whatever_is_timed_reads_its_slots_at_multiples_of_16_bytes(
    tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or Triton would compile every kernel for other addresses, while it is timed."""
    from vllm_gdn_plugin.run import proof, timing

    layer = make_layer(torch.float32, None)
    given: list[torch.Tensor] = []
    monkeypatch.setattr(proof.ScratchLayer, "decode_by_kernel", lambda scratch, indices, out: given.append(indices))
    monkeypatch.setattr(
        proof.ScratchLayer, "decode_by_vllm", lambda scratch, stock, indices, out: given.append(indices)
    )
    monkeypatch.setattr(timing, "SCRATCH_BYTES", 40 * HEADS * DIM * DIM * 4)
    monkeypatch.setattr(timing, "decode_case", lambda *args: None)
    monkeypatch.setattr(timing, "settled", lambda case, sizes, measure: (measure(list(sizes)), ""))

    def timed(works: Any, sizes: list[int], token_bytes: int) -> dict[int, Any]:
        given.clear()
        for steps in works(tokens).values():
            assert len(steps) > 1
            for step in steps:
                step()
        return {}

    monkeypatch.setattr(timing, "timed", timed)
    timing.decode_ways_of(Stock, layer, cast("Any", None), [tokens])
    assert {len(indices) for indices in given} == {tokens}
    assert [indices.data_ptr() % 16 for indices in given] == [0] * len(given)
    slots = torch.stack(given[: len(given) // 2])
    assert sorted(slots.flatten().tolist()) == list(range(1, slots.numel() + 1)), "each has slots of its own"
