"""What a run of the bench found, as it lies in its JSON file."""

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vllm_gdn_plugin.bench.errors import BadInput
from vllm_gdn_plugin.bench.shapes import Shape
from vllm_gdn_plugin.decide.plan import SERIAL

QKVZ = "qkvz"
"""``in_proj_qkvz`` alone: no strategy, but the limit of what hiding ``in_proj_ba`` can gain."""

FORMAT = "vllm-gdn-plugin bench projections 1"


@dataclass(frozen=True)
class Point:
    """The samples of one shape at one number of tokens."""

    shape: Shape
    tokens: int
    layers: int
    """Copies of the weights that one sample goes through."""
    bytes_moved: dict[str, int]
    """By strategy, per layer: weights, activations in and outputs out, each once."""
    samples_us: dict[str, list[float]]
    """By strategy: microseconds per layer, one value a round, in the order of the rounds."""


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
    """One run of ``bench projections``."""

    command: str
    date: str
    precision: str
    seed: int
    rounds: int
    machine: Machine
    stopped: str | None = None
    """Why points are missing, or None where none is."""
    points: list[Point] = field(default_factory=list)

    def is_empty(self) -> bool:
        """Whether nothing was measured."""
        return not self.points

    def save(self, path: Path) -> None:
        """Write the run to a JSON file."""
        path.write_text(json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n", encoding="utf-8")


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
    try:
        points = [_point(point) for point in data["points"]]
        if not points:
            raise ValueError("it holds no points")
        return Run(**data | {"machine": Machine(**data["machine"]), "points": points})
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadInput(f"{path} is damaged: {type(error).__name__}: {error}") from error


def _point(data: dict[str, Any]) -> Point:
    point = Point(**data | {"shape": Shape(**data["shape"])})
    samples = list(point.samples_us.values())
    if not {SERIAL, QKVZ} <= set(point.samples_us) <= set(point.bytes_moved):
        raise ValueError("a point lacks a strategy")
    if len({len(values) for values in samples}) != 1 or not samples[0]:
        raise ValueError("the strategies of a point have not the same number of samples")
    if not all(0 < value < math.inf for values in samples for value in values):
        raise ValueError("a sample is not a time")
    return point
