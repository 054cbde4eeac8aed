"""What is made of the times of a GPU. The times themselves are taken in tests/gpu."""

from __future__ import annotations

import json
import sys
import weakref
from dataclasses import fields, replace
from itertools import pairwise
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import vllm_gdn_plugin
from vllm_gdn_plugin import host
from vllm_gdn_plugin.decide.checkpoint import digest
from vllm_gdn_plugin.decide.plan import (
    DUAL_STREAM,
    FUSED,
    NARROW_KERNEL,
    PADDED_TO,
    SERIAL,
    LayerFacts,
    ProjectionFacts,
)
from vllm_gdn_plugin.decide.plan import NARROW_KERNEL_MAX_TOKENS as MOST
from vllm_gdn_plugin.decide.scratch import UNQUANTIZED
from vllm_gdn_plugin.tune import times as tuning
from vllm_gdn_plugin.tune.times import (
    NOISE,
    TWO_STREAMS,
    Case,
    Times,
    Tuner,
    case_of,
    described,
    fastest,
    keep,
    recall,
    without_narrow_kernel,
)

BF16 = ProjectionFacts(UNQUANTIZED, "bfloat16", 12288)
BA = replace(BF16, output_size=64)
FP8 = replace(BF16, linear_method="Fp8LinearMethod")
FACTS = LayerFacts("cuda", BF16, BA, "bfloat16")
ALL = (FUSED, *PADDED_TO, DUAL_STREAM, SERIAL)
TO_128, TO_256, TO_512 = PADDED_TO
MIXED = (DUAL_STREAM, NARROW_KERNEL, SERIAL)
CASE = Case("NVIDIA H200", "580.1", "2.11.0", "0.26.0", "0.1.0", 2048, BF16, BA, "", False, ALL)
OTHER: dict[str, Any] = {
    "gpu": "NVIDIA H100",
    "driver": "",
    "torch": "2.13.0",
    "vllm": "0.27.0",
    "plugin": "0.2.0",
    "hidden_size": 4096,
    "qkvz": replace(BF16, output_size=3072),
    "ba": replace(BA, dtype="float16"),
    "quantization": "0123456789abcdef",
    "batch_invariant": True,
    "ways": (FUSED, SERIAL),
}


def at(fused: float, dual_stream: float, serial: float, **padded: float) -> dict[str, float]:
    """Of the padded ways, those that are not given take as long as fused."""
    return {FUSED: fused, **dict.fromkeys(PADDED_TO, fused), **padded, DUAL_STREAM: dual_stream, SERIAL: serial}


@pytest.mark.parametrize(
    ("microseconds", "ways", "chosen"),
    [
        (at(44.07, 41.70, 48.57), ALL, FUSED),  # 27B on an H200
        (at(44.07, 39.60, 48.57), ALL, DUAL_STREAM),
        (at(44.07, 41.70, 43.57), ALL, DUAL_STREAM),  # the first is slower than serial
        (at(16.89, 20.59, 22.35), ALL, FUSED),
        (at(12, 11, 10), ALL, SERIAL),
        (at(100, 99.5, 99.9), ALL, FUSED),
        (at(100, 98.5, 98.7), ALL, DUAL_STREAM),
        (at(100, 98.7, 98.5), ALL, SERIAL),
        (at(100, 98.5, 99.5), ALL, FUSED),
        (at(0, 20, 19), (DUAL_STREAM, SERIAL), SERIAL),
        (at(0, 20, 19.5), (DUAL_STREAM, SERIAL), DUAL_STREAM),
    ],
)
def test_the_planned_way_is_kept_unless_another_is_clearly_faster(
    microseconds: dict[str, float], ways: tuple[str, ...], chosen: str
) -> None:
    assert fastest({8: microseconds}, ways) == {8: chosen}


