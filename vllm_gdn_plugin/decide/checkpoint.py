"""What a model's ``config.json`` tells of its GDN layers without vLLM, and the layers that are alike, with their plan.

An answer before the engine is started. The engine decides on the layers that vLLM has built, with the same rules.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from vllm_gdn_plugin.decide.decode import DecodeFacts
from vllm_gdn_plugin.decide.plan import LayerFacts, Plan, ProjectionFacts, plan
from vllm_gdn_plugin.decide.scratch import UNQUANTIZED

MODEL_TYPES = ("qwen3_next", "qwen3_5", "qwen3_5_moe", "qwen3_5_text", "qwen3_5_moe_text")
"""Models whose ``linear_attention`` layers are vLLM's Qwen GDN layer in every supported release. Others have such
layers, and sizes of the same names, but a layer class of their own (OLMo Hybrid), or linear methods that vLLM swaps."""


class Unreadable(ValueError):
    """There is no usable config.json, or it is not that of a model with GDN layers."""


class Undecidable(Exception):
    """The model can be read, but what vLLM builds of it cannot be told. No ValueError, which pydantic would catch."""


@dataclass(frozen=True)
class EngineFlags:
    """The flags of ``vllm serve`` that the plans depend on, by vLLM's names and with its defaults."""

    tensor_parallel_size: int = 1
    quantization: str | None = None
    dtype: str = "auto"
    enforce_eager: bool = False
    enable_lora: bool = False
    enable_dbo: bool = False
    cpu_offload_gb: float = 0
    offload_group_size: int = 0
    mamba_ssm_cache_dtype: str = "auto"
    speculative_config: str | None = None

    @property
    def offload(self) -> bool:
        return self.cpu_offload_gb > 0 or self.offload_group_size > 0

    def __str__(self) -> str:
        given = {name: value for name, value in vars(self).items() if value != getattr(EngineFlags, name)}
        flags = [
            f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}") for name, value in given.items()
        ]
        return " ".join(["vllm serve", *flags])


NOT_LOOKED_AT = (
    "--compilation-config",
    "--optimization-level",
    "--quantization-config",
    "--hf-overrides",
    "--load-format",
    "--model-impl",
    "--ubatch-size",
    "--mamba-cache-dtype",
)
"""Further flags that can change a plan."""


@dataclass(frozen=True)
class GdnShape:
    """The sizes of a model's GDN layers before tensor parallelism splits them, and which of its layers they are."""

    hidden_size: int
    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    layers: tuple[int, ...]

    @property
    def qkvz(self) -> tuple[int, int, int, int]:
        """Outputs of ``in_proj_qkvz``: q, k, v and z."""
        key, value = self.key_heads * self.key_dim, self.value_heads * self.value_dim
        return key, key, value, value

    @property
    def ba(self) -> tuple[int, int]:
        """Outputs of ``in_proj_ba``: b and a."""
        return self.value_heads, self.value_heads


@dataclass(frozen=True)
class ModelFacts:
    """What is known of a model's GDN layers before its engine is started."""

    shape: GdnShape
    layers: Mapping[int, LayerFacts]
    """By index, those of ``shape.layers``."""
    decode: DecodeFacts | None = None
    """The same for all of them; None where nobody asked."""
    holder: str = ""
    """The class of another plugin that is registered to be built in place of the layer."""


@dataclass(frozen=True)
class LayerGroup:
    """GDN layers that are alike: their indices, and what one of them is."""

    layers: tuple[int, ...]
    hidden_size: int
    facts: LayerFacts
    plan: Plan

    def __str__(self) -> str:
        f = self.facts
        return (
            f"{len(self.layers)} GDN layers ({_ranges(self.layers)}): {self.plan.strategy}; in_proj_qkvz"
            f" {self.hidden_size} x {f.qkvz.output_size} {f.qkvz.linear_method}, in_proj_ba {self.hidden_size} x"
            f" {f.ba.output_size} {f.ba.linear_method}; {self.plan.reason}"
        )


def group(hidden_size: int, facts: Mapping[int, LayerFacts], request: str) -> list[LayerGroup]:
    """The layers with these facts, by index, grouped by what is planned for them."""
    alike: dict[LayerFacts, list[int]] = {}
    for layer, found in facts.items():
        alike.setdefault(found, []).append(layer)
    return [LayerGroup(tuple(layers), hidden_size, found, plan(found, request)) for found, layers in alike.items()]


