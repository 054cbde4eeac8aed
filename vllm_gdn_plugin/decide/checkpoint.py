"""What a checkpoint's ``config.json`` says about its GDN layers: their shapes, their precision, and so their plan.

An answer before the engine is started. The engine decides on the layers that vLLM has built, with the same rules.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from vllm_gdn_plugin.decide.plan import LayerFacts, Plan, ProjectionFacts, plan
from vllm_gdn_plugin.decide.scratch import UNQUANTIZED

LINEAR_METHODS = {
    "auto-round": "INCLinearMethod",
    "awq": "AutoAWQMarlinLinearMethod",
    "compressed-tensors": "CompressedTensorsLinearMethod",
    "fbgemm_fp8": "FBGEMMFp8LinearMethod",
    "fp8": "Fp8LinearMethod",
    "gptq": "AutoGPTQLinearMethod",
    "inc": "INCLinearMethod",
    "modelopt": "ModelOptLinearMethod",
}
"""The linear method that vLLM uses on CUDA for a checkpoint's ``quant_method``."""

REPLICATE_BA = ("AutoAWQMarlinLinearMethod", "AutoGPTQLinearMethod", "INCLinearMethod")
"""Methods for which vLLM keeps all of ``in_proj_ba`` on every tensor-parallel rank, in the flat layout on CUDA."""

SHARDS = {
    "in_proj_qkvz": ("in_proj_qkv", "in_proj_z", "in_proj_qkvz"),
    "in_proj_ba": ("in_proj_b", "in_proj_a", "in_proj_ba"),
}
"""The names a projection has in checkpoints: in parts in the flat layout, whole in the interleaved one."""

PREFIXES = ("model", "model.language_model", "language_model.model")


class Unreadable(ValueError):
    """There is no usable config.json, or it is not that of a model with GDN layers."""


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


ASSUMED = "for an engine with CUDA graphs, without LoRA and CPU offload"
"""Settings of the engine that a checkpoint does not tell."""


def read_groups(
    path: str,
    tensor_parallel_size: int,
    platform: str,
    request: str,
    *,
    batch_invariant: bool = False,
    overlap_allowed: bool = True,
) -> list[LayerGroup]:
    """The GDN layers of the model in a directory (or of a config.json), grouped by what is planned for them.

    The answer is for an engine as :data:`ASSUMED`, with two more facts of :class:`LayerFacts` as given.

    Raises:
        Unreadable: with one line that says what is wrong.
    """
    try:
        return _groups(
            path,
            tensor_parallel_size,
            platform,
            request,
            batch_invariant=batch_invariant,
            overlap_allowed=overlap_allowed,
        )
    except Unreadable:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise Unreadable(f"{path} is not the config.json of a model: what it holds makes no sense ({reason})") from None


