"""What a run of the bench that times a part of a layer found, as it lies in its JSON file."""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vllm_gdn_plugin.bench.errors import BadInput
from vllm_gdn_plugin.bench.shapes import Shape
from vllm_gdn_plugin.decide.plan import SERIAL

QKVZ = "qkvz"
"""``in_proj_qkvz`` alone: no strategy, but the limit of what hiding ``in_proj_ba`` can gain."""

FORMAT = "vllm-gdn-plugin bench projections 2"
DIGITS = 5
"""Of each sample that are kept: timers tell no more apart."""


@dataclass(frozen=True)
class Section:
    """A part of a layer that can be run in several ways, and what each of them is held against."""

    title: str
    """As the head of the report."""
    baseline: str
    """The way in which stock vLLM runs it."""
    limit: str
    """What no way can beat: the part of the work that all have to do."""


PROJECTIONS = Section("Input projections of a GDN layer", SERIAL, QKVZ)
LAYER = Section("A decode step of a GDN layer, from its projections to out_proj", "stock", "qkvz and states")
"""Its limit is ``in_proj_qkvz`` and one pass over the recurrent states, which are read and written once."""


@dataclass(frozen=True)
class Point:
    """The samples of one shape at one number of tokens."""

    shape: Shape
    tokens: int
    layers: int
    """Copies of the weights that one sample goes through."""
    bytes_moved: dict[str, int]
    """By way, per layer: weights, activations in and outputs out, each once."""
    samples_us: dict[str, list[float]]
    """By way: microseconds per layer, one value a round, in the order of the rounds."""


@dataclass(frozen=True)
class Machine:
    """Where it was measured, and with which software. None: not there, or not known."""

    device: str
    hardware: str
    python: str
    vllm_gdn_plugin: str
    torch: str
    vllm: str | None = None
    cuda: str | None = None
    driver: str | None = None
    l2_cache_bytes: int = 0
    bandwidth_gb_s: float | None = None
    """Measured in the same run: bytes read and written by a large copy on the device, in 10**9 a second."""


@dataclass
class Run:
    """One run of ``bench projections``, or of another section."""

    command: str
    date: str
    precision: str
    seed: int
    rounds: int
    machine: Machine
    section: Section = PROJECTIONS
    stopped: str | None = None
    """Why points are missing, or None where none is."""
    points: list[Point] = field(default_factory=list)

    def is_empty(self) -> bool:
        """Whether nothing was measured."""
        return not self.points

    def save(self, path: Path) -> None:
        """Write the run to a JSON file."""
        data = asdict(self)
        for point in data["points"]:
            point["samples_us"] = {way: rounded(samples) for way, samples in point["samples_us"].items()}
        write(path, {"format": FORMAT, **data})


def rounded(samples: Iterable[float]) -> list[float]:
    """The samples to :data:`DIGITS` digits."""
    return [float(f"{value:.{DIGITS}g}") for value in samples]


def write(path: Path, data: Mapping[str, Any]) -> None:
    """Write JSON with a line for each entry of the first two levels: short, and a change of it can be read."""
    lines = [f"{json.dumps(key)}: {_lines(value)}" for key, value in data.items()]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def _lines(value: Any) -> str:
    if isinstance(value, dict) and value:
        rows = ",\n".join(f" {json.dumps(key)}: {json.dumps(one)}" for key, one in value.items())
        return "{\n" + rows + "\n}"
    if isinstance(value, list) and value:
        return "[\n" + ",\n".join(f" {json.dumps(one)}" for one in value) + "\n]"
    return json.dumps(value)


def read(path: Path) -> dict[str, Any]:
    """The object in a JSON file, for :func:`parse` or its like. Raises BadInput."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise BadInput(f"{path} is no JSON: {error}") from error
    if not isinstance(data, dict):
        raise BadInput(f"{path} holds no object")
    return data


def parse(path: Path, data: dict[str, Any]) -> Run:
    """The run that :meth:`Run.save` wrote, from its decoded JSON. Raises BadInput."""
    data.pop("summary", None)
    try:
        section = Section(**data["section"])
        points = [_point(point, section) for point in data["points"]]
        if not points:
            raise ValueError("it holds no points")
        return Run(**data | {"machine": Machine(**data["machine"]), "section": section, "points": points})
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadInput(f"{path} is damaged: {type(error).__name__}: {error}") from error


def _point(data: dict[str, Any], section: Section) -> Point:
    point = Point(**data | {"shape": Shape(**data["shape"])})
    samples = list(point.samples_us.values())
    if not {section.baseline, section.limit} <= set(point.samples_us) <= set(point.bytes_moved):
        raise ValueError("a point lacks a way")
    if len({len(values) for values in samples}) != 1 or not samples[0]:
        raise ValueError("the ways of a point have not the same number of samples")
    if not all(0 < value < math.inf for values in samples for value in values):
        raise ValueError("a sample is not a time")
    return point
