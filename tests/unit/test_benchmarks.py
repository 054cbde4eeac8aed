"""The scripts of `benchmarks/` that need a GPU for their numbers: all that can be known without one."""

import gzip
import importlib
import importlib.util
import inspect
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def needs(*names: str) -> pytest.MarkDecorator:
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


needs_bench = needs("torch", "numpy", "scipy", "tqdm")


def script(name: str, *arguments: object, **settings: str) -> "subprocess.CompletedProcess[str]":
    line = [sys.executable, str(BENCHMARKS / name), *map(str, arguments)]
    return subprocess.run(line, env={**os.environ, **settings}, capture_output=True, text=True)


# timeline.py

STOCK = [("norm", 7, 95.0, 5.0), ("wide", 7, 100.0, 20.0), ("narrow", 7, 121.0, 6.0), ("rest", 7, 128.0, 10.0)]
DUAL = [("norm", 7, 45.0, 5.0), ("wide", 7, 50.0, 21.0), ("narrow", 13, 52.0, 9.0), ("rest", 7, 72.0, 10.0)]


def write_trace(path: Path, kernels: list[tuple[str, int, float, float]]) -> None:
    events: list[dict[str, Any]] = [
        {"ph": "X", "cat": "kernel", "name": k, "tid": s, "ts": t, "dur": d, "args": {"stream": s}}
        for k, s, t, d in reversed(kernels)
    ]
    launch = {"ph": "X", "cat": "cuda_runtime", "name": "cudaGraphLaunch", "tid": 1, "ts": 1.0, "dur": 9.0}
    events += [launch, {"ph": "M", "name": "process_name"}]
    with gzip.open(path, "wt") as file:
        json.dump({"traceEvents": events}, file)


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    """What `timeline.py record` leaves, in small."""
    write_trace(tmp_path / "off.trace.json.gz", STOCK)
    write_trace(tmp_path / "dual_stream.trace.json.gz", DUAL)
    about = {"model": "some-model", "batch": 8, "machine": {"hardware": "a GPU"}}
    (tmp_path / "record.json").write_text(json.dumps(about))
    return tmp_path


LABELS = "in_proj_qkvz,in_proj_ba,the rest"


