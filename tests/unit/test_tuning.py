"""What is made of the times of a GPU. The times themselves are taken in tests/gpu."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_gdn_plugin.decide.decode import DecodeFacts
from vllm_gdn_plugin.decide.plan import DUAL_STREAM, SERIAL, LayerFacts, ProjectionFacts
from vllm_gdn_plugin.decide.scratch import UNQUANTIZED
from vllm_gdn_plugin.tune.choose import MARGIN, at, described, fastest, fastest_throughout
from vllm_gdn_plugin.tune.times import NOISE, Case, Time, Times, keep, recall

BA = ProjectionFacts(UNQUANTIZED, "bfloat16", 96)
FP8 = ProjectionFacts("Fp8LinearMethod", "bfloat16", 16384)
FACTS = LayerFacts("cuda", FP8, BA, "bfloat16")
WAYS = (DUAL_STREAM, SERIAL)
CASE = Case("projections", "NVIDIA H200", "580.1", "2.11.0", "0.26.0", "0.1.0", (("hidden_size", 2048),), WAYS)
OTHER: dict[str, Any] = {
    "section": "rows",
    "gpu": "NVIDIA H100",
    "driver": "",
    "torch": "2.13.0",
    "vllm": "0.27.0",
    "plugin": "0.2.0",
    "facts": (("hidden_size", 4096),),
    "ways": (SERIAL, DUAL_STREAM),
}


def took(spread: float = 0.01, **microseconds: float) -> dict[str, Time]:
    return {way: Time(value, spread) for way, value in microseconds.items()}


# What is chosen.


@pytest.mark.parametrize(
    ("times", "chosen"),
    [
        (took(dual_stream=100, serial=97.5), DUAL_STREAM),
        (took(dual_stream=100, serial=96.5), SERIAL),
        (took(dual_stream=100, serial=96.5, third=90), "third"),
        (took(dual_stream=97, serial=100), DUAL_STREAM),
        (took(dual_stream=100) | took(2 * NOISE, serial=50), DUAL_STREAM),
        (took(2 * NOISE, dual_stream=100) | took(serial=50), DUAL_STREAM),
    ],
    ids=["within the margin", "beyond it", "the fastest of two", "the plan is faster", "it is noisy", "the plan is"],
)
def test_the_planned_way_is_kept_unless_another_is_clearly_faster(times: dict[str, Time], chosen: str) -> None:
    assert fastest({8: times}, DUAL_STREAM) == {8: chosen}


TIMES = st.dictionaries(
    st.integers(1, 512),
    st.fixed_dictionaries(dict.fromkeys(("64", "128", "512"), st.builds(Time, st.floats(1, 200), st.floats(0, 0.2)))),
    max_size=6,
)


@given(TIMES)
def test_what_is_chosen_is_planned_or_faster(times: Times) -> None:
    chosen = fastest(times, "64")
    assert list(chosen) == sorted(times)
    for tokens, way in chosen.items():
        quiet = not any(time.noisy for time in times[tokens].values())
        best, planned = times[tokens][way].microseconds, times[tokens]["64"].microseconds
        assert way == "64" or (quiet and best < planned * (1 - MARGIN))
    whole = fastest_throughout(times, "64")
    quiet_ones = [by_way for by_way in times.values() if not any(time.noisy for time in by_way.values())]
    assert whole == "64" or sum(by[whole].microseconds / by["64"].microseconds for by in quiet_ones) < len(quiet_ones)


@pytest.mark.parametrize(
    ("times", "chosen"),
    [
        ({}, "64"),
        ({1: {"64": Time(10, 0), "128": Time(9, 0)}, 2: {"64": Time(100, 0), "128": Time(105, 0)}}, "128"),
        ({1: {"64": Time(10, 0), "128": Time(9.9, 0)}, 2: {"64": Time(100, 0), "128": Time(105, 0)}}, "64"),
        ({1: {"128": Time(10, 0), "64": Time(10, 0)}}, "64"),
        ({1: {"64": Time(10, 0), "128": Time(9.95, 0)}}, "64"),
        ({1: {"64": Time(10, 0), "128": Time(5, 0.5)}, 2: {"64": Time(100, 0), "128": Time(101, 0)}}, "64"),
        ({1: {"64": Time(10, 0), "128": Time(5, 0.5)}}, "64"),
    ],
    ids=[
        "none",
        "by shares, not by sums",
        "the plan",
        "a tie",
        "within the margin",
        "a noisy size does not count",
        "only noisy ones",
    ],
)
def test_one_way_for_all_sizes_is_the_least_on_average(times: Times, chosen: str) -> None:
    assert fastest_throughout(times, "64") == chosen


@pytest.mark.parametrize(("tokens", "way"), [(1, "a"), (4, "a"), (5, "b"), (8, "b"), (9, "b")])
def test_a_batch_goes_by_the_next_larger_size_that_was_timed(tokens: int, way: str) -> None:
    assert at({4: "a", 8: "b"}, tokens, "planned") == way
    assert at({}, tokens, "planned") == "planned"


@pytest.mark.parametrize(
    ("chosen", "text"),
    [
        ({1: SERIAL}, "serial at 1 token"),
        ({512: SERIAL}, "serial at 512 tokens"),
        ({4: DUAL_STREAM, 1: DUAL_STREAM, 8: SERIAL}, "dual_stream at 1 to 4 tokens, serial at 8 tokens"),
        ({}, ""),
    ],
)
def test_a_choice_is_described_by_runs(chosen: dict[int, str], text: str) -> None:
    assert described(chosen) == text


# How many rows the one weight may have.


@pytest.fixture
def timing(plugin: Any) -> Any:
    """``run.timing``, beside the stand-in for vLLM and torch."""
    return importlib.import_module("vllm_gdn_plugin.run.timing")


@pytest.mark.parametrize(
    ("outputs", "hidden_size", "rows"),
    [
        (16384 + 96, 5120, [16480, 16512, 16640]),  # 27B: to 512 it would be 4 MiB
        (12288 + 64, 2048, [12352, 12416, 12544, 12800]),  # 35B-A3B
        (20480 + 128, 3072, [20608, 20736]),  # 122B-A10B: a multiple of 128 as it is
        (12800, 2048, [12800]),
        (48 + 6, 8, [64, 128, 256, 512]),
    ],
)
def test_how_many_rows_there_are_to_choose_from(timing: Any, outputs: int, hidden_size: int, rows: list[int]) -> None:
    assert timing.rows_to_choose_from(outputs, 2 * hidden_size) == rows


def test_any_number_of_rows_is_aligned_and_pads_by_little(timing: Any) -> None:
    fused = sys.modules["vllm_gdn_plugin.run.fused"]
    for outputs in range(1, 2000, 7):
        rows = timing.rows_to_choose_from(outputs, 8192)
        assert outputs <= rows[0] < outputs + fused.ROW_ALIGNMENT
        assert all(count % fused.ROW_ALIGNMENT == 0 for count in rows)
        assert all(one < other and (other - outputs) * 8192 <= fused.MOST_PADDING for one, other in pairwise(rows))


@pytest.mark.parametrize(
    ("sizes", "timed"), [([1, 2, 3, 4, 24, 256, 512], [1, 2, 4, 256]), ([3, 24, 512], None), ([], None)]
)
def test_rows_are_timed_at_powers_of_two_of_few_tokens(
    timing: Any, sizes: list[int], timed: list[int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def settled(case: Case, sizes: list[int], measure: Any) -> Any:
        asked.append((case.section, case.ways, sizes))
        return {1: {way: Time(float(way == "12352") + 1, 0) for way in case.ways}}, ""

    monkeypatch.setattr(timing, "settled", settled)
    weight = SimpleNamespace(shape=(12288, 2048), itemsize=2, dtype="torch.bfloat16")
    assert timing.rows_of(weight, 12352, sizes) == (12352 if timed is None else 12416)
    assert asked == ([] if timed is None else [("rows", ("12352", "12416", "12544", "12800"), timed)])
    assert timing.rows_of(weight, 12800, sizes) == 12800, "there is no choice"
    assert len(asked) == (timed is not None)


# dual_stream or serial.


@pytest.fixture
def layers() -> list[Any]:
    return [SimpleNamespace(in_proj_qkvz=SimpleNamespace(input_size=2048)) for _ in range(3)]


def test_ways_are_timed_at_the_captured_sizes_that_may_overlap(
    timing: Any, layers: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def settled(case: Case, sizes: list[int], measure: Any) -> Any:
        asked.append((case, sizes))
        return {1: took(dual_stream=3, serial=2), 1024: took(dual_stream=2, serial=3)}, "as told"

    monkeypatch.setattr(timing, "settled", settled)
    ways, phrase = timing.ways_of(layers, layers[:2], FACTS, [1, 1024, 1032])
    assert ways == {1: SERIAL, 1024: DUAL_STREAM}
    assert phrase == "serial at 1 token, dual_stream at 1024 tokens (as told)"
    assert asked == [(timing.projections_case(FACTS, 2048, "Stub Device"), [1, 1024])]

    for ready, sizes in (([], [1]), (layers, []), (layers, [1032])):
        assert timing.ways_of(layers, ready, FACTS, sizes) == ({}, "")
    assert len(asked) == 1


@pytest.mark.parametrize(
    "other",
    [
        replace(FACTS, quantization="0123456789abcdef"),
        replace(FACTS, batch_invariant=True),
        replace(FACTS, qkvz=replace(FP8, output_size=4096)),
        replace(FACTS, ba=replace(BA, dtype="float16")),
    ],
)
def test_layers_that_may_run_other_kernels_are_another_case(timing: Any, other: LayerFacts) -> None:
    case = timing.projections_case(FACTS, 2048)
    assert case.ways == WAYS
    assert case == timing.projections_case(replace(FACTS), 2048)
    assert len({case, timing.projections_case(other, 2048), timing.projections_case(FACTS, 4096)}) == 3


def test_check_tells_what_was_kept(timing: Any, plugin: Any, tmp_path: Path) -> None:
    plugin.vllm("envs").VLLM_CACHE_ROOT = str(tmp_path)
    assert timing.kept_ways_of(FACTS, 2048, "NVIDIA H200") == ""
    case = timing.projections_case(FACTS, 2048, "NVIDIA H200")
    times = sys.modules["vllm_gdn_plugin.tune.times"]
    times.keep(case, {8: {way: times.Time(value, 0.0) for way, value in zip(WAYS, (3, 2), strict=True)}}, tmp_path)
    assert timing.kept_ways_of(FACTS, 2048, "NVIDIA H200") == "", "that is not where times are kept"
    (tmp_path / "vllm_gdn_plugin").mkdir()
    case.file(tmp_path).replace(case.file(tmp_path / "vllm_gdn_plugin"))
    assert timing.kept_ways_of(FACTS, 2048, "NVIDIA H200") == "serial at 8 tokens"
    assert timing.kept_ways_of(FACTS, 2048, "NVIDIA H100") == ""


def test_check_tells_what_was_kept_of_the_decode(timing: Any, plugin: Any, tmp_path: Path) -> None:
    plugin.vllm("envs").VLLM_CACHE_ROOT = str(tmp_path)
    facts, device = DecodeFacts("cuda"), "NVIDIA H200"
    case = timing.decode_case(facts, 32, 8192, device)
    directory, times = tmp_path / "vllm_gdn_plugin", sys.modules["vllm_gdn_plugin.tune.times"]
    kernel = {1: 5, 2: 6, 64: 8.9}  # the last is within the margin
    kept = {tokens: {"stock": times.Time(9, 0.0), "kernel": times.Time(us, 0.0)} for tokens, us in kernel.items()}
    times.keep(case, kept, directory)
    assert timing.kept_decode_ways_of(facts, 32, 8192, device) == "kernel at 1 to 2 tokens, stock at 64 tokens"
    others = [(replace(facts, gate="sigmoid"), 32, 8192), (facts, 8, 8192), (facts, 32, 2048)]
    assert [timing.kept_decode_ways_of(*other, device) for other in others] == ["", "", ""]


# What is kept.

KEPT: Times = {1: took(dual_stream=3.0, serial=4.0), 64: took(dual_stream=6.5, serial=6.0)}


def test_times_are_kept_for_their_case_alone(tmp_path: Path) -> None:
    directory = tmp_path / "not" / "yet"
    assert recall(CASE, directory) == {}
    keep(CASE, KEPT, directory)
    assert recall(CASE, directory) == KEPT
    assert [file.suffix for file in directory.iterdir()] == [".json"], "nothing unfinished is left"
    assert OTHER.keys() == {field.name for field in fields(Case)}
    for name, value in OTHER.items():
        other = replace(CASE, **{name: value})
        assert recall(other, directory) == {}
        CASE.file(directory).replace(other.file(directory))  # as if the names of two cases were one
        assert recall(other, directory) == {}
        other.file(directory).replace(CASE.file(directory))


def test_noisy_times_are_not_kept(tmp_path: Path) -> None:
    keep(CASE, KEPT | {8: took(dual_stream=3.0) | took(1.1 * NOISE, serial=4.0)}, tmp_path)
    assert recall(CASE, tmp_path) == KEPT


@pytest.mark.parametrize(
    "damage",
    [
        lambda kept: "",
        lambda kept: kept[:-9],
        lambda kept: "[]",
        lambda kept: "null",
        lambda kept: kept.replace('"case"', '"cause"'),
        lambda kept: kept.replace('"serial": [', '"cereal": ['),
        lambda kept: kept.replace("4.0", '"fast"'),
        lambda kept: kept.replace("4.0,", ""),
        lambda kept: kept.replace("4.0", "1" + 400 * "0"),
        lambda kept: 100_000 * "[",
        lambda kept: kept.replace('"1"', '"one"'),
        lambda kept: kept.replace('"microseconds and spread": {', '"microseconds and spread": 5, "more": {'),
    ],
)
def test_a_file_that_cannot_be_used_is_as_none(tmp_path: Path, damage: Any) -> None:
    keep(CASE, KEPT, tmp_path)
    (file,) = tmp_path.iterdir()
    damaged = damage(file.read_text())
    assert damaged != file.read_text()
    file.write_text(damaged)
    assert recall(CASE, tmp_path) == {}
    file.unlink()
    file.mkdir()
    assert recall(CASE, tmp_path) == {}


def test_ranks_that_keep_their_times_at_once_leave_a_whole_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each writes a file of its own, also where two containers have one process id, and puts it in place at once."""
    written: list[Path] = []
    write = Path.write_text

    def record(self: Path, text: str, **how: Any) -> int:
        written.append(self)
        return write(self, text, **how)

    monkeypatch.setattr(Path, "write_text", record)
    for _ in range(2):
        keep(CASE, KEPT, tmp_path)
    assert all(one != other for one, other in pairwise([*written, CASE.file(tmp_path)]))
    assert json.loads(CASE.file(tmp_path).read_text())["microseconds and spread"]["64"]["serial"] == [6.0, 0.01]


