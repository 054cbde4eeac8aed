"""When the decode kernel may run: the rules on a layer's facts, and the contract on vLLM's source."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vllm_gdn_plugin.decide.contract import GDN_CLASSES
from vllm_gdn_plugin.decide.decode import DecodeFacts, why_no_kernel
from vllm_gdn_plugin.decide.decode_contract import TAKE_COLUMNS, why_no_decode_kernel

QWEN3_5 = DecodeFacts("cuda")

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no CUDA": ({"platform": "cpu"}, "this is platform cpu"),
    "LoRA": ({"lora": True}, "LoRA"),
    "batch invariance": ({"batch_invariant": True}, "VLLM_BATCH_INVARIANT"),
    "CPU offload": ({"offload": True}, "offloaded"),
    "speculation": ({"speculation": True}, "speculative decoding"),
    "dual batch overlap": ({"ubatching": True}, "dual batch overlap"),
    "breakable graphs": ({"breakable_graphs": True}, "breakable CUDA graphs"),
    "piecewise": ({"piecewise_decode": True}, "PIECEWISE"),
    "a graph that is split elsewhere": ({"core_within_graph": True}, "splitting_ops"),
    "the operator's choice": ({"turned_off": "VLLM_GDN_DECODE_KERNEL=triton"}, "VLLM_GDN_DECODE_KERNEL=triton"),
    "other heads": ({"head_dims": (128, 64)}, "128 keys and 64 values"),
    "a wide conv": ({"conv": (5, False, "silu")}, "conv1d"),
    "a conv with bias": ({"conv": (4, True, "silu")}, "conv1d"),
    "another activation": ({"conv": (4, False, "gelu")}, "conv1d"),
    "another gate": ({"gate": "gelu"}, "gate gelu"),
    "a norm of groups": ({"norm": (64, True)}, "group size 64"),
    "a norm after the gate": ({"norm": (None, False)}, "before the gate: False"),
    "half activations": ({"dtypes": ("float16", "bfloat16", "float32", "float32")}, "float16"),
    "half conv state": ({"dtypes": ("bfloat16", "float16", "float32", "float32")}, "float16"),
    "half recurrent state": ({"dtypes": ("bfloat16", "bfloat16", "float16", "float32")}, "float16"),
    "half norm": ({"dtypes": ("bfloat16", "bfloat16", "float32", "float16")}, "float16"),
    "channels first": ({"conv_state_dim_first": True}, "channels first"),
}


@pytest.mark.parametrize(
    "facts",
    [
        QWEN3_5,
        replace(QWEN3_5, gate="sigmoid"),
        replace(QWEN3_5, dtypes=("bfloat16", "bfloat16", "bfloat16", "float32")),
    ],
)
def test_runs_in_qwen3_5_and_later(facts: DecodeFacts) -> None:
    assert why_no_kernel(facts, "auto", "auto") is None


@pytest.mark.parametrize(("change", "why"), REFUSED.values(), ids=REFUSED)
def test_each_rule_refuses_with_its_reason_also_where_it_is_asked_for(change: dict[str, Any], why: str) -> None:
    for request in ("auto", "1"):
        assert why in (why_no_kernel(replace(QWEN3_5, **change), request, "auto") or "")


@pytest.mark.parametrize(
    ("request_", "strategy", "runs"),
    [
        ("auto", "fused", True),
        ("auto", "dual_stream", True),
        ("auto", "serial", False),
        ("1", "serial", True),
        ("0", "auto", False),
    ],
)
def test_goes_with_every_strategy_but_not_with_serial_unless_asked(request_: str, strategy: str, runs: bool) -> None:
    assert (why_no_kernel(QWEN3_5, request_, strategy) is None) == runs


LAYER = '''
class QwenGatedDeltaNetAttention:
    def split_ba(self, ba):
        return ba.chunk(2, dim=-1)

    def fix_query_key_value_ordering(self, mixed_qkvz, mixed_ba):
        query, key, value, z, b, a = parts(mixed_qkvz, mixed_ba)
        return query, key, value, z, b, a

    def forward_cuda(self, hidden_states):
        """Any text."""
        num_tokens = hidden_states.size(0)
        mixed_qkvz, _ = self.in_proj_qkvz(hidden_states)
        ba, _ = self.in_proj_ba(hidden_states)
        use_fused_gdn_spec_decode = (
            self.enable_fused_gdn_spec_decode
            and hidden_states.dtype == torch.bfloat16
            and self.norm.weight.dtype in (torch.bfloat16, torch.float32)
        )
        if use_fused_gdn_spec_decode:
            core_attn_out = torch.zeros(
                (num_tokens, self.num_v_heads // self.tp_size, self.head_v_dim),
                dtype=hidden_states.dtype,
                device=hidden_states.device,
            )
            torch.ops.vllm.qwen_gdn_attention_core_fused_norm_packed(
                mixed_qkvz, ba, core_attn_out, layer_name=_encode_layer_name(self.prefix)
            )
            output, _ = self.out_proj(core_attn_out.flatten(-2))
            return output
        return self._output_projection(mixed_qkvz, ba)

    def _forward_core(self, mixed_qkv, b, a, core_attn_out):
        attn_metadata = get_forward_context().attn_metadata.get(self.prefix)
        if attn_metadata is None:
            return
        if (
            self.enable_packed_recurrent_decode
            and attn_metadata.spec_sequence_masks is None
            and attn_metadata.num_prefills == 0
            and attn_metadata.num_decodes > 0
        ):
            return self._forward_core_decode_non_spec(mixed_qkv, b, a, core_attn_out, attn_metadata)
        spec_sequence_masks = attn_metadata.spec_sequence_masks
        num_actual_tokens = attn_metadata.num_actual_tokens
        a_prefill = a[:num_actual_tokens]
        core_attn_out_non_spec = fused_post_conv_prep(conv_output=mixed_qkv, a=a_prefill, b=b.index_select(0, rows))
        if spec_sequence_masks is not None and core_attn_out_non_spec is not None:
            core_attn_out.index_copy_(0, spec_token_indx, core_attn_out_spec.squeeze(0))
        elif spec_sequence_masks is not None:
            core_attn_out[:num_actual_tokens] = core_attn_out_spec.squeeze(0)
        else:
            core_attn_out[:num_actual_tokens] = core_attn_out_non_spec.squeeze(0)

    def _forward_core_decode_non_spec(self, mixed_qkv, b, a, core_attn_out, attn_metadata):
        conv_state = self.kv_cache[0].transpose(-1, -2)
        mixed_qkv = causal_conv1d_update(mixed_qkv, conv_state, self.conv1d.weight)
        fused_recurrent_gated_delta_rule_packed_decode(mixed_qkv=mixed_qkv, a=a, b=b, out=core_attn_out)

    def _rms_norm_gated_cuda(self, x, output_gate, out):
        layer_norm_fwd(x, self.norm.weight, z=output_gate, out=out)

    def _forward_core_fused_norm_packed(self, mixed_qkvz, ba, core_attn_out):
        self._forward_core(mixed_qkvz, *self.split_ba(ba), core_attn_out)


def qwen_gdn_attention_core_fused_norm_packed(mixed_qkvz, ba, core_attn_out, layer_name):
    layer = get_forward_context().no_compile_layers[layer_name]
    layer._forward_core_fused_norm_packed(mixed_qkvz=mixed_qkvz, ba=ba, core_attn_out=core_attn_out)
'''

METADATA = """
class GDNAttentionMetadata:
    num_prefills: int
    num_decodes: int
    num_actual_tokens: int
    non_spec_state_indices_tensor: object = None
    spec_sequence_masks: object = None