@needs("matplotlib")
def test_from_traces_to_the_picture(recorded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from timeline import load, main, picture_of

    assert main(["list", str(recorded / "off.trace.json.gz"), "--match", "narrow"]) == 0
    assert [line.split()[0] + line.split()[-1] for line in capsys.readouterr().out.splitlines()] == [
        "0norm",
        "1wide",
        "2narrow",
        "3rest",
    ]
    small = recorded / "small.json"
    chosen = (f"off=1-3:{LABELS}", f"dual_stream=1-3:{LABELS}")
    assert main(["trim", str(recorded), str(small), *chosen]) == 0
    assert small.stat().st_size < 1000
    done = script("timeline.py", "draw", small, recorded / "picture.png")
    assert done.returncode == 0, done.stderr
    assert (recorded / "picture.png").read_bytes().startswith(b"\x89PNG")

    (axis,) = picture_of(*load(small)).axes
    assert [tick.get_text() for tick in axis.get_yticklabels()] == [
        "stock",
        "dual_stream, stream 1",
        "dual_stream, stream 2",
    ]
    bars = [(bar.get_y() + bar.get_height() / 2, bar.get_x(), bar.get_width()) for bar in axis.patches]
    assert bars == [(0, 0, 20), (0, 21, 6), (0, 28, 10), (1, 0, 21), (1, 22, 10), (2, 2, 9)]
    colors = [bar.get_facecolor() for bar in axis.patches]
    assert colors[:3] == [colors[3], colors[5], colors[4]]
    assert len(set(colors)) == 3


@needs("matplotlib")
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("list", "record.json"), "record.json is no gzipped trace"),
        (("trim", ".", "x.json", "off"), "'off' is not VARIANT=FIRST-LAST:LABEL,..."),
        (("trim", ".", "x.json", "off=1-3:one,two"), "off: 2 labels for 3 kernels"),
        (("draw", "record.json", "x.png"), "was not written by timeline.py trim"),
        (("sections", ".", "x.json", "rest", "wide", "all=."), "no kernel 'wide' follows a kernel 'rest'"),
        (("record", "model", ".", "--device", "cpu", "--strategy", "best"), "--strategy 'best' is not one of"),
    ],
)
def test_wrong_input_of_the_timeline_gets_one_line(
    recorded: Path,
    arguments: tuple[str, ...],
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from timeline import main

    monkeypatch.chdir(recorded)
    assert main(arguments) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert says in told


@needs_bench
def test_what_recurs_is_timed(recorded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from timeline import main

    parts = ("both=wide|narrow", "wide alone=wide", "rest=rest")
    machine = dict.fromkeys(("device", "hardware", "python", "vllm_gdn_plugin", "torch"), "x")
    about = {"model": "some-model", "batch": 8, "engine": {}, "date": "today", "machine": machine}
    (recorded / "record.json").write_text(json.dumps(about))
    again = [(name, stream, start + 100, duration) for name, stream, start, duration in STOCK]
    write_trace(recorded / "off.trace.json.gz", [*STOCK, ("norm", 7, 139.0, 1.0), *again, ("narrow", 7, 240.0, 1.0)])
    assert main(["sections", str(recorded), str(recorded / "times.json"), "norm", "rest", *parts]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "off: 2 sections; one of median length: 5-8",
        "dual_stream: 1 sections; one of median length: 0-3",
    ]
    found = json.loads((recorded / "times.json").read_text())
    assert found["about"] == about
    assert found["sections_us"]["off"] == {
        "from start to end": [43.0, 43.0],
        "sum of the kernels": [41.0, 41.0],
        "both": [26.0, 26.0],
        "wide alone": [0.0, 0.0],
        "rest": [10.0, 10.0],
        "other": [5.0, 5.0],
    }
    assert found["sections_us"]["dual_stream"]["from start to end"] == [37.0]
    assert found["sections_us"]["dual_stream"]["both"] == [30.0]
    table = (recorded / "times.md").read_text()
    assert "| | stock | dual_stream |" in table
    assert "| both | 26.00 (26.00 to 26.00) | 30.00 (30.00 to 30.00) |" in table
    assert "wide alone" not in table


# gpu_models.py


@needs("tokenizers", "transformers")
def test_a_model_has_its_layers_and_words_for_ids(tmp_path: Path) -> None:
    from gpu_models import make_model
    from transformers import AutoTokenizer

    from vllm_gdn_plugin.bench.shapes import shape_of_model

    config = json.loads((make_model("tiny", tmp_path, layers=8) / "config.json").read_text())
    kinds = config["text_config"]["layer_types"]
    assert (len(kinds), kinds.count("full_attention"), kinds[3], kinds[7]) == (8, 2, *["full_attention"] * 2)
    assert config["text_config"]["mamba_ssm_dtype"] == "float32"
    assert shape_of_model(str(tmp_path)).hidden == 256
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids = [318, 27, 256, 100]
    assert (len(tokenizer), tokenizer.eos_token_id) == (320, 319)
    assert tokenizer.encode(tokenizer.decode(ids), add_special_tokens=False) == ids


def test_quantised_models_are_as_in_the_field() -> None:
    """vLLM wants each part of a merged projection by name, a part of a name, or a pattern."""
    from gpu_models import QUANTIZATIONS

    found = {name: make(["linear_attention", "full_attention"]) for name, make in QUANTIZATIONS.items()}
    layer = "model.language_model.layers.0.linear_attn.in_proj_"
    assert found["fp8"]["modules_to_not_convert"] == ["lm_head", f"{layer}b", f"{layer}a"]
    assert found["awq"]["modules_to_not_convert"] == ["lm_head", "linear_attn"]
    head, pattern = found["fp8-per-token"]["ignore"]
    ignored = [part for part in ("a", "b", "qkv", "z") if re.match(pattern.removeprefix("re:"), layer + part)]
    assert (head, ignored) == ("lm_head", ["a", "b"])


def test_the_models_have_the_projections_of_the_presets() -> None:
    from gpu_models import MODELS

    from vllm_gdn_plugin.bench.shapes import PRESETS
    from vllm_gdn_plugin.decide.checkpoint import gdn_shape

    for name in ("35B-A3B", "122B-A10B", "27B", "9B"):
        shape = gdn_shape(MODELS[name] | {"num_hidden_layers": 4}, 1)
        assert (shape.hidden_size, sum(shape.qkvz), sum(shape.ba)) == PRESETS[f"Qwen3.5-{name}"]


@needs("tokenizers", "transformers")
def test_a_model_can_be_as_wide_as_one_rank(tmp_path: Path) -> None:
    from gpu_models import make_model

    from vllm_gdn_plugin.bench.shapes import shape_of_model

    shape = shape_of_model(str(make_model("9B", tmp_path, layers=4, ranks=4)))
    assert (shape.hidden, shape.qkvz, shape.ba) == (4096, 12288 // 4, 64 // 4)
    text = json.loads((tmp_path / "config.json").read_text())["text_config"]
    assert (text["num_key_value_heads"], text["intermediate_size"], text["vocab_size"]) == (1, 3072, 62080)
    shape = shape_of_model(str(make_model("35B-A3B", tmp_path, layers=4, ranks=8)))
    assert (shape.hidden, shape.qkvz, shape.ba) == (2048, 12288 // 8, 64 // 8)
    text = json.loads((tmp_path / "config.json").read_text())["text_config"]
    assert (text["num_key_value_heads"], text["moe_intermediate_size"]) == (1, 64)
    with pytest.raises(ValueError, match="linear_num_key_heads is no multiple of 4"):
        make_model("tiny", tmp_path, ranks=4)


# in_process.py

OFF_FIRST, FUSED_FIRST = ["off", "fused"], ["fused", "off"]


class TalkingEngine:
    """One of what `in_process.engines` gives, without a process: it notes what it is asked."""

    asked: list[tuple[str, Any, Any]]

    def __init__(self, name: str, answer: Any, behind: float) -> None:
        self.name, self.answer, self.behind = name, answer, behind

    def log(self) -> str:
        return "" if self.name.startswith("off") else "vllm-gdn-plugin 0.1.0: fused on 3 of 3 GDN layers"

    def ask(self, question: dict[str, Any]) -> Any:
        if "probe" in question:
            return self.answer
        if "about" in question:
            return {"startup_s": 2.0, "model_mib": 5.0}
        if "cpus" in question:
            return self.asked.append((self.name, "cpus", question["cpus"]))
        self.asked.append((self.name, question["name"], (question["seed"], question["depth"])))
        batch = question["batch"]
        first = [0.5] * (batch - 1) + [0.5 + self.behind]
        return [{"first": first, "last": [0.9] * batch, "steps": question["tokens"]}] * question["repeat"]


@pytest.fixture
def stepped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """`stepped(logprob=-1.0, ...)` is the run of two rounds of three cases in two engines, as often as `starts` has it,
    and what they were asked; those with the plugin answer the probe with that log-probability."""
    pytest.importorskip("psutil", reason="not installed: psutil")
    import in_process
    from in_process import Case, measure

    from vllm_gdn_plugin.bench.engine.results import SERVE, EngineRun
    from vllm_gdn_plugin.bench.results import Machine

    def run(
        logprob: float = -1.0,
        cpus: Sequence[int] = (),
        starts: int = 1,
        one_process: bool = False,
        behind: float = 0.0,
    ) -> Any:
        asked: list[tuple[str, Any, Any]] = []
        monkeypatch.setattr(TalkingEngine, "asked", asked, raising=False)

        @contextmanager
        def talking(variants: Any, options: Any) -> Iterator[dict[str, TalkingEngine]]:
            asked.append(("", "process", list(variants)))
            logprobs = {name: -1.0 if name.startswith("off") else logprob for name in variants}
            yield {name: TalkingEngine(name, ([7], [logprobs[name]]), behind) for name in variants}

        monkeypatch.setattr(in_process, "engines", talking)
        machine = Machine("cpu", "a CPU", "3.11", "0.1.0", "2.11", "0.26.0", None, None, 0, None)
        variants = in_process.started_often({"off": {}, "fused": {}}, starts)
        found = EngineRun(SERVE, "", "", 0, "m", [], variants, machine)
        cases = [Case("concurrency 2", 2, 8, 3, 4), Case("8 in", 1, 8, 1, 5), Case("9 in", 1, 9, 1, 5)]
        options = SimpleNamespace(cpus=cpus, one_process=one_process, directory=tmp_path, seconds=60, rounds=2)
        measure(found, cases, options)
        assert found.rounds == 2 * starts
        processes = [names for _, what, names in asked if what == "process"]
        pairs = [["off", "fused"], ["fused-2", "off-2"]][:starts]
        assert processes == (pairs if one_process else [[name] for name in variants])
        return found, [one for one in asked if one[1] != "process"]

    return run


def test_engines_are_stepped_in_turn_case_by_case_with_the_same_prompts(
    stepped: Callable[..., Any], tmp_path: Path
) -> None:
    from vllm_gdn_plugin.bench.report import load

    run, asked = stepped()
    cases = ["concurrency 2", "8 in", "9 in"]
    warm_up = [(name, case, (0, 0)) for case in cases for name in OFF_FIRST]
    rounds = [
        (name, case, (1 + 3 * number + n, depth))
        for number, (names, depth) in enumerate([(OFF_FIRST, 0), (FUSED_FIRST, 84)])
        for n, case in enumerate(cases)
        for name in names
    ]
    assert asked == warm_up + rounds
    assert run.verified == {"fused": "the same 1 tokens and log-probabilities"}
    assert run.said == {"fused": "vllm-gdn-plugin 0.1.0: fused on 3 of 3 GDN layers"}
    assert run.values("tpot_ms", "concurrency 2", "fused") == pytest.approx({0: 200.0, 1: 200.0})
    assert run.values("ttft_ms", "9 in", "off") == pytest.approx({0: 500.0, 1: 500.0})
    assert run.values("model_mib", "start", "off") == {0: 5.0}
    assert load(tmp_path / "serve.json").values("ttft_ms", "9 in", "off") == {0: 500.0, 1: 500.0}, "kept each round"


def test_what_is_called_at_a_depth_has_so_many_callers_more() -> None:
    pytest.importorskip("psutil", reason="not installed: psutil")
    from in_process import at_depth

    def callers() -> int:
        return len(inspect.stack())

    assert [at_depth(depth, callers) - at_depth(0, callers) for depth in (0, 1, 135)] == [0, 1, 135]


def test_engines_of_a_further_start_are_stepped_after_the_first(stepped: Callable[..., Any]) -> None:
    apart, asked_apart = stepped(starts=2, cpus=(1, 3))
    run, asked = stepped(starts=2, cpus=(1, 3), one_process=True)
    assert asked == asked_apart
    assert run.samples == [sample for sample in apart.samples if sample.case != "start"]
    assert list(run.variants) == ["off", "fused", "off-2", "fused-2"]
    assert set(run.verified) == {"fused", "off-2", "fused-2"}
    assert set(run.said) == {"fused", "fused-2"}
    assert [one for one in asked if one[1] == "cpus"] == [(name, "cpus", (1, 3)) for name in run.variants]
    by_start = {name: list(run.values("ttft_ms", "8 in", name)) for name in run.variants}
    assert by_start == {"off": [0, 1], "fused": [0, 1], "off-2": [2, 3], "fused-2": [2, 3]}


def test_a_case_whose_requests_wait_for_each_other_is_left_out(stepped: Callable[..., Any]) -> None:
    run, _ = stepped(behind=0.1)
    assert run.cases("tpot_ms") == []
    assert run.cases("ttft_ms") == ["8 in", "9 in"]
    assert "concurrency 2 left out: not all requests ran at once" in run.load


def test_with_speculation_a_step_is_told_beside_the_time_per_token() -> None:
    pytest.importorskip("psutil", reason="not installed: psutil")
    from in_process import Case

    case = Case("concurrency 2", 2, 8, 5, 1)
    values = case.values([{"first": [1.0, 1.0], "last": [1.2, 1.4], "steps": 3}])
    assert values == pytest.approx({"tpot_ms": 75.0, "step_ms": 200.0})
    assert case.values([{"first": [1.0, 1.0], "last": [1.4, 1.4], "steps": 5}]) == pytest.approx({"tpot_ms": 100.0})


def test_an_engine_has_its_own_part_of_the_log(tmp_path: Path) -> None:
    pytest.importorskip("psutil", reason="not installed: psutil")
    from in_process import BUILDS, Engine

    log = tmp_path / "off+fused+off-2.log"
    log.write_text(f"{BUILDS}off\nstock\n{BUILDS}fused\nplugin\nmore\n{BUILDS}off-2\nagain\n")
    logs = {name: Engine(name, cast("Any", None), log).log() for name in ("off", "fused", "off-2")}
    assert logs == {"off": "stock\n", "fused": "plugin\nmore\n", "off-2": "again\n"}


def test_a_wrong_answer_ends_the_measurement_of_steps(stepped: Callable[..., Any]) -> None:
    from vllm_gdn_plugin.bench.errors import WrongResult

    with pytest.raises(WrongResult, match="fused: its answer is not the stock engine's"):
        stepped(logprob=-3.0)


@needs("torch", "numpy", "scipy", "matplotlib", "psutil")
def test_steps_that_were_measured_are_kept_when_it_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import in_process

    def measure(run: Any, *_: Any) -> None:
        run.add(0, "off", "concurrency 1", {"tpot_ms": 1.0})
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(in_process, "measure", measure)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        engine = '{"kv_cache_memory_bytes": 1}'
        status = in_process.main(["model", str(tmp_path), "--device", "cpu", "--engine", engine])
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    kept = json.loads((tmp_path / "serve.json").read_text())
    assert (status, kept["stopped"]) == (130, "interrupted")
    assert kept["samples"] == {"concurrency 1": {"off": {"tpot_ms": [1.0]}}}
    assert "**not complete**: interrupted" in (tmp_path / "serve.md").read_text()


def test_an_engine_that_is_gone_is_named(tmp_path: Path) -> None:
    pytest.importorskip("psutil", reason="not installed: psutil")
    from in_process import Engine

    from vllm_gdn_plugin.bench.errors import BadInput

    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=-1, stdout=-1, text=True) as going:
        engine = Engine("fused", going, tmp_path / "off+fused.log")
        for _ in range(2):  # it ends while it is asked, and is asked once it has ended
            with pytest.raises(BadInput, match=r"off\+fused: the process is gone, see .*off\+fused\.log"):
                engine.ask({"probe": True})
            going.wait()
        with suppress(BrokenPipeError):
            going.stdin.close()


@needs("psutil")
@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--concurrency", "1,x"), "--concurrency '1,x' is not whole numbers"),
        (("--engine", "{"), "--engine '{' is no JSON object"),
        (("--engine", "{}"), "--engine needs kv_cache_memory_bytes: else each engine takes what it finds free"),
        (("--cpus", "0,99999"), "--cpus: this process may not run on 99999"),
        (("--output-len", "1"), "--output-len 1: one token has no time per output token"),
        (("--strategy", "quick"), "--strategy 'quick' is not one of auto, fused, dual_stream"),
    ],
)
def test_wrong_options_of_the_steps(
    options: tuple[str, ...], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from in_process import main

    engine = () if "--engine" in options else ("--engine", '{"kv_cache_memory_bytes": 1}')
    with pytest.raises(SystemExit) as stop:
        main(["model", str(tmp_path), *engine, *options])
    assert stop.value.code == 2
    assert says in capsys.readouterr().err.splitlines()[-1]


# keep.py


@needs("numpy", "scipy")
def test_what_is_kept_has_medians_and_intervals_and_samples_only_where_they_are_few(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import keep

    from vllm_gdn_plugin.bench.engine.results import SERVE, EngineRun
    from vllm_gdn_plugin.bench.report import load
    from vllm_gdn_plugin.bench.results import Machine

    monkeypatch.setattr(keep, "RESULTS", tmp_path)
    machine = Machine("cpu", "a CPU", "3.11", "0.1.0", "2.11")
    run = EngineRun(SERVE, "the command", "", 12, "m", [], {"off": {}, "auto": {}}, machine)
    for number in range(12):
        run.add(number, "off", "concurrency 1", {"tpot_ms": 10.0})
        run.add(number, "auto", "concurrency 1", {"tpot_ms": 9.5})
    run.save(tmp_path / "raw.json")
    keep.keep([tmp_path / "raw.json"], "kept")
    kept = json.loads((tmp_path / "kept.json").read_text())
    cell = {"median": 9.5, "low": 9.5, "high": 9.5, "samples": 12, "change": [-5.0, -5.0, -5.0]}
    assert kept["summary"]["tpot_ms"]["concurrency 1"]["auto"] == cell
    assert kept["command"] == "the command"
    assert load(tmp_path / "kept.json") == load(tmp_path / "raw.json")
    assert "-5.0 %" in (tmp_path / "kept.md").read_text()
    monkeypatch.setattr(keep, "SAMPLES_KB", 0)
    keep.keep([tmp_path / "raw.json"], "kept")
    assert "samples" not in json.loads((tmp_path / "kept.json").read_text())


@needs("numpy", "scipy")
def test_the_runs_of_several_models_become_one_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import keep

    from vllm_gdn_plugin.bench.results import LAYER, Machine, Point, Run
    from vllm_gdn_plugin.bench.shapes import Shape

    monkeypatch.setattr(keep, "RESULTS", tmp_path)
    for name, precision in (("one", "bf16"), ("two", "bf16"), ("three", "fp8")):
        times = {LAYER.baseline: [2.0, 2.0, 2.0], LAYER.limit: [1.0, 1.0, 1.0]}
        run = Run(f"bench {name}", "", precision, 0, 3, Machine("cpu", "a CPU", "3.11", "0.1.0", "2.11"), LAYER)
        run.points = [Point(Shape(name, 64, 32, 8), 1, 16, dict.fromkeys(times, 1), times)]
        run.save(tmp_path / f"{name}.json")
    keep.keep([tmp_path / "one.json", tmp_path / "two.json"], "kept")
    kept = json.loads((tmp_path / "kept.json").read_text())
    assert list(kept["summary"]) == ["one, TP 1", "two, TP 1"]
    assert kept["command"] == "bench one; bench two"
    assert "### two, TP 1" in (tmp_path / "kept.md").read_text()
    with pytest.raises(ValueError, match="does not go with"):
        keep.keep([tmp_path / "one.json", tmp_path / "three.json"], "kept")
    with pytest.raises(ValueError, match="a shape that another file has"):
        keep.keep([tmp_path / "one.json", tmp_path / "one.json"], "kept")


# switch_plugin.py, and what the machine is called


@pytest.mark.parametrize("before", [None, "another"])
def test_an_engine_after_stock_has_the_process_s_own_list_of_plugins(
    before: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its worker processes read it."""
    import switch_plugin

    from vllm_gdn_plugin.bench.engine.variants import STRATEGY
    from vllm_gdn_plugin.host.plugins import PLUGINS

    registered: list[str | None] = []
    monkeypatch.setattr(switch_plugin.imports, "stop_watching", lambda: None)
    monkeypatch.setattr(switch_plugin, "register", lambda: registered.append(os.environ.get(PLUGINS)))
    monkeypatch.setattr(switch_plugin, "BEFORE", {} if before is None else {PLUGINS: before})
    monkeypatch.setenv(PLUGINS, "")
    monkeypatch.setenv(STRATEGY, "serial")
    switch_plugin.switch_plugin({PLUGINS: ""})
    assert (os.environ[PLUGINS], STRATEGY in os.environ, registered) == ("", False, [])
    switch_plugin.switch_plugin({STRATEGY: "auto"})
    assert (os.environ.get(PLUGINS), os.environ[STRATEGY], registered) == (before, "auto", [before])


@needs("psutil")
@pytest.mark.parametrize(
    ("visible", "named"), [(None, "2 x A GPU"), ("1", "A GPU"), ("MIG-1", "2 x A GPU")], ids=["all", "one", "by a name"]
)
def test_the_machine_is_the_gpus_that_this_process_may_use(
    visible: str | None, named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm_gdn_plugin.bench import machine

    tool = tmp_path / "nvidia-smi"
    each = 'case "$*" in *--id=MIG*) echo no such device; exit 6;; *--id=1*) ;; *) echo A GPU;; esac'
    tool.write_text(f"#!/bin/sh\n{each}\necho A GPU\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert machine._gpus() == named