class Start:
    """One start after another, each of which settles the times of :data:`CASE`."""

    def __init__(self, plugin: Any, root: Path) -> None:
        self.plugin, self.module = plugin, importlib.import_module("vllm_gdn_plugin.tune.settle")
        plugin.vllm("envs").VLLM_CACHE_ROOT = str(root)
        self.case = self.module.case_of("projections", {"hidden_size": 2048}, WAYS)
        self.timed: list[list[int]] = []

    def settled(self, sizes: list[int], spread: float = 0.0, most: int = 99) -> tuple[list[int], str]:
        """(the sizes that have times, the phrase)."""
        time: Callable[..., Any] = sys.modules["vllm_gdn_plugin.tune.times"].Time

        def measure(missing: list[int]) -> Any:
            self.timed.append(missing)
            return {tokens: {way: time(2.0, spread) for way in WAYS} for tokens in missing[:most]}

        times, phrase = self.module.settled(self.case, sizes, measure)
        return list(times), phrase


@pytest.fixture
def start(plugin: Any, tmp_path: Path) -> Start:
    return Start(plugin, tmp_path)


def test_a_case_names_the_gpu_and_what_is_installed(start: Start) -> None:
    case = start.case
    assert (case.gpu, case.vllm, case.torch, case.facts) == (
        "Stub Device",
        "0.32.0",
        "2.13.0+stub",
        (("hidden_size", 2048),),
    )