def _groups(
    path: str, tensor_parallel_size: int, platform: str, request: str, *, batch_invariant: bool, overlap_allowed: bool
) -> list[LayerGroup]:
    whole = _load(Path(path))
    config = whole.get("text_config", whole)
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
        layer_types = config.get("layer_types") or _layer_types(config)
    except (KeyError, TypeError, ValueError) as error:
        raise Unreadable(f"{path} is not the config.json of a model with Gated Delta Net layers: no {error}") from None
    if min(hidden, key_heads, value_heads, key_dim, value_dim) < 1:
        raise Unreadable(f"{path}: a size of its Gated Delta Net layers is less than 1")
    gdn = [i for i, kind in enumerate(layer_types) if kind == "linear_attention"]
    if not gdn:
        raise Unreadable(f"{path}: none of the model's layers is a Gated Delta Net layer")
    if tensor_parallel_size < 1 or key_heads % tensor_parallel_size or value_heads % tensor_parallel_size:
        raise Unreadable(
            f"{key_heads} key heads and {value_heads} value heads cannot be split {tensor_parallel_size} ways"
        )
    dtype = str(config.get("dtype") or config.get("torch_dtype") or whole.get("dtype") or "bfloat16")
    quantization = whole.get("quantization_config") or config.get("quantization_config") or {}
    flat = not str(config.get("model_type", whole.get("model_type", ""))).startswith("qwen3_next")
    groups: dict[LayerFacts, list[int]] = {}
    for layer in gdn:
        qkvz, ba = (_linear_method(quantization, layer, projection) for projection in SHARDS)
        replicated = flat and platform == "cuda" and _method(quantization) in REPLICATE_BA
        ba_parts = 1 if replicated else tensor_parallel_size
        facts = LayerFacts(
            platform,
            ProjectionFacts(
                qkvz,
                dtype,
                2 * (key_heads * key_dim + value_heads * value_dim) // tensor_parallel_size,
            ),
            ProjectionFacts(ba, dtype, 2 * value_heads // ba_parts),
            activation_dtype=dtype,
            batch_invariant=batch_invariant,
            overlap_allowed=overlap_allowed,
            quantization=digest(quantization),
        )
        groups.setdefault(facts, []).append(layer)
    return [LayerGroup(tuple(layers), hidden, facts, plan(facts, request)) for facts, layers in groups.items()]


def digest(quantization: Any) -> str:
    """A short name for a checkpoint's quantisation config; empty for none."""
    return hashlib.sha256(repr(quantization).encode()).hexdigest()[:16] if quantization else ""


def _load(path: Path) -> Mapping[str, Any]:
    file = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError:
        raise Unreadable(f"there is no {file}: --model takes a local model directory or its config.json") from None
    except ValueError as error:
        raise Unreadable(f"{file} is not JSON: {error}") from None
    if not isinstance(config, dict) or not isinstance(config.get("text_config", {}), dict):
        raise Unreadable(f"{file} is not a model's config.json")
    return config


MOST_LAYERS = 100_000
"""More than any model has; a file that says more is not a model's."""


def _layer_types(config: Mapping[str, Any]) -> list[str]:
    interval, layers = int(config.get("full_attention_interval", 4)), int(config["num_hidden_layers"])
    if layers > MOST_LAYERS:
        raise ValueError(f"num_hidden_layers below {MOST_LAYERS}")
    return ["full_attention" if (i + 1) % interval == 0 else "linear_attention" for i in range(layers)]


def _method(quantization: Mapping[str, Any]) -> str:
    name = str(quantization.get("quant_method", "")).lower()
    return LINEAR_METHODS.get(name, f"the linear method of {name!r}") if name else UNQUANTIZED


def _linear_method(quantization: Mapping[str, Any], layer: int, projection: str) -> str:
    names = [f"{prefix}.layers.{layer}.linear_attn.{shard}" for prefix in PREFIXES for shard in SHARDS[projection]]
    left_out = any(_matches(pattern, name) for pattern in _left_out(quantization) for name in names)
    return UNQUANTIZED if left_out else _method(quantization)


def _left_out(quantization: Mapping[str, Any]) -> Iterable[str]:
    """Patterns of the modules that stay unquantised, under whichever name the method gives the list."""
    for key in ("ignore", "ignored_layers", "modules_to_not_convert", "exclude_modules"):
        yield from map(str, quantization.get(key) or ())
    # GPTQ: a dynamic rule that starts with "-:" takes modules out; AutoRound: one with 16 bits does.
    yield from (f"re:{key[2:]}" for key in quantization.get("dynamic") or {} if str(key).startswith("-:"))
    for key, value in (quantization.get("extra_config") or {}).items():
        if isinstance(value, dict) and value.get("bits", 4) >= 16:
            yield str(key)


def _matches(pattern: str, name: str) -> bool:
    if pattern.startswith("re:"):
        try:
            return re.match(pattern[3:], name) is not None
        except re.error:
            return False
    if "*" in pattern:
        return fnmatchcase(name, pattern)
    return f".{pattern}." in f".{name}."


def _ranges(numbers: Iterable[int]) -> str:
    """``0-2, 4-6`` for 0, 1, 2, 4, 5, 6."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