@pytest.mark.parametrize(
    ("microseconds", "chosen"),
    [
        (at(100, 200, 200, fused_to_256=98.9), TO_256),
        (at(100, 200, 200, fused_to_256=99.1), FUSED),
        (at(100, 200, 200, fused_to_128=95, fused_to_256=94, fused_to_512=97), TO_256),
        (at(100, 200, 200, fused_to_128=99.1, fused_to_256=98.9, fused_to_512=98.8), TO_512),
        (at(100, 81.1, 200, fused_to_128=90), TO_128),
        (at(100, 80.9, 200, fused_to_128=90), DUAL_STREAM),
        (at(100, 200, 89.2, fused_to_128=90), TO_128),
        (at(100, 200, 89, fused_to_128=90), SERIAL),
        (at(100, 88.5, 89, fused_to_128=90), DUAL_STREAM),  # as it is faster than serial, which is taken otherwise
        (at(100, 200, 98.9, fused_to_128=98.95), TO_128),
        (at(100, 200, 98.9, fused_to_128=99.1), SERIAL),
        (at(100, 89.9, 200, fused_to_128=99.1), DUAL_STREAM),
        (at(100, 90.1, 200, fused_to_128=99.1), FUSED),
    ],
)
def test_one_gemm_is_compared_with_itself_padded_and_the_faster_of_these_with_two(
    microseconds: dict[str, float], chosen: str
) -> None:
    assert fastest({8: microseconds}, ALL) == {8: chosen}


def test_the_narrow_kernel_is_for_few_tokens(tmp_path: Path) -> None:
    few = {NARROW_KERNEL: 2.0, DUAL_STREAM: 3.0, SERIAL: 4.0}
    times: Times = {MOST: few, MOST + 1: {DUAL_STREAM: 3.0, SERIAL: 4.0}}
    assert fastest(times, MIXED) == {MOST: NARROW_KERNEL, MOST + 1: DUAL_STREAM}
    case = replace(CASE, ways=MIXED)
    keep(case, times, tmp_path)
    assert recall(case, tmp_path) == times
    keep(case, {MOST: times[MOST + 1]}, tmp_path)
    assert recall(case, tmp_path) == {}, "a way is missing"


ANY_TIME = st.floats(1, 1e4)
NEARLY_EQUAL = st.floats(85, 115)


@given(
    st.dictionaries(
        st.integers(1, 512),
        st.one_of(st.builds(at, *[time] * 3, **dict.fromkeys(PADDED_TO, time)) for time in (ANY_TIME, NEARLY_EQUAL)),
    )
)
def test_nothing_chosen_is_slower_than_serial_beyond_the_margin(times: Times) -> None:
    chosen = fastest(times, ALL)
    assert chosen.keys() == times.keys()
    for tokens, way in chosen.items():
        assert all(times[tokens][way] * (1 - NOISE[FUSED]) <= times[tokens][other] for other in (SERIAL, *PADDED_TO))
        assert times[tokens][way] * (1 - TWO_STREAMS) <= times[tokens][DUAL_STREAM]


@pytest.mark.parametrize(
    ("chosen", "text"),
    [
        ({1: FUSED}, "fused at 1 token"),
        ({512: FUSED}, "fused at 512 tokens"),
        ({4: DUAL_STREAM, 1: DUAL_STREAM, 8: FUSED}, "dual_stream at 1 to 4 tokens, fused at 8 tokens"),
        ({1: FUSED, 2: SERIAL, 4: FUSED, 8: FUSED}, "fused at 1 token, serial at 2 tokens, fused at 4 to 8 tokens"),
        ({1: FUSED, 2: TO_512, 4: TO_128, 8: TO_512}, "fused at 1 to 8 tokens, padded at 3 of 4 sizes"),
        ({1: TO_128, 2: TO_128}, "fused at 1 to 2 tokens, padded at 2 of 2 sizes"),
        (
            {1: TO_256, 2: SERIAL, 4: TO_256, 8: FUSED},
            "fused at 1 token, serial at 2 tokens, fused at 4 to 8 tokens, padded at 2 of 4 sizes",
        ),
    ],
)
def test_a_choice_is_described_by_runs(chosen: dict[int, str], text: str) -> None:
    assert described(chosen) == text


TIMES: Times = {1: at(3, 2, 4), 64: at(5.5, 6, 7)}


def test_times_are_kept_for_their_case_alone(tmp_path: Path) -> None:
    directory = tmp_path / "not" / "yet"
    assert recall(CASE, directory) == {}
    keep(CASE, TIMES, directory)
    assert recall(CASE, directory) == TIMES
    assert [file.suffix for file in directory.iterdir()] == [".json"], "nothing unfinished is left"
    assert OTHER.keys() == {field.name for field in fields(Case)}
    for name, value in OTHER.items():
        other = replace(CASE, **{name: value})
        assert recall(other, directory) == {}
        CASE.file(directory).replace(other.file(directory))  # as if the names of two cases were one
        assert recall(other, directory) == {}
        other.file(directory).replace(CASE.file(directory))