"""

HELPERS = {
    "vllm.forward_context": "class ForwardContext:\n    attn_metadata: object\n    cudagraph_runtime_mode: object\n",
    "vllm.model_executor.layers.mamba.mamba_utils": "def is_conv_state_dim_first(): ...\n",
}
STRIDED = {
    module: f"def {name}(a, b):\n    return launch(a.{shown}, b.{shown})\n"
    for name, (module, shown) in TAKE_COLUMNS.items()
}

BREACHES = {
    "an older vLLM": ("def _forward_core_fused_norm_packed", "def _other", "no packed branch"),
    "another argument": ("def split_ba(self, ba)", "def split_ba(self, ba, rank)", "split_ba is not a method of"),
    "another order": ("return query, key, value, z, b, a", "return query, key, value, z, a, b", "does not give q, k"),
    "another flag": ("self.enable_fused_gdn_spec_decode", "self.fused", "forward_cuda does not begin"),
    "another op": ("torch.ops.vllm.qwen_gdn", "torch.ops.vllm.other_gdn", "forward_cuda does not begin"),
    "no zeros": ("torch.zeros(", "torch.empty(", "forward_cuda does not begin"),
    "more rows": ("(num_tokens, self.num", "(num_tokens + 1, self.num", "forward_cuda does not begin"),
    "another dtype": ("dtype=hidden_states.dtype", "dtype=torch.float32", "forward_cuda does not begin"),
    "more before out_proj": ("self.out_proj(core", "self.out_proj(2 * core", "forward_cuda does not begin"),
    "more before the branch": (
        "        use_fused_gdn_spec_decode = (",
        "        ba = self.gather(ba)\n        use_fused_gdn_spec_decode = (",
        "forward_cuda does not begin",
    ),
    "a way around it": (
        "        num_tokens = hidden_states.size(0)",
        "        if self.new:\n            return 0\n        num_tokens = hidden_states.size(0)",
        "forward_cuda does not begin",
    ),
    "the op does more": (
        "    layer = get",
        "    layer._forward_core_fused_norm_packed(1, 2, 3)\n    layer = get",
        "does not call _forward_core_fused_norm_packed once",
    ),
    "another condition": ("attn_metadata.num_decodes > 0", "attn_metadata.num_decodes > 1", "a pure decode"),
    "one kernel of its own": (
        "        mixed_qkv = causal_conv1d_update(mixed_qkv, conv_state, self.conv1d.weight)\n",
        "",
        "once each",
    ),
    "another forward": ("forward_cuda(self, hidden", "forward_cuda(self, x, hidden", "forward_cuda is not a method of"),
    "rows that nothing writes": (
        "[:num_actual_tokens] = core_attn_out_non_spec",
        "[:num_prefill_tokens] = core_attn_out_non_spec",
        "does not write every row",
    ),
    "other rows in another case": (
        "elif spec_sequence_masks is not None:",
        "elif num_prefills > 1:",
        "does not write every row",
    ),
    "other rows in one more case": (
        "elif spec_sequence_masks is not None:",
        "elif spec_sequence_masks is not None or num_decode_tokens:",
        "does not write every row",
    ),
    "fewer tokens": (
        "num_actual_tokens = attn_metadata.num_actual_tokens",
        "num_actual_tokens = attn_metadata.num_prefill_tokens",
        "does not write every row",
    ),
    "fewer tokens in the end": (
        "        core_attn_out_non_spec =",
        "        num_actual_tokens = 1\n        core_attn_out_non_spec =",
        "does not write every row",
    ),
    "another tensor is written": (
        "        core_attn_out_non_spec =",
        "        core_attn_out = core_attn_out.clone()\n        core_attn_out_non_spec =",
        "does not write every row",
    ),
    "an end without prefills or without decodes": (
        "        a_prefill =",
        "        if attn_metadata.num_prefills == 0 or not num_decodes:\n            return\n        a_prefill =",
        "does not write every row",
    ),
    "an end with prefills": (
        "        a_prefill =",
        "        if attn_metadata.num_prefills == 0:\n            pass\n        else:\n"
        "            return\n        a_prefill =",
        "does not write every row",
    ),
    "an end before all is written": (
        "        a_prefill =",
        "        if not attn_metadata.num_prefills:\n            return\n        a_prefill =",
        "does not write every row",
    ),
    "another taker": ("fused_post_conv_prep(conv", "gates(conv", "_forward_core hands b or a to gates"),
    "another cache": ("self.kv_cache[0]", "self.cache[0]", "kv_cache as expected"),
}


@pytest.fixture
def sources(tmp_path: Path) -> Callable[..., Path]:
    """`sources(layer, metadata)` is a package `vllm` with these two modules."""

    def write(layer: str = LAYER, metadata: str = METADATA) -> Path:
        own = {next(iter(GDN_CLASSES)): layer, "vllm.v1.attention.backends.gdn_attn": metadata}
        for module, text in (HELPERS | STRIDED | own).items():
            file = tmp_path.joinpath(*module.split(".")).with_suffix(".py")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        return tmp_path / "vllm"

    return write


def test_the_contract_holds_with_either_flag(sources: Callable[..., Path]) -> None:
    assert why_no_decode_kernel(sources()) is None
    assert why_no_decode_kernel(sources(LAYER.replace("fused_gdn_spec_decode", "fused_gdn_decode"))) is None


@pytest.mark.parametrize(("old", "new", "why"), BREACHES.values(), ids=BREACHES)
def test_what_the_kernel_relies_on_is_checked(sources: Callable[..., Path], old: str, new: str, why: str) -> None:
    assert old in LAYER
    assert why in (why_no_decode_kernel(sources(LAYER.replace(old, new))) or "")


@pytest.mark.parametrize("field", ["num_prefills", "num_decodes", "num_actual_tokens", "spec_sequence_masks"])
def test_a_metadata_field_that_is_gone_is_named(sources: Callable[..., Path], field: str) -> None:
    assert why_no_decode_kernel(sources(metadata=METADATA.replace(f"    {field}:", "    other:"))) == (
        f"GDNAttentionMetadata has no {field}"
    )


@pytest.mark.parametrize("module", HELPERS)
def test_a_helper_that_is_gone_is_named(sources: Callable[..., Path], tmp_path: Path, module: str) -> None:
    package = sources()
    tmp_path.joinpath(*module.split(".")).with_suffix(".py").write_text("")
    assert f"there is no {module}." in (why_no_decode_kernel(package) or "")


@pytest.mark.parametrize(
    "body",
    [
        "return launch(a, b)",
        "return launch(a.{0}, b)",
        "return launch(beta.{0}, alpha.{0})",
        "...\n\n\ndef another(a, b):\n    return launch(a.{0}, b.{0})",
    ],
)
@pytest.mark.parametrize("name", TAKE_COLUMNS)
def test_what_may_want_contiguous_rows_is_named(
    sources: Callable[..., Path], tmp_path: Path, name: str, body: str
) -> None:
    package = sources()
    module, shown = TAKE_COLUMNS[name]
    text = f"def {name}(a, b):\n    {body.format(shown)}\n"
    tmp_path.joinpath(*module.split(".")).with_suffix(".py").write_text(text)
    assert why_no_decode_kernel(package) == f"{name} may not take b and a with rows of any stride"


def test_sources_that_cannot_be_read(sources: Callable[..., Path], tmp_path: Path) -> None:
    assert "cannot be read" in (why_no_decode_kernel(sources("def broken(")) or "")
    assert why_no_decode_kernel(tmp_path / "nowhere") == "the GDN layer has moved"