def gdn_shape(config: Mapping[str, Any], tensor_parallel_size: int) -> GdnShape:
    """The GDN layers of a model with this text configuration.

    Raises:
        Unreadable: it has none, a size makes no sense, or the heads cannot be split so many ways.
    """
    try:
        hidden, key_heads, value_heads, key_dim, value_dim = (
            int(config[name])
            for name in (
                "hidden_size",
                "linear_num_key_heads",
                "linear_num_value_heads",
                "linear_key_head_dim",
                "linear_value_head_dim",
            )
        )
        layer_types = list(config.get("layer_types") or _layer_types(config))
    except (ArithmeticError, KeyError, TypeError, ValueError) as error:
        why = f"no {error}" if isinstance(error, KeyError) else error
        raise Unreadable(f"this is not the config.json of a model with Gated Delta Net layers: {why}") from None
    if min(hidden, key_heads, value_heads, key_dim, value_dim) < 1:
        raise Unreadable("a size of the model's Gated Delta Net layers is less than 1")
    layers = tuple(i for i, kind in enumerate(layer_types) if kind == "linear_attention")
    if not layers:
        raise Unreadable("none of the model's layers is a Gated Delta Net layer")
    if tensor_parallel_size < 1 or key_heads % tensor_parallel_size or value_heads % tensor_parallel_size:
        raise Unreadable(
            f"{key_heads} key heads and {value_heads} value heads cannot be split {tensor_parallel_size} ways"
        )
    return GdnShape(hidden, key_heads, value_heads, key_dim, value_dim, layers)


MOST_LAYERS = 100_000
"""More than any model has; a file that says more is not a model's."""


def _layer_types(config: Mapping[str, Any]) -> list[str]:
    interval, layers = int(config.get("full_attention_interval", 4)), int(config["num_hidden_layers"])
    if layers > MOST_LAYERS:
        raise ValueError(f"num_hidden_layers is not below {MOST_LAYERS}")
    return ["full_attention" if (i + 1) % interval == 0 else "linear_attention" for i in range(layers)]


def unquantised_facts(
    whole: Mapping[str, Any], quantised_by: str, flags: EngineFlags, platform: str, batch_invariant: bool
) -> ModelFacts:
    """The facts about the GDN layers of a model, without vLLM.

    Only where nothing is quantised: how the modules of a quantised model are matched differs by format and release.

    Args:
        whole: what its config.json holds.
        quantised_by: the file beside it that says what is quantised, or "".

    Raises:
        Unreadable: it is no model with GDN layers.
        Undecidable: vLLM has to be asked.
    """
    config = whole.get("text_config", whole)
    shape = gdn_shape(config, flags.tensor_parallel_size)
    kind = config.get("model_type", whole.get("model_type"))
    if kind not in MODEL_TYPES:
        raise Undecidable(f"how vLLM builds the layers of model type {kind!a} cannot be told without vLLM")
    says = [
        f"{key} in config.json" for key in ("quantization_config", "compression_config") if _has(key, whole, config)
    ]
    if flags.quantization is not None:
        says.append("--quantization")
    if quantised_by:
        says.append(quantised_by)
    if says:
        raise Undecidable(f"which layers {says[0]} leaves unquantised cannot be told without vLLM")
    dtype = flags.dtype
    if dtype == "auto":
        dtype = str(config.get("dtype") or config.get("torch_dtype") or whole.get("dtype") or "bfloat16")
    parts = flags.tensor_parallel_size
    facts = LayerFacts(
        platform,
        ProjectionFacts(UNQUANTIZED, dtype, sum(shape.qkvz) // parts),
        ProjectionFacts(UNQUANTIZED, dtype, sum(shape.ba) // parts),
        activation_dtype=dtype,
        lora=flags.enable_lora,
        cuda_graphs=not flags.enforce_eager,
        batch_invariant=batch_invariant,
        offload=flags.offload,
        ubatching=flags.enable_dbo,
    )
    return ModelFacts(shape, dict.fromkeys(shape.layers, facts), _decode_facts(config, kind, facts, flags))


def _decode_facts(config: Mapping[str, Any], model_type: str, facts: LayerFacts, flags: EngineFlags) -> DecodeFacts:
    """As vLLM's layer takes them from the text configuration, whose class has these defaults."""
    dtype, recurrent_state = facts.activation_dtype, flags.mamba_ssm_cache_dtype
    if recurrent_state == "auto":
        recurrent_state = str(config.get("mamba_ssm_dtype") or dtype)
    gate = config.get("output_gate_type", "silu")
    return DecodeFacts(
        platform=facts.platform,
        interleaved=model_type == "qwen3_next",
        head_dims=(config["linear_key_head_dim"], config["linear_value_head_dim"]),
        conv=(config.get("linear_conv_kernel_dim", 4), False, config.get("hidden_act", "silu")),
        gate="silu" if gate == "swish" else gate,
        dtypes=(dtype, dtype, recurrent_state, dtype),
        lora=facts.lora,
        batch_invariant=facts.batch_invariant,
        speculation=flags.speculative_config is not None,
        offload=facts.offload,
        ubatching=facts.ubatching,
    )


def _has(key: str, *configs: Mapping[str, Any]) -> bool:
    return any(config.get(key) for config in configs)


def digest(quantization: Any) -> str:
    """A short name for a checkpoint's quantisation config; empty for none."""
    return hashlib.sha256(repr(quantization).encode()).hexdigest()[:16] if quantization else ""


def _ranges(numbers: Iterable[int]) -> str:
    """``0-2, 4-6`` for 0, 1, 2, 4, 5, 6."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