@pytest.mark.parametrize(
    "damage",
    [
        lambda kept: "",
        lambda kept: kept[:-9],
        lambda kept: "[]",
        lambda kept: "null",
        lambda kept: kept.replace('"case"', '"cause"'),
        lambda kept: kept.replace('"fused": 3', '"fussed": 3'),
        lambda kept: kept.replace('"fused": 3', '"fused": "fast"'),
        lambda kept: kept.replace('"fused": 3', '"fused": 1' + 400 * "0"),
        lambda kept: 100_000 * "[",
        lambda kept: kept.replace('"1"', '"one"'),
        lambda kept: kept.replace('"microseconds": {', '"microseconds": 5, "more": {'),
    ],
)
def test_a_file_that_cannot_be_used_is_as_none(tmp_path: Path, damage: Any) -> None:
    keep(CASE, TIMES, tmp_path)
    (file,) = tmp_path.iterdir()
    damaged = damage(file.read_text())
    assert damaged != file.read_text()
    file.write_text(damaged)
    assert recall(CASE, tmp_path) == {}
    file.unlink()
    file.mkdir()
    assert recall(CASE, tmp_path) == {}


class Layer:
    def __init__(self, prefix: str, strategy: str, max_tokens: int) -> None:
        self.prefix, self.gdn_strategy, self.gdn_max_tokens = prefix, strategy, max_tokens
        self.gdn_tuned: dict[int, str] = {}
        self.in_proj_qkvz = SimpleNamespace(input_size=2048)
        self.in_proj_ba = SimpleNamespace(weight=f"the weight of {prefix}")


