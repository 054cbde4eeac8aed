"""Where the decode kernel runs: in vLLM's packed branch, which hands ``qkvz`` and ``ba`` whole to one op.

vLLM 0.28 and later have in ``forward_cuda`` a branch whose op calls ``_forward_core_fused_norm_packed``, and then
``out_proj``. :func:`forward_packed` is that branch, with two changes: the core's result is not filled with zeros
beforehand, and an op before ``out_proj`` normalises (``gdn_gated_norm``). The plugin overrides that method
(:func:`run_core`). For a batch that only decodes, it runs the kernel, which writes every row and also normalises, and
the op has nothing to do. For all else it runs vLLM's own code without the norm, and the op normalises: in piecewise
CUDA graphs its kernel is captured. A prefill waits for the CPU, so what runs in one does as little as it can; b and a
go to vLLM's code as they are, columns of one tensor, which its other branch copies.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.utils.torch_utils import LayerNameType, _encode_layer_name, direct_register_custom_op

from vllm_gdn_plugin.host.layers import attention_metadata, in_piecewise_graph, layer_by_name
from vllm_gdn_plugin.host.streams import is_captured
from vllm_gdn_plugin.report import unexpected, warn_once
from vllm_gdn_plugin.tune.choose import at

KERNEL = "kernel"
STOCK = "stock"

MOST_BY_RULE = 16
"""Where nothing is timed, batches of up to so many tokens take the kernel."""

MOST_DECODED = 512
"""No larger batch takes it."""

INT32 = 2**31
"""Elements. vLLM's kernel of the prefill counts from the first b to the last in 32 bits."""

_library = torch.library.Library("vllm_gdn_plugin", "FRAGMENT")


@dataclass
class Decode:
    """The decode kernel of one layer."""

    ways: Mapping[int, str] = field(default_factory=dict)
    """By captured number of tokens the faster of kernel and stock, where these were timed."""
    counters: torch.Tensor | None = None
    """int32, zeros between two launches: each launch leaves them so. They serve one launch at a time."""
    reorder: Any = None
    """The :class:`vllm_gdn_plugin.run.reorder.Reorder` of this layer, from the first step on, where it needs one."""
    norm: Any = None
    """The :class:`vllm_gdn_plugin.run.gated_norm.GatedNorm` of this layer, from the first step on."""
    normalised: bool = False
    """What this step's core has given is normalised: there is nothing left for ``gdn_gated_norm``."""
    broken: bool = False

    def takes(self, num_tokens: int) -> bool:
        """Whether a batch of so many tokens, all of them decoding, takes the kernel."""
        by_rule = KERNEL if num_tokens <= MOST_BY_RULE else STOCK
        if self.broken or self.counters is None or num_tokens > MOST_DECODED:
            return False
        return at(self.ways, num_tokens, by_rule) == KERNEL


