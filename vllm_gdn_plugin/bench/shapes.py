"""Which sizes are measured: from a model's config.json, from the command line, or from the models we know."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from vllm_gdn_plugin.bench.errors import BadInput
from vllm_gdn_plugin.decide.checkpoint import Unreadable, gdn_shape
from vllm_gdn_plugin.host.model_files import find_directory, load_config


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


PRESETS = {
    "Qwen3.5-35B-A3B": (2048, 12288, 64),
    "Qwen3.5-122B-A10B": (3072, 20480, 128),
    "Qwen3.5-27B": (5120, 16384, 96),
    "Qwen3.5-9B": (4096, 12288, 64),
    "Qwen3-Next-80B-A3B": (2048, 12288, 64),
}
"""The models in the field: hidden, qkvz, ba."""


def shape_of_model(model: str) -> Shape:
    """The shape of the GDN layers of a model: its directory, its config.json, or its id on the Hub."""
    try:
        directory = find_directory(model)
        config = load_config(directory)
        found = gdn_shape(config.get("text_config", config), 1)
    except Unreadable as error:
        raise BadInput(f"--model {model}: {error}") from None
    return Shape(name_of(model, directory), found.hidden_size, sum(found.qkvz), sum(found.ba))


def name_of(model: str, directory: Path) -> str:
    """The name of its directory, or the id."""
    return directory.resolve().name if Path(model).exists() else model


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
    return [Shape(preset, *PRESETS[preset]) for preset in chosen]


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