class Engine:
    """A tuner in an engine that captures ``sizes``, on a GPU that takes ``takes`` for everything."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sizes: tuple[int, ...] = (4, 1, 2)
        self.takes = at(3, 2, 4)
        self.timed: list[tuple[list[Any], Case, list[int]]] = []
        self.said: list[tuple[str, str]] = []
        self.prepared = 0
        self.tuner = Tuner()
        ways = ModuleType("vllm_gdn_plugin.tune.ways")
        ways.timed = self._time  # type: ignore[attr-defined]
        torch = ModuleType("torch")
        torch.__version__ = "2.11.0"  # type: ignore[attr-defined]
        narrow = ModuleType("vllm_gdn_plugin.run.narrow")
        self.prepared_for: list[Any] = []
        self.kernel_fails = False
        narrow.prepare = self._prepare  # type: ignore[attr-defined]
        monkeypatch.setattr(vllm_gdn_plugin, "narrow", narrow, raising=False)
        for module in (ways, torch, narrow):
            monkeypatch.setitem(sys.modules, module.__name__, module)
        for name, value in {
            "captured_sizes": lambda: self.sizes,
            "gpu": lambda: "NVIDIA H200",
            "driver": lambda: "580.1",
            "version": lambda: "0.26.0",
            "tuning_directory": lambda: directory,
            "prepare_aux_stream": lambda: setattr(self, "prepared", self.prepared + 1),
        }.items():
            monkeypatch.setattr(host, name, value)
        monkeypatch.setattr(tuning, "warn_once", lambda *line: self.said.append(line))

    def _prepare(self, weight: Any) -> None:
        if self.kernel_fails:
            raise OSError("there is no C compiler")
        self.prepared_for.append(weight)

    def _time(self, layers: list[Any], case: Case, sizes: list[int]) -> Times:
        self.timed.append((layers, case, sizes))
        self.prepared = 0  # timing gives the workspaces back
        return dict.fromkeys(sizes, self.takes)

    def layers(self, count: int, facts: LayerFacts = FACTS, max_tokens: int = 1024) -> list[Any]:
        strategy = FUSED if facts.qkvz.linear_method == UNQUANTIZED else DUAL_STREAM
        made = [Layer(f"{strategy}.{i}", strategy, max_tokens) for i in range(count)]
        for layer in made:
            self.tuner.add(layer, facts)
        return made


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Engine:
    return Engine(tmp_path, monkeypatch)


def test_loaded_layers_are_timed_once_and_all_get_the_choice(engine: Engine, tmp_path: Path) -> None:
    layers = engine.layers(3)
    phrase = engine.tuner.run(layers[-1])
    ((ready, case, sizes),) = engine.timed
    assert ready == layers[:2], "the projections of the last layer are not yet processed"
    assert (case, sizes) == (replace(CASE, plugin=case.plugin), [1, 2, 4])
    assert all(layer.gdn_tuned == {1: DUAL_STREAM, 2: DUAL_STREAM, 4: DUAL_STREAM} for layer in layers)
    assert phrase.startswith("dual_stream at 1 to 4 tokens (timed in ")
    assert recall(case, tmp_path) == dict.fromkeys((1, 2, 4), engine.takes)
    assert engine.prepared == 1, "the captures to come find the auxiliary stream's workspace in place"
    assert engine.prepared_for == [], "fused layers have no use for the narrow kernel"
    assert engine.tuner.run(layers[-1]) == "", "a reload times nothing"
    assert len(engine.timed) == 1
    assert engine.said == []


def test_the_next_start_times_only_what_is_new(engine: Engine) -> None:
    first = engine.layers(2)
    engine.tuner.run(first[-1])
    again = engine.layers(2)
    assert engine.tuner.run(again[-1]) == "dual_stream at 1 to 4 tokens (timed at an earlier start)"
    assert again[0].gdn_tuned == first[0].gdn_tuned
    assert engine.prepared == 2, "another start, another process"
    engine.sizes, engine.takes = (1, 8, 16), at(2, 3, 4)
    layers = engine.layers(2)
    phrase = engine.tuner.run(layers[-1])
    assert [sizes for *_, sizes in engine.timed] == [[1, 2, 4], [8, 16]]
    assert layers[0].gdn_tuned == {1: DUAL_STREAM, 8: FUSED, 16: FUSED}, "2 and 4 are not captured this time"
    assert phrase.startswith("dual_stream at 1 token, fused at 8 to 16 tokens (timed in ")


def test_one_gemm_padded_is_chosen_and_kept_like_any_way(engine: Engine) -> None:
    engine.takes = at(3, 3, 4, fused_to_256=2)
    for how in ("in 0.0 s", "at an earlier start"):
        layers = engine.layers(2)
        assert engine.tuner.run(layers[-1]) == f"fused at 1 to 4 tokens, padded at 3 of 3 sizes (timed {how})"
        assert all(layer.gdn_tuned == dict.fromkeys((1, 2, 4), TO_256) for layer in layers)
    assert len(engine.timed) == 1
    assert engine.prepared == 0, "no graph has two streams"


def test_what_cannot_be_timed_in_its_time_stays_planned(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["vllm_gdn_plugin.tune.ways"], "timed", lambda *case: {1: engine.takes})
    layers = engine.layers(2)
    engine.tuner.run(layers[-1])
    assert layers[0].gdn_tuned == {1: DUAL_STREAM}


def test_layers_of_two_kinds_are_timed_apart(engine: Engine) -> None:
    engine.takes = at(3, 2, 4) | {NARROW_KERNEL: 3}
    one, two = engine.layers(2), engine.layers(2, MIXED_FACTS)
    phrase = engine.tuner.run(two[-1])
    assert [(layers, case.ways) for layers, case, _ in engine.timed] == [
        (one, ALL),
        (two[:1], MIXED),
    ]
    assert phrase.count("timed in") == 2


MIXED_FACTS = replace(FACTS, qkvz=FP8)
NARROW_IS = {
    "faster": {DUAL_STREAM: 3.0, NARROW_KERNEL: 2, SERIAL: 4},
    "slower": {DUAL_STREAM: 2.0, NARROW_KERNEL: 3, SERIAL: 4},
}


@pytest.mark.parametrize("narrow_is", NARROW_IS)
def test_the_narrow_kernel_is_ready_where_it_is_timed_or_taken_and_else_costs_a_start_nothing(
    engine: Engine, narrow_is: str
) -> None:
    engine.takes = NARROW_IS[narrow_is]
    taken = NARROW_KERNEL if narrow_is == "faster" else DUAL_STREAM
    for start in (1, 2):
        layers = engine.layers(2, MIXED_FACTS)
        assert engine.tuner.run(layers[-1]).startswith(f"{taken} at 1 to 4 tokens (timed ")
        assert layers[0].gdn_tuned == dict.fromkeys((1, 2, 4), taken)
        times = start if narrow_is == "faster" else 1
        assert engine.prepared_for == times * ["the weight of dual_stream.0"], "the last one's may not be ready"
    assert len(engine.timed) == 1
    assert engine.said == []


def test_the_narrow_kernel_is_ready_for_a_single_layer_that_takes_it(engine: Engine) -> None:
    engine.takes = NARROW_IS["faster"]
    several = engine.layers(2, MIXED_FACTS)
    engine.tuner.run(several[-1])
    (layer,) = engine.layers(1, MIXED_FACTS)
    assert engine.tuner.run(layer).startswith("narrow_kernel at 1 to 4 tokens (timed at an earlier start)")
    assert len(engine.prepared_for) == 2


def test_a_narrow_kernel_that_does_not_run_here_is_left_out_and_said(engine: Engine) -> None:
    engine.takes = {DUAL_STREAM: 3, SERIAL: 4}
    engine.kernel_fails = True
    for how in ("in 0.0 s", "at an earlier start"):
        layers = engine.layers(2, MIXED_FACTS)
        assert engine.tuner.run(layers[-1]) == f"dual_stream at 1 to 4 tokens (timed {how})"
        assert layers[0].gdn_tuned == dict.fromkeys((1, 2, 4), DUAL_STREAM)
        assert engine.timed[0][1].ways == (DUAL_STREAM, SERIAL)
        assert engine.said.pop() == (
            "narrow_kernel does not run here and is left out",
            "unexpected OSError: there is no C compiler",
        )
    assert len(engine.timed) == 1
    assert engine.said == []


def test_a_narrow_kernel_that_runs_no_longer_is_not_taken_by_its_times(engine: Engine) -> None:
    engine.takes = NARROW_IS["faster"]
    several = engine.layers(2, MIXED_FACTS)
    engine.tuner.run(several[-1])
    engine.kernel_fails = True
    layers = engine.layers(2, MIXED_FACTS)
    engine.tuner.run(layers[-1])
    assert layers[0].gdn_tuned == dict.fromkeys((1, 2, 4), DUAL_STREAM)


def test_the_auxiliary_stream_is_prepared_after_the_last_case_was_timed(engine: Engine) -> None:
    """The first case takes two streams, and timing the second one, which does not, gives their workspace back."""
    first, second = engine.layers(2), engine.layers(2, MIXED_FACTS)
    time = sys.modules["vllm_gdn_plugin.tune.ways"].timed

    def timed(layers: list[Any], case: Case, sizes: list[int]) -> Times:
        engine.takes = at(3, 2, 4) if case.ways == ALL else {DUAL_STREAM: 3, NARROW_KERNEL: 3, SERIAL: 2}
        return time(layers, case, sizes)  # type: ignore[no-any-return]

    sys.modules["vllm_gdn_plugin.tune.ways"].timed = timed  # type: ignore[attr-defined]
    engine.tuner.run(second[-1])
    assert [layers[0].gdn_tuned[1] for layers in (first, second)] == [DUAL_STREAM, SERIAL]
    assert engine.prepared == 1


def test_a_layer_that_went_back_to_serial_is_left_alone(engine: Engine) -> None:
    layers = engine.layers(3)
    layers[0].gdn_strategy = SERIAL
    engine.tuner.run(layers[-1])
    assert engine.timed[0][0] == layers[1:2]
    assert [bool(layer.gdn_tuned) for layer in layers] == [False, True, True]


@pytest.mark.parametrize(
    ("facts", "sizes", "max_tokens", "timed"),
    [
        (FACTS, (1, 2, 4), 2, [1, 2]),
        (FACTS, (), 1024, None),
        (FACTS, (8, 16), 2, None),
        (replace(FACTS, cuda_graphs=False), (1, 2), 1024, None),
        (replace(FACTS, platform="cpu"), (1, 2), 1024, None),
        (replace(FACTS, offload=True, qkvz=FP8), (1, 2), 1024, None),
    ],
    ids=["some sizes are too large", "no captured sizes", "all are too large", "no CUDA graphs", "a CPU", "offload"],
)
def test_only_what_can_be_chosen_is_timed(
    engine: Engine, facts: LayerFacts, sizes: tuple[int, ...], max_tokens: int, timed: list[int] | None
) -> None:
    engine.sizes = sizes
    layers = engine.layers(2, facts, max_tokens)
    assert engine.tuner.add(layers[-1], facts) == (() if timed is None else ALL), "for these the layer makes room"
    engine.tuner.run(layers[-1])
    assert [sizes for *_, sizes in engine.timed] == ([] if timed is None else [timed])


def test_an_engine_that_failed_to_load_is_neither_kept_nor_timed(engine: Engine) -> None:
    failed = engine.layers(5)
    still_there = failed.pop(0)
    gone = weakref.ref(failed[-1])
    failed.clear()
    assert gone() is None
    layers = engine.layers(3)
    engine.tuner.run(layers[-1])
    ((ready, *_),) = engine.timed
    assert ready == layers[:2]
    assert still_there.gdn_tuned == {}


def test_one_layer_alone_is_not_timed(engine: Engine) -> None:
    (layer,) = engine.layers(1)
    assert engine.tuner.run(layer) == ""
    assert (engine.timed, engine.said, layer.gdn_tuned) == ([], [], {})


@pytest.mark.parametrize("step", ["captured_sizes", "gpu", "tuning_directory", "timed"])
def test_whatever_fails_the_plan_stands_and_a_line_says_why(
    engine: Engine, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> Any:
        raise ZeroDivisionError("planted")

    monkeypatch.setattr(sys.modules["vllm_gdn_plugin.tune.ways"] if step == "timed" else host, step, fail)
    layers = engine.layers(2)
    assert engine.tuner.add(layers[-1], FACTS) == (() if step in ("captured_sizes", "gpu") else ALL)
    assert engine.tuner.run(layers[-1]) == ""
    assert all(layer.gdn_tuned == {} for layer in layers)
    assert set(engine.said) == {(tuning.UNTIMED, "unexpected ZeroDivisionError: planted")}


def test_where_the_second_stream_cannot_be_prepared_the_times_stand_and_a_line_says_so(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise ZeroDivisionError("planted")

    monkeypatch.setattr(host, "prepare_aux_stream", fail)
    layers = engine.layers(2)
    assert engine.tuner.run(layers[-1]).startswith("dual_stream at 1 to 4 tokens (timed in ")
    assert layers[0].gdn_tuned == dict.fromkeys((1, 2, 4), DUAL_STREAM)
    ((what, why),) = engine.said
    assert "left to the first capture" in what
    assert why == "unexpected ZeroDivisionError: planted"


def test_a_directory_that_cannot_be_written_costs_the_next_start_its_times(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tmp_path.joinpath("file").touch()
    monkeypatch.setattr(host, "tuning_directory", lambda: tmp_path / "file" / "below")
    layers = engine.layers(2)
    assert engine.tuner.run(layers[-1])
    assert layers[0].gdn_tuned
    ((what, _),) = engine.said
    assert "not kept for the next start" in what


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
        keep(CASE, TIMES, tmp_path)
    assert all(one != other for one, other in pairwise([*written, CASE.file(tmp_path)]))
    assert json.loads(CASE.file(tmp_path).read_text())["microseconds"]["64"] == TIMES[64]


def test_the_case_of_a_layer_is_the_one_that_check_asks_for(engine: Engine) -> None:
    layers = engine.layers(2)
    engine.tuner.run(layers[-1])
    assert engine.timed[0][1] == case_of(FACTS, 2048, "NVIDIA H200")


def test_layers_of_another_quantisation_are_another_case(engine: Engine) -> None:
    """compressed-tensors, say, has one linear method for every precision."""
    cases = [case_of(replace(FACTS, quantization=digest({"bits": bits})), 2048, "NVIDIA H200") for bits in (4, 8)]
    assert cases[0] != cases[1]


def test_layers_of_a_batch_invariant_engine_are_another_case(engine: Engine) -> None:
    """Its layers run other kernels, and without the narrow kernel there may be the same ways to choose from."""
    cases = [case_of(replace(MIXED_FACTS, batch_invariant=on), 2048, "NVIDIA H200") for on in (False, True)]
    assert without_narrow_kernel(cases[0]).ways == cases[1].ways
    assert without_narrow_kernel(cases[0]) != cases[1]
