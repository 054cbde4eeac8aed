"""Times of the ways to run a section of a layer on the GPU at hand, and where they are kept.

A section is what may be run in more than one way: the two projections, the one GEMM by its rows, the decode. It is
timed once for each batch size for which vLLM captures a CUDA graph, and the times are kept for the next start.
"""

import hashlib
import json
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

NOISE = 0.1
"""A time whose spread is a larger share of it is noisy: other programs used the GPU meanwhile."""


@dataclass(frozen=True)
class Time:
    """Of one way, for one layer and one number of tokens."""

    microseconds: float
    """The median of some rounds."""
    spread: float
    """From the first to the third quartile of these, as a share of the median."""

    @property
    def noisy(self) -> bool:
        return self.spread > NOISE


Times = dict[int, dict[str, Time]]
"""By number of tokens and by way."""


@dataclass(frozen=True)
class Case:
    """What times depend on: GPU, versions, the section, what its layers are, and the ways, the planned one first."""

    section: str
    gpu: str
    driver: str
    torch: str
    vllm: str
    plugin: str
    facts: tuple[tuple[str, Any], ...]
    """Shapes, precision and whatever else chooses a kernel, as pairs of a name and a value."""
    ways: tuple[str, ...]

    def file(self, directory: Path) -> Path:
        """Where the times of this case are kept below ``directory``."""
        return directory / f"{hashlib.sha256(repr(self).encode()).hexdigest()[:24]}.json"


def recall(case: Case, directory: Path) -> Times:
    """The times that were kept for this case; none where there is no file, or one that cannot be used."""
    with suppress(Exception):
        kept = json.loads(case.file(directory).read_text(encoding="utf-8"))
        if kept["case"] == _as_json(case):
            return {
                int(tokens): {way: Time(*map(float, by_way[way])) for way in case.ways}
                for tokens, by_way in kept["microseconds and spread"].items()
            }
    return {}


def keep(case: Case, times: Times, directory: Path) -> None:
    """Keep the times that are not noisy for the next start, also while other ranks do the same. Raises OSError."""
    file = case.file(directory)
    directory.mkdir(parents=True, exist_ok=True)
    quiet = {n: by_way for n, by_way in times.items() if not any(time.noisy for time in by_way.values())}
    written = {n: {way: (time.microseconds, time.spread) for way, time in by.items()} for n, by in quiet.items()}
    unfinished = file.with_suffix(f".{uuid4().hex}")  # containers that share the directory may share process ids
    text = json.dumps({"case": _as_json(case), "microseconds and spread": written}, indent=1)
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(file)


def _as_json(case: Case) -> Any:
    return json.loads(json.dumps(asdict(case)))