def test_the_next_start_times_only_what_is_new(start: Start) -> None:
    sizes, phrase = start.settled([1, 2, 4])
    assert (sizes, phrase.startswith("timed in ")) == ([1, 2, 4], True)
    assert start.settled([1, 2, 4]) == ([1, 2, 4], "timed at an earlier start")
    assert start.settled([1, 8])[0] == [1, 8], "2 and 4 are not captured this time"
    assert start.settled([1, 2, 4, 8])[1] == "timed at an earlier start"
    assert start.timed == [[1, 2, 4], [8]]


def test_noisy_times_are_taken_again_at_the_next_start(start: Start) -> None:
    for _ in range(2):
        assert start.settled([1], spread=1.0)[0] == [1]
    assert start.timed == [[1], [1]]


def test_sizes_for_which_there_was_no_time_are_told_and_timed_at_the_next_start(start: Start) -> None:
    sizes, phrase = start.settled([1, 2, 4], most=1)
    assert (sizes, phrase.endswith(" s, 2 sizes left out")) == ([1], True)
    start.settled([1, 2, 4])
    assert start.timed == [[1, 2, 4], [2, 4]]


def test_sizes_between_those_that_were_kept_change_nothing(start: Start) -> None:
    """What is chosen is part of vLLM's compile-cache key."""
    start.settled([1, 4])
    assert start.settled([1, 2, 4]) == ([1, 4], "timed at an earlier start")
    assert start.timed == [[1, 4]]


def test_ranks_go_by_the_times_that_were_kept_first(start: Start) -> None:
    tune = sys.modules["vllm_gdn_plugin.tune.times"]

    def measure_while_another_rank_is_quicker(missing: list[int]) -> Any:
        theirs = {1: {way: tune.Time(3.0, 0.0) for way in WAYS}}
        tune.keep(start.case, theirs, start.module.tuning_directory())
        return {1: {way: tune.Time(2.0, 0.0) for way in WAYS}}

    times, _ = start.module.settled(start.case, [1], measure_while_another_rank_is_quicker)
    assert times[1][SERIAL].microseconds == 3.0


def test_a_directory_that_cannot_be_written_costs_the_next_start_its_times(start: Start, tmp_path: Path) -> None:
    tmp_path.joinpath("vllm_gdn_plugin").touch()
    for _ in range(2):
        assert start.settled([1])[0] == [1]
    ((level, message),) = start.plugin.said
    assert (level, "not kept for the next start" in message) == ("warning", True)
    assert start.timed == [[1], [1]]