def forward_packed(layer: Any, mixed_qkvz: torch.Tensor, ba: torch.Tensor) -> torch.Tensor:
    """All of a layer's forward behind its projections.

    Args:
        mixed_qkvz: (num_tokens, qkv + HV * 128), rows of any stride.
        ba: (num_tokens, outputs of ``in_proj_ba``), rows of any stride.
    """
    core_attn_out = torch.empty(
        (mixed_qkvz.shape[0], layer.num_v_heads // layer.tp_size, layer.head_v_dim),
        dtype=mixed_qkvz.dtype,
        device=mixed_qkvz.device,
    )
    name = _encode_layer_name(layer.prefix)
    torch.ops.vllm.qwen_gdn_attention_core_fused_norm_packed(mixed_qkvz, ba, core_attn_out, layer_name=name)
    return output_projection(layer, mixed_qkvz, core_attn_out, name)


def output_projection(layer: Any, mixed_qkvz: torch.Tensor, core_attn_out: torch.Tensor, name: Any) -> torch.Tensor:
    """Gated norm and ``out_proj`` of what the core gave: vLLM compiles it apart from what comes before the core."""
    torch.ops.vllm_gdn_plugin.gdn_gated_norm(core_attn_out, mixed_qkvz, name)
    return layer.out_proj(core_attn_out.flatten(-2))[0]


def run_core(stock: Any, layer: Any, mixed_qkvz: torch.Tensor, ba: torch.Tensor, core_attn_out: torch.Tensor) -> None:
    """In place of ``_forward_core_fused_norm_packed``: the same, but for the norm of what is not decoded here.

    Args:
        stock: vLLM's class of the layer.
        mixed_qkvz, ba: see :func:`forward_packed`.
        core_attn_out: (num_tokens, HV, 128), not initialised. Rows beyond the step's own become zeros, as in vLLM.
    """
    decode = layer.gdn.decode
    decode.normalised = False
    if decode.counters is None and not is_captured(core_attn_out):
        # Only now: what is allocated while vLLM loads the weights is lost in sleep mode, or wakes with anything in it.
        decode.counters = new_counters(layer, core_attn_out)
    metadata = attention_metadata(layer)
    if metadata is None:  # a dry run, in which vLLM warms its kernels up
        core_attn_out.zero_()
        in_order(layer, mixed_qkvz, ba)
        stock._forward_core_fused_norm_packed(layer, mixed_qkvz, ba, core_attn_out)
        return
    tokens, plain = metadata.num_actual_tokens, metadata.spec_sequence_masks is None
    decodes_only = plain and not metadata.num_prefills and metadata.num_decodes
    if decodes_only and decode.takes(tokens) and not in_piecewise_graph():
        zero_rows(core_attn_out, tokens)
        try:
            run_kernel(
                layer,
                mixed_qkvz[:tokens],
                *as_it_lies(layer, ba[:tokens]),
                layer.kv_cache[0],
                layer.kv_cache[1],
                metadata.non_spec_state_indices_tensor[:tokens],
                core_attn_out[:tokens],
            )
            decode.normalised = True
            return
        except Exception as error:
            decode.broken = True
            warn_once("the decode kernel failed and is left out", unexpected(error))
    # vLLM's code writes each of the step's rows where there are prefills and no speculation (the contract checks it).
    zero_rows(core_attn_out, tokens if plain and metadata.num_prefills else 0)
    layer._forward_core(*in_order(layer, mixed_qkvz, ba), core_attn_out)


def in_order(layer: Any, mixed_qkvz: torch.Tensor, ba: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[q | k | v], b and a as vLLM's core takes them."""
    if layer.gqa_interleaved_layout:
        decode = layer.gdn.decode
        if decode.reorder is None:
            from vllm_gdn_plugin.run.reorder import Reorder  # needs Triton

            decode.reorder = Reorder(key_heads_of(layer), layer.A_log.shape[0], layer.head_v_dim)
        qkv, ba = decode.reorder(mixed_qkvz, ba)
        b, a = ba.chunk(2, dim=-1)
    else:
        b, a = layer.split_ba(ba)
        qkv = mixed_qkvz[:, : mixed_qkvz.shape[1] - b.shape[1] * layer.head_v_dim]
    if ba.shape[0] * ba.stride(0) >= INT32:
        b, a = b.contiguous(), a.contiguous()
    return qkv, b, a


def as_it_lies(layer: Any, ba: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """b and a as the decode kernel takes them."""
    if layer.gqa_interleaved_layout:
        b, a = ba.unflatten(-1, (key_heads_of(layer), 2, -1)).unbind(2)
    else:
        b, a = layer.split_ba(ba)
    return b, a


def key_heads_of(layer: Any) -> int:
    """Those of this rank."""
    value_heads, dim = layer.A_log.shape[0], layer.head_v_dim
    return int(layer.conv1d.weight.shape[0] // dim - value_heads) // 2


def zero_rows(core_attn_out: torch.Tensor, start: int) -> None:
    """Write zeros to the rows from ``start`` on, if there are any."""
    if start < core_attn_out.shape[0]:
        core_attn_out[start:].zero_()


def new_counters(layer: Any, core_attn_out: torch.Tensor) -> torch.Tensor:
    """Counters of a layer for the largest batch that takes the kernel."""
    from vllm_gdn_plugin.run.decode_kernel import counters_for  # needs Triton, which vLLM has on a GPU

    return counters_for(MOST_DECODED, key_heads_of(layer), core_attn_out.device)


def run_kernel(
    layer: Any,
    mixed_qkvz: torch.Tensor,
    b: torch.Tensor,
    a: torch.Tensor,
    conv_state: torch.Tensor,
    ssm_state: torch.Tensor,
    state_indices: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """:func:`vllm_gdn_plugin.run.decode_kernel.decode` with the layer's own weights."""
    from vllm_gdn_plugin.run.decode_kernel import decode, variant_for  # needs Triton, which vLLM has on a GPU

    weight = layer.conv1d.weight
    decode(
        mixed_qkvz,
        b,
        a,
        conv_state,
        weight.view(weight.shape[0], weight.shape[-1]),
        layer.A_log,
        layer.dt_bias,
        ssm_state,
        state_indices,
        layer.norm.weight,
        out,
        layer.gdn.decode.counters,
        eps=layer.norm.eps,
        gate=layer.norm.activation,
        variant=variant_for(len(b), key_heads_of(layer)),
    )


def gdn_gated_norm(core_attn_out: torch.Tensor, mixed_qkvz: torch.Tensor, layer_name: LayerNameType) -> None:
    """Normalise what the core gave, in place, unless the decode kernel has done it.

    Args:
        core_attn_out: (num_tokens, HV, 128), contiguous: the core's very tensor. A view of it would be copied, and the
            result copied back, where a compiled graph is functionalized as vLLM does it (auto_functionalized, the first
            version).
        mixed_qkvz: what ``in_proj_qkvz`` gave, with the gate z as it lies there.
        layer_name: the layer's key in the forward context.
    """
    layer = layer_by_name(layer_name)
    if layer.gdn.decode.normalised:
        layer.gdn.decode.normalised = False
        return
    normalise(layer, core_attn_out, mixed_qkvz)


def normalise(layer: Any, core_attn_out: torch.Tensor, mixed_qkvz: torch.Tensor) -> None:
    """The layer's gated norm, in place; see :func:`gdn_gated_norm`."""
    decode, norm = layer.gdn.decode, layer.norm
    if decode.norm is None:
        from vllm_gdn_plugin.run.gated_norm import GatedNorm  # needs Triton

        key_heads = key_heads_of(layer) if layer.gqa_interleaved_layout else 1
        decode.norm = GatedNorm(norm.eps, norm.activation == "sigmoid", key_heads)
    decode.norm(core_attn_out, mixed_qkvz, norm.weight)


def _fake_norm(core_attn_out: torch.Tensor, mixed_qkvz: torch.Tensor, layer_name: LayerNameType) -> None:
    """Gives nothing."""


direct_register_custom_op("gdn_gated_norm", gdn_gated_norm, ["core_attn_out"], _fake_norm, _library)
