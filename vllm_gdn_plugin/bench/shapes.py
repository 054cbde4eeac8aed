"""Which sizes are measured: from a model's config.json, from the command line, or from the models we know."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vllm_gdn_plugin.bench.errors import BadInput


@dataclass(frozen=True)
class Shape:
    """The two projections of one GDN layer: weights (qkvz, hidden) and (ba, hidden) on each rank."""

    name: str
    hidden: int
    qkvz: int
    ba: int
    tensor_parallel_size: int = 1

    def split(self, tensor_parallel_size: int) -> "Shape":
        """What one of ``tensor_parallel_size`` ranks holds: a part of the outputs, all of the hidden states."""
        if self.qkvz % tensor_parallel_size or self.ba % tensor_parallel_size:
            raise BadInput(
                f"{self.name}: qkvz {self.qkvz} and ba {self.ba} cannot be divided by"
                f" --tensor-parallel-size {tensor_parallel_size}"
            )
        return replace(
            self,
            qkvz=self.qkvz // tensor_parallel_size,
            ba=self.ba // tensor_parallel_size,
            tensor_parallel_size=tensor_parallel_size,
        )


def _config(hidden_size: int, value_heads: int) -> dict[str, int]:
    return {
        "hidden_size": hidden_size,
        "linear_num_key_heads": 16,
        "linear_key_head_dim": 128,
        "linear_num_value_heads": value_heads,
        "linear_value_head_dim": 128,
    }


PRESETS = {
    "Qwen3.5-35B-A3B": _config(2048, 32),
    "Qwen3.5-122B-A10B": _config(3072, 64),
    "Qwen3.5-27B": _config(5120, 48),
    "Qwen3.5-9B": _config(4096, 32),
    "Qwen3-Next-80B-A3B": _config(2048, 32),
}
"""The models in the field, by the five numbers of their configurations that size the projections."""


def shape_of_config(name: str, config: Mapping[str, Any]) -> Shape:
    """The shape of a model's GDN layers, by the keys of its config.json (of its ``text_config``, where it has one)."""
    config = config.get("text_config") or config
    sizes = {}
    for key in _config(0, 0):
        value = config.get(key) if isinstance(config, Mapping) else None
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise BadInput(f"{name}: {key} is {value!r} in its configuration: that is no model with GDN layers")
        sizes[key] = value
    keys = sizes["linear_num_key_heads"] * sizes["linear_key_head_dim"]
    values = sizes["linear_num_value_heads"] * sizes["linear_value_head_dim"]
    return Shape(name, sizes["hidden_size"], 2 * keys + 2 * values, 2 * sizes["linear_num_value_heads"])


def shape_of_model(path: str) -> Shape:
    """The shape of the model in a directory with a config.json, or of that file."""
    file = Path(path) / "config.json" if Path(path).is_dir() else Path(path)
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(f"--model {path}: {file.name} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise BadInput(f"--model {path}: {file.name} is no JSON: {error}") from error
    if not isinstance(config, dict):
        raise BadInput(f"--model {path}: {file.name} holds no object")
    return shape_of_config(file.resolve().parent.name, config)


def shape_of_text(text: str) -> Shape:
    """The shape that ``--shape hidden,qkvz,ba`` gives."""
    sizes = counts("--shape", text)
    if len(sizes) != 3:
        raise BadInput(f"--shape {text!r} is not hidden,qkvz,ba")
    return Shape("x".join(map(str, sizes)), *sizes)


def preset_shapes(name: str) -> list[Shape]:
    """The shape of one known model, or of ``all``."""
    known = {preset.lower(): preset for preset in PRESETS}
    if name.lower() != "all" and name.lower() not in known:
        raise BadInput(f"--preset {name!r} is not known; it is all, or one of {', '.join(PRESETS)}")
    chosen = PRESETS if name.lower() == "all" else [known[name.lower()]]
    return [shape_of_config(preset, PRESETS[preset]) for preset in chosen]


def distinct(shapes: Iterable[Shape]) -> list[Shape]:
    """Each size once, in order, under the names of all that have it."""
    names: dict[tuple[int, int, int], list[str]] = {}
    for shape in shapes:
        same = names.setdefault((shape.hidden, shape.qkvz, shape.ba), [])
        if shape.name not in same:
            same.append(shape.name)
    return [Shape(" and ".join(same), *sizes) for sizes, same in names.items()]


def counts(option: str, text: str) -> list[int]:
    """The whole numbers from 1 on in ``text``, separated by commas."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and 0 < int(part) < 10**9 for part in parts):
        raise BadInput(f"{option} {text!r} is not whole numbers from 1 on, separated by commas")
    return [int(part) for part in parts]


def count(option: str, text: str) -> int:
    """The one whole number from 1 on in ``text``."""
    found = counts(option, text)
    if len(found) != 1:
        raise BadInput(f"{option} {text!r} is not one number")
    return found[0]
