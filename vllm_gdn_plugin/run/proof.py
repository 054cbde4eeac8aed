"""The decode kernel beside vLLM's own code on scratch states: it proves itself at each start, and is timed so."""

from types import SimpleNamespace
from typing import Any

import torch

from vllm_gdn_plugin.run.decode import Decode, as_it_lies, in_order, key_heads_of, normalise, run_kernel
from vllm_gdn_plugin.run.decode_kernel import ENOUGH_PROGRAMS, counters_for

TOKENS, STEPS = 5, 3
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 2e-2}
"""Difference from vLLM's as a share of the norm. Both round to bfloat16 a few times, where their sums differ."""


class ScratchLayer:
    """A GDN layer with random weights of the layer's shapes and dtypes, and states of its own; else that layer."""

    def __init__(self, layer: Any, slots: int, tokens: int) -> None:
        device, self._layer = layer.A_log.device, layer
        own = torch.Generator(device).manual_seed(0)  # the engine samples with the default one

        def like(tensor: torch.Tensor) -> torch.Tensor:
            return torch.randn(tensor.shape, dtype=tensor.dtype, device=device, generator=own)

        def new(*shape: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.randn(shape, dtype=dtype, device=device, generator=own)

        conv_dtype, ssm_dtype, *_ = layer.get_state_dtype()
        qkv = layer.conv1d.weight.shape[0]
        self.value_heads, self.dim = layer.A_log.shape[0], layer.head_v_dim
        self.conv1d = SimpleNamespace(weight=like(layer.conv1d.weight) / 4, bias=None)
        self.A_log, self.dt_bias = like(layer.A_log).abs().log(), like(layer.dt_bias)
        self.norm = SimpleNamespace(
            weight=like(layer.norm.weight),
            bias=None,
            eps=layer.norm.eps,
            group_size=None,
            norm_before_gate=True,
            activation=layer.norm.activation,
        )
        heads = self.value_heads
        ssm = new(slots, heads, self.dim, self.dim, dtype=ssm_dtype)
        self.kv_cache = new(slots, 3, qkv, dtype=conv_dtype), ssm
        self.gdn = SimpleNamespace(decode=Decode(counters=counters_for(tokens, key_heads_of(layer), device)))
        sizes = [qkv + heads * self.dim, 2 * heads]
        fused = layer.gdn.fused
        outputs = sum(sizes) if fused is None else fused.weight.shape[0]
        both = new(tokens, outputs, dtype=conv_dtype).split([*sizes, outputs - sum(sizes)], dim=-1)
        self.qkvz, self.ba = both[:2] if fused is not None else (part.contiguous() for part in both[:2])
        """What the layer's projections give of this rank. vLLM's conv1d writes over q, k and v."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)

    def split_ba(self, ba: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        b, a = ba.chunk(2, dim=-1)
        return b, a

    def ordered_by_vllm(self, stock: Any, n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """[q | k | v], z, b and a of the first n tokens."""
        qkvz, ba = self.qkvz[:n], self.ba[:n]
        if self.gqa_interleaved_layout:
            *qkv, z, b, a = stock.fix_query_key_value_ordering(self, qkvz, ba)
            return torch.cat([part.flatten(1) for part in qkv], dim=-1), z, b, a
        qkv = self.conv1d.weight.shape[0]
        return qkvz[:, :qkv], qkvz[:, qkv:].unflatten(-1, (self.value_heads, self.dim)), *self.split_ba(ba)

    def empty_output(self) -> torch.Tensor:
        return self.qkvz.new_zeros(self.qkvz.shape[0], self.value_heads, self.dim)

    def decode_by_kernel(self, state_indices: torch.Tensor, out: torch.Tensor) -> None:
        n = len(state_indices)
        run_kernel(self, self.qkvz[:n], *as_it_lies(self, self.ba[:n]), *self.kv_cache, state_indices, out[:n])

    def decode_by_vllm(self, stock: Any, state_indices: torch.Tensor, out: torch.Tensor, norm: bool = True) -> None:
        """What a layer with the kernel runs where it is slower: zeros, vLLM's two kernels, and the plugin's norm.

        Without ``norm`` vLLM's own code alone.
        """
        n = len(state_indices)
        if norm:
            out[:n].zero_()
            qkv, b, a = in_order(self, self.qkvz[:n], self.ba[:n])
        else:
            qkv, _, b, a = self.ordered_by_vllm(stock, n)
        metadata = SimpleNamespace(num_actual_tokens=n, non_spec_state_indices_tensor=state_indices)
        stock._forward_core_decode_non_spec(
            self, mixed_qkv=qkv, b=b, a=a, core_attn_out=out[:n], attn_metadata=metadata
        )
        if norm:
            normalise(self, out[:n], self.qkvz[:n])

    def normalise_by_vllm(self, stock: Any, out: torch.Tensor) -> None:
        _, gate, *_ = self.ordered_by_vllm(stock, len(out))
        stock._rms_norm_gated_cuda(self, out, gate, out)


def difference(one: torch.Tensor, another: torch.Tensor) -> float:
    """The norm of the difference as a share of the norm of ``another``, without a copy of the whole."""
    apart = sum(float((a.float() - b.float()).norm()) ** 2 for a, b in zip(one, another, strict=True))
    return float((apart / sum(float(b.float().norm()) ** 2 for b in another)) ** 0.5)


def why_wrong(stock: Any, layer: Any) -> str | None:
    """Why the kernel is not trusted with such layers on this GPU, or None where some steps agree with vLLM's.

    So do both of its variants, and what runs beside it: :mod:`vllm_gdn_plugin.run.gated_norm` and, in Qwen3-Next,
    :mod:`vllm_gdn_plugin.run.reorder`.
    """
    many = -(-ENOUGH_PROGRAMS // key_heads_of(layer))
    return _why_wrong(stock, layer, TOKENS) or _why_wrong(stock, layer, max(TOKENS, many))


def _why_wrong(stock: Any, layer: Any, tokens: int) -> str | None:
    """The same for a batch of so many tokens, of which the third is padding, in slots in any order."""
    ours, theirs, others = (ScratchLayer(layer, tokens + 2, tokens) for _ in range(3))
    device = layer.A_log.device
    own = torch.Generator(device).manual_seed(1)
    slots = 1 + torch.randperm(tokens + 1, generator=own, device=device)
    slots[2] = 0
    indices = slots[:tokens].to(torch.int32)
    our, their, other = torch.full_like(ours.empty_output(), torch.nan), theirs.empty_output(), others.empty_output()
    with torch.inference_mode():
        for _ in range(STEPS):
            ours.qkvz.normal_(generator=own)
            theirs.qkvz.copy_(ours.qkvz)
            others.qkvz.copy_(ours.qkvz)
            ours.decode_by_kernel(indices, our)
            theirs.decode_by_vllm(stock, indices, their, norm=False)
            theirs.normalise_by_vllm(stock, their)
            others.decode_by_vllm(stock, indices, other)
    compared = {
        "its output": (our, their),
        "its conv state": (ours.kv_cache[0], theirs.kv_cache[0]),
        "its recurrent state": (ours.kv_cache[1], theirs.kv_cache[1]),
        "what runs beside it": (other, their),
    }
    for name, (one, another) in compared.items():
        error = difference(one, another)
        allowed = 0.0 if name == "its conv state" else TOLERANCE[one.dtype]
        if not error <= allowed:  # also where it is no number
            return (
                f"{name} differs from vLLM's by {error:.1e} of its norm with {tokens} tokens,"
                f" where {allowed:.0e} is allowed"
            )
    return None
