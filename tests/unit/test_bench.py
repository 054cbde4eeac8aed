"""The bench: its statistics, its verification, its files, and what it says to wrong input."""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from vllm_gdn_plugin.bench.errors import BadInput, WrongResult
from vllm_gdn_plugin.bench.report import load
from vllm_gdn_plugin.bench.results import QKVZ, Machine, Point, Run
from vllm_gdn_plugin.bench.shapes import Shape, distinct, preset_shapes, shape_of_model, shape_of_text
from vllm_gdn_plugin.cli.main import main
from vllm_gdn_plugin.decide.plan import DUAL_STREAM, FUSED, SERIAL


def needs(*names: str) -> pytest.MarkDecorator:
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


needs_statistics = needs("numpy", "scipy")
needs_report = needs("numpy", "scipy", "matplotlib")
needs_torch = needs("torch")
needs_all = needs("torch", "numpy", "scipy", "matplotlib", "tqdm")

BenchResult = tuple[int, str, str]
Bench = Callable[..., BenchResult]


@pytest.fixture
def bench(capsys: pytest.CaptureFixture[str]) -> Bench:
    """(exit status, stdout, stderr) of ``bench ARGUMENTS``."""

    def bench(*arguments: object) -> BenchResult:
        code = main(["bench", *map(str, arguments)])
        return code, *capsys.readouterr()

    return bench


def told(result: BenchResult, exit_code: int, *parts: str) -> None:
    """It ended with ``exit_code`` and one line that holds ``parts``, after the progress bar if there was one."""
    code, _, errors = result
    lines = [line for line in errors.split("\n") if line and "\r" not in line]
    assert (code, len(lines)) == (exit_code, 1), errors
    assert lines[0].startswith("vllm-gdn-plugin bench: ")
    for part in parts:
        assert part in lines[0]


# Shapes


def test_the_presets_have_the_sizes_that_the_models_have() -> None:
    assert [(s.name, s.hidden, s.qkvz, s.ba) for s in preset_shapes("all")] == [
        ("Qwen3.5-35B-A3B", 2048, 12288, 64),
        ("Qwen3.5-122B-A10B", 3072, 20480, 128),
        ("Qwen3.5-27B", 5120, 16384, 96),
        ("Qwen3.5-9B", 4096, 12288, 64),
        ("Qwen3-Next-80B-A3B", 2048, 12288, 64),
    ]
    assert [s.name for s in preset_shapes("qwen3.5-9b")] == ["Qwen3.5-9B"]


def test_what_has_the_same_sizes_is_measured_once_under_both_names() -> None:
    names = [shape.name for shape in distinct([*preset_shapes("all"), *preset_shapes("all")])]
    assert names == ["Qwen3.5-35B-A3B and Qwen3-Next-80B-A3B", "Qwen3.5-122B-A10B", "Qwen3.5-27B", "Qwen3.5-9B"]


SIZES = {
    "hidden_size": 4096,
    "linear_num_key_heads": 16,
    "linear_key_head_dim": 128,
    "linear_num_value_heads": 32,
    "linear_value_head_dim": 128,
    "num_hidden_layers": 4,
}


@pytest.mark.parametrize("nested", [False, True], ids=["flat", "text_config"])
def test_a_model_is_its_directory_or_its_config(tmp_path: Path, nested: bool) -> None:
    config = SIZES | {"hidden_size": 5120, "linear_num_value_heads": 48}
    directory = tmp_path / "some-model"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({"text_config": config} if nested else config))
    expected = Shape("some-model", 5120, 16384, 96)
    assert shape_of_model(str(directory)) == shape_of_model(str(directory / "config.json")) == expected


def test_tensor_parallelism_divides_the_outputs_only() -> None:
    assert shape_of_text("5120,16384,96").split(4) == Shape("5120x16384x96", 5120, 4096, 24, tensor_parallel_size=4)
    with pytest.raises(BadInput, match="cannot be divided"):
        shape_of_text("5120,16384,96").split(5)


# Statistics


@needs_statistics
def test_equal_samples_show_no_difference() -> None:
    from vllm_gdn_plugin.bench.stats import paired_ratio

    for samples in ([3.0] * 10, [1.0, 2.0, 3.0], [5.0]):
        assert not paired_ratio(samples, samples).shows_difference


@needs_statistics
def test_noise_shows_no_difference_and_a_real_one_is_shown_through_drift() -> None:
    import numpy as np

    from vllm_gdn_plugin.bench.stats import paired_ratio

    generator = np.random.default_rng(0)
    drift = np.linspace(10, 20, 30)  # twice as slow in the end, for both

    def samples(factor: float) -> list[float]:
        return list(drift * factor * generator.normal(1, 0.01, 30))

    baseline = samples(1.0)
    assert not paired_ratio(samples(1.0), baseline).shows_difference
    found = paired_ratio(samples(0.95), baseline)
    assert found.shows_difference
    assert 0.94 < found.low < found.median < found.high < 0.96
    slower = paired_ratio(samples(1.05), baseline)
    assert slower.shows_difference
    assert slower.low > 1


@needs_statistics
def test_one_round_shows_nothing() -> None:
    from vllm_gdn_plugin.bench.stats import paired_ratio

    assert not paired_ratio([1.0], [2.0]).shows_difference


@needs_statistics
def test_samples_of_other_rounds_are_not_paired() -> None:
    from vllm_gdn_plugin.bench.stats import paired_ratio

    with pytest.raises(ValueError, match="cannot be paired"):
        paired_ratio([1.0, 2.0], [1.0])


@needs_statistics
def test_the_summary_is_median_and_spread() -> None:
    from vllm_gdn_plugin.bench.stats import Summary, summary

    assert summary([float(n) for n in range(100, -1, -1)]) == Summary(50.0, 5.0, 95.0)


# Verification


@pytest.fixture
def computed() -> Any:
    """(outputs by strategy, reference): all right."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    generator = torch.Generator().manual_seed(0)
    exact = tuple(torch.randn(4, n, generator=generator, dtype=torch.float64) for n in (64, 8))
    serial = tuple(one.bfloat16() for one in exact)
    copies = {name: tuple(one.clone() for one in serial) for name in (DUAL_STREAM, FUSED)}
    return {SERIAL: serial, **copies, QKVZ: (serial[0].clone(),)}, exact


def test_right_results_verify(computed: Any) -> None:
    from vllm_gdn_plugin.bench.verify import verify

    outputs, exact = computed
    verify(outputs, exact)
    with pytest.raises(ValueError, match="fused needs a reference"):
        verify(outputs)
    del outputs[FUSED]
    verify(outputs)


@pytest.mark.parametrize("projection", [0, 1], ids=["in_proj_qkvz", "in_proj_ba"])
@pytest.mark.parametrize("wrong", [1e30, float("nan")], ids=str)
@pytest.mark.parametrize("strategy", [DUAL_STREAM, FUSED])
def test_a_planted_wrong_result_is_refused(computed: Any, strategy: str, wrong: float, projection: int) -> None:
    from vllm_gdn_plugin.bench.verify import PROJECTIONS, verify

    outputs, exact = computed
    outputs[strategy][projection][2, 3] = wrong
    with pytest.raises(WrongResult, match=rf"{strategy}.*{PROJECTIONS[projection]}"):
        verify(outputs, exact)


@pytest.mark.parametrize("strategy", [DUAL_STREAM, QKVZ])
def test_the_last_bit_counts_where_the_kernels_are_the_same(computed: Any, strategy: str) -> None:
    import torch

    from vllm_gdn_plugin.bench.verify import verify

    outputs, exact = computed
    outputs[strategy][0].view(torch.int16)[0, 0] ^= 1
    with pytest.raises(WrongResult, match=f"{strategy}: in_proj_qkvz is not bit-equal to serial's: 1 of 256 values"):
        verify(outputs, exact)


@pytest.mark.parametrize(("strategy", "count"), [(DUAL_STREAM, 1), (DUAL_STREAM, 3), (QKVZ, 0), (QKVZ, 2)])
def test_a_strategy_gives_as_many_outputs_as_it_should(computed: Any, strategy: str, count: int) -> None:
    from vllm_gdn_plugin.bench.verify import verify

    outputs, exact = computed
    outputs[strategy] = (2 * outputs[SERIAL])[:count]
    with pytest.raises(ValueError, match="zip"):
        verify(outputs, exact)


def test_fused_may_round_otherwise_but_not_worse(computed: Any) -> None:
    from vllm_gdn_plugin.bench.verify import verify

    outputs, exact = computed
    serial_error = [one.double() - other for one, other in zip(outputs[SERIAL], exact, strict=True)]
    for factor, right in ((-1.04, True), (1.06, False)):
        outputs[FUSED] = tuple(one + factor * off for one, off in zip(exact, serial_error, strict=True))
        if right:
            verify(outputs, exact)
        else:
            with pytest.raises(WrongResult, match=r"^fused: .*more than 1.05 x serial's"):
                verify(outputs, exact)


# Timing


@needs_all
def test_what_a_step_frees_is_elsewhere_in_the_next_layer() -> None:
    import torch

    from vllm_gdn_plugin.tune.timer import in_turn

    addresses = []

    def step(layer: int) -> int:
        addresses.append(torch.empty(8, 512, dtype=torch.uint8).data_ptr())
        return layer

    assert in_turn([partial(step, layer) for layer in range(16)], 8 * 512, "cpu") == 15
    assert len(set(addresses)) == 16


@needs_torch
def test_every_round_has_every_strategy_and_the_order_changes() -> None:
    from vllm_gdn_plugin.tune.timer import interleaved

    orders = interleaved(list("abcd"), 20)
    assert all(sorted(order) == list("abcd") for order in orders)
    assert len({tuple(order) for order in orders}) > 5
    assert orders == interleaved(list("abcd"), 20)


@needs_torch
def test_the_layers_exceed_twice_the_cache() -> None:
    from vllm_gdn_plugin.bench.projections import layer_count

    assert layer_count(10, 100, 2) * 10 > 200
    assert layer_count(10, 0, 2) == 2


@needs_torch
def test_the_one_gemm_is_measured_with_the_rows_that_the_plugin_may_give_it() -> None:
    import torch

    from vllm_gdn_plugin.bench import strategies
    from vllm_gdn_plugin.bench.verify import verify
    from vllm_gdn_plugin.run.fused import rows_to_choose_from

    torch.manual_seed(0)
    shape = Shape("wide", 32, 12344, 4)
    layer = strategies.unquantized(shape, torch.float32, "cpu")
    rows = rows_to_choose_from(12348, 32 * 4)
    one_gemm = [FUSED, *(f"fused to {n} rows" for n in rows[1:])]
    assert len(rows) > 1
    assert [layer.weight_bytes[way] // 128 for way in one_gemm] == rows
    assert layer.weight_bytes[SERIAL] == 12348 * 128
    x = torch.randn(3, 32)
    outputs = {way: step(layer, x) for way, step in strategies.ways(layer, None).items()}
    assert outputs.keys() == layer.weight_bytes.keys() == {SERIAL, DUAL_STREAM, QKVZ, *one_gemm}
    verify(outputs, layer.reference(x))


# A run


def device_marks(name: str) -> list[pytest.MarkDecorator]:
    if name == "cpu" or importlib.util.find_spec("torch") is None:
        return []
    import torch

    there = torch.cuda.is_available() and torch.version.hip is None
    return [pytest.mark.skipif(not there, reason="there is no NVIDIA GPU")]


SMALL = ("--shape", "128,256,8", "--rounds", "6")


@needs_all
@pytest.mark.parametrize("device", [pytest.param(name, marks=device_marks(name)) for name in ("cpu", "cuda")])
def test_a_run_from_end_to_end(bench: Bench, tmp_path: Path, device: str) -> None:
    options = (*SMALL, "--tensor-parallel-size", "1,2", "--tokens", "1,3", "--dtype", "bfloat16", "--device", device)
    code, out, errors = bench("projections", *options, "--output", tmp_path / "new")
    assert code == 0, errors
    assert "4/4" in errors
    path = tmp_path / "new" / "projections-bfloat16.json"
    run = load(path)
    assert [(p.shape.tensor_parallel_size, p.shape.qkvz, p.shape.ba, p.tokens) for p in run.points] == [
        (1, 256, 8, 1),
        (1, 256, 8, 3),
        (2, 128, 4, 1),
        (2, 128, 4, 3),
    ]
    for point in run.points:
        assert {SERIAL, DUAL_STREAM, FUSED, QKVZ} < set(point.samples_us)
        assert {len(samples) for samples in point.samples_us.values()} == {6}
    first = run.points[0]
    assert first.bytes_moved[SERIAL] == 2 * (128 * 264 + 128 + 264)
    assert first.bytes_moved[QKVZ] == 2 * (128 * 256 + 128 + 256)
    assert first.layers * first.bytes_moved[SERIAL] > 2 * run.machine.l2_cache_bytes
    assert (run.stopped, run.machine.device, run.precision) == (None, device, "bfloat16")
    assert run.command.startswith("vllm-gdn-plugin bench projections --shape 128,256,8 --rounds 6 ")
    assert (run.machine.bandwidth_gb_s is None) == (device == "cpu")
    text = path.with_suffix(".md").read_text()
    assert out == text + "\n"
    assert "tokens | serial us | dual_stream us (x of qkvz) | fused us (x of qkvz) | fused to " in text
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@needs_all
def test_the_report_is_made_again_from_the_json(bench: Bench, tmp_path: Path) -> None:
    assert bench("projections", *SMALL, "--tokens", "1", "--device", "cpu", "--output", tmp_path)[0] == 0
    markdown, picture = tmp_path / "projections-bfloat16.md", tmp_path / "projections-bfloat16.png"
    text = markdown.read_text()
    markdown.unlink()
    picture.unlink()
    assert bench("report", tmp_path / "projections-bfloat16.json") == (0, text + "\n", "")
    assert markdown.read_text() == text
    assert picture.exists()


@needs_all
def test_a_strategy_that_computes_something_else_is_not_timed(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm_gdn_plugin.bench import strategies

    fused = strategies.fused

    def wrong_from_three_tokens_on(way: str, layer: Any, hidden_states: Any) -> Any:
        qkvz, ba = fused(way, layer, hidden_states)
        return (qkvz, ba + 1) if len(hidden_states) > 2 else (qkvz, ba)

    monkeypatch.setattr(strategies, "fused", wrong_from_three_tokens_on)
    arguments = ("projections", *SMALL, "--device", "cpu", "--output", tmp_path, "--tokens")
    told(bench(*arguments, "3"), 1, "3 tokens", "fused", "in_proj_ba", "nothing was measured")
    assert not list(tmp_path.iterdir())
    told(bench(*arguments, "1,3,4"), 1, "fused", "kept: 1 of 3 steps")
    run = load(tmp_path / "projections-bfloat16.json")
    assert [point.tokens for point in run.points] == [1]
    assert "**not complete**: 128x256x8, TP 1, 3 tokens" in (tmp_path / "projections-bfloat16.md").read_text()


@needs_all
def test_an_interrupt_keeps_what_was_measured(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_gdn_plugin.bench.timing import CpuTimer

    measure, calls = CpuTimer.measure, []

    def interrupted(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return measure(*arguments)

    monkeypatch.setattr(CpuTimer, "measure", interrupted)
    result = bench("projections", *SMALL, "--tokens", "1,2,3", "--device", "cpu", "--output", tmp_path)
    told(result, 130, "interrupted; kept: 1 of 3 steps")
    run = load(tmp_path / "projections-bfloat16.json")
    assert ([point.tokens for point in run.points], run.stopped) == ([1], "interrupted")
    assert (tmp_path / "projections-bfloat16.png").exists()


# The tables


@pytest.fixture
def run() -> Run:
    """A run of FP8 on a GPU: dual_stream is 20 % faster than serial, and equal to qkvz alone."""
    samples = {SERIAL: [10.0, 11.0, 10.5, 10.2], DUAL_STREAM: [8.0, 8.8, 8.4, 8.16], QKVZ: [8.0, 8.8, 8.4, 8.16]}
    point = Point(Shape("model", 128, 256, 8), 4, 16, dict.fromkeys(samples, 1_000_000), samples)
    machine = Machine("cuda", "A GPU", "3.12", "0.1.0", "2.11.0", driver="580.1", bandwidth_gb_s=500.0)
    return Run("vllm-gdn-plugin bench projections", "2026-01-01", "fp8", 0, 4, machine, points=[point])


@needs_statistics
def test_the_table_says_what_was_found(run: Run) -> None:
    from vllm_gdn_plugin.bench.table import markdown

    text = markdown(run)
    assert "| tokens | serial us | dual_stream us (x of qkvz) | qkvz alone us | gain |" in text
    assert "| 4 | 10.35 | 8.28 (no difference shown) | 8.28 | dual_stream +20.0 % (+20.0 to +20.0) |" in text
    assert "| 4 | serial | 10.35 | 10.03 to 10.93 | 1 | 1.250x (1.250 to 1.250) | 1.00 | 19% |" in text
    assert "A GPU; vllm-gdn-plugin 0.1.0, torch 2.11.0, driver 580.1, Python 3.12; 2026-01-01" in text
    assert "fused" not in text


@needs_statistics
def test_a_loss_is_written_as_a_loss_and_no_difference_as_none(run: Run) -> None:
    from vllm_gdn_plugin.bench.table import markdown

    serial = run.points[0].samples_us[SERIAL]
    run.points[0].samples_us[DUAL_STREAM] = [1.1 * us for us in serial]
    assert "| dual_stream -10.0 % (-10.0 to -10.0) |" in markdown(run)
    run.points[0].samples_us[DUAL_STREAM] = [f * us for f, us in zip((0.9, 1.1, 0.95, 1.05), serial, strict=True)]
    assert "| dual_stream no difference shown |" in markdown(run)


@needs_report
def test_a_run_without_fused_is_plotted(run: Run, tmp_path: Path) -> None:
    from vllm_gdn_plugin.bench.plot import plot

    five = [replace(run.points[0], shape=Shape(f"model {n}", 128, 256, 8)) for n in range(5)]
    plot(replace(run, points=five), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@needs_statistics
def test_a_way_that_is_timed_for_few_tokens_alone_has_empty_cells_elsewhere(run: Run) -> None:
    from vllm_gdn_plugin.bench.table import markdown

    few, many = (replace(run.points[0], tokens=n, samples_us=dict(run.points[0].samples_us)) for n in (8, 64))
    few.samples_us["kernel"] = few.samples_us[QKVZ]
    few.bytes_moved["kernel"] = 1
    lines = markdown(replace(run, points=[many, few])).splitlines()
    head = next(n for n, line in enumerate(lines) if line.startswith("| tokens"))
    column = lines[head].split("|").index(" kernel us (x of qkvz) ")
    assert [bool(line.split("|")[column].strip()) for line in lines[head + 2 : head + 4]] == [False, True]


# Wrong input


WRONG = {
    "nothing to measure": ((), "give --model, --shape or --preset"),
    "a shape of two": (("--shape", "128,256"), "--shape '128,256' is not hidden,qkvz,ba"),
    "a shape of words": (("--shape", "a,b,c"), "--shape 'a,b,c' is not whole numbers"),
    "no tokens": (("--shape", "128,256,8", "--tokens", ""), "--tokens '' is not whole numbers"),
    "zero tokens": (("--shape", "128,256,8", "--tokens", "0"), "--tokens '0'"),
    "rounds": (("--shape", "128,256,8", "--rounds", "1,2"), "--rounds '1,2' is not one number"),
    "a rank's part": (("--shape", "128,256,8", "--tensor-parallel-size", "3"), "cannot be divided"),
    "a preset": (("--preset", "Qwen9"), "--preset 'Qwen9' is not known"),
    "no model": (("--model", "no/such/model"), "--model no/such/model: there is no such path"),
}


@pytest.mark.parametrize(("options", "reason"), WRONG.values(), ids=WRONG)
def test_wrong_options_are_told_in_one_line(bench: Bench, tmp_path: Path, options: Any, reason: str) -> None:
    told(bench("projections", *options, "--device", "cpu", "--output", tmp_path / "out"), 2, reason)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "config.json is not JSON"),
        ("[]", "is not a model's config.json"),
        ("{}", "this is not the config.json of a model with Gated Delta Net layers: no 'hidden_size'"),
        (json.dumps(SIZES | {"hidden_size": 0}), "less than 1"),
    ],
)
def test_a_model_without_gdn_layers(bench: Bench, tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "config.json").write_text(text)
    told(bench("projections", "--model", tmp_path, "--device", "cpu", "--output", tmp_path / "out"), 2, reason)


@needs_all
def test_an_output_that_cannot_be_made(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    told(bench("projections", *SMALL, "--device", "cpu", "--output", tmp_path / "file"), 2, "--output", "File exists")


@needs_all
def test_cuda_without_a_gpu(bench: Bench, tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    told(bench("projections", *SMALL, "--output", tmp_path), 2, "--device cuda: torch finds no NVIDIA GPU here")


@needs_torch
def test_fp8_needs_whole_blocks_and_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_gdn_plugin.bench import quantized

    quantized.require_blocks(Shape("model", 256, 384, 6))
    with pytest.raises(BadInput, match="not multiples of 128"):
        quantized.require_blocks(Shape("model", 256, 320, 6))
    monkeypatch.setitem(sys.modules, "vllm.config", None)
    with pytest.raises(BadInput, match="needs vLLM, and it cannot be imported"), quantized.vllm_layers():
        pytest.fail("there is no vLLM")


@pytest.mark.parametrize("name", ["torch", "numpy", "scipy", "matplotlib", "tqdm"])
def test_a_missing_module_is_named(bench: Bench, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for other in ("torch", "numpy", "scipy", "matplotlib", "tqdm"):
        monkeypatch.setitem(sys.modules, other, None if other == name else sys)
    told(bench("projections", *SMALL, "--output", tmp_path / "out"), 2, f"{name} cannot be imported", "[bench]")
    if name not in ("torch", "tqdm"):
        told(bench("report", tmp_path / "x.json"), 2, f"{name} cannot be imported")


DAMAGE: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "another format": (lambda data: data | {"format": "x"}, "its format is none of"),
    "no object": (lambda data: [data], "holds no object"),
    "no points": (lambda data: data | {"points": []}, "ValueError: it holds no points"),
    "points missing": (lambda data: {k: v for k, v in data.items() if k != "points"}, "KeyError: 'points'"),
    "a field missing": (lambda data: {k: v for k, v in data.items() if k != "rounds"}, "'rounds'"),
    "a machine of text": (lambda data: data | {"machine": "x"}, "TypeError"),
    "a sample lost": (lambda data: data["points"][0]["samples_us"][SERIAL].pop() and data, "same number of samples"),
    "a sample of zero": (lambda data: data["points"][0]["samples_us"][QKVZ].__setitem__(0, 0) or data, "is not a time"),
    "a way lost": (lambda data: data["points"][0]["samples_us"].pop(QKVZ) and data, "lacks a way"),
}


@needs_report
@pytest.mark.parametrize(("damage", "reason"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_file_is_named(bench: Bench, run: Run, tmp_path: Path, damage: Any, reason: str) -> None:
    path = tmp_path / "run.json"
    run.save(path)
    assert load(path) == run
    path.write_text(json.dumps(damage(json.loads(path.read_text()))))
    told(bench("report", path), 2, str(path), reason)


@needs_report
def test_a_file_that_is_no_run(bench: Bench, tmp_path: Path) -> None:
    told(bench("report", tmp_path / "none.json"), 2, "none.json cannot be read: No such file")
    (tmp_path / "text.json").write_text("text")
    told(bench("report", tmp_path / "text.json"), 2, "text.json is no JSON")


def test_check_stays_light() -> None:
    code = """if True:
        import sys
        from vllm_gdn_plugin.cli.main import main
        try:
            main(["check", "--help"])
        except SystemExit:
            pass
        heavy = {"vllm_gdn_plugin.bench", "vllm", "torch", "numpy", "scipy", "matplotlib", "tqdm"} & sys.modules.keys()
        assert not heavy, heavy
    """
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_the_help_names_the_bench(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, part in (
        ((), "bench"),
        (("bench",), "projections"),
        (("bench", "projections"), "--tensor-parallel"),
    ):
        with pytest.raises(SystemExit) as stop:
            main([*arguments, "--help"])
        assert stop.value.code == 0
        assert part in capsys.readouterr().out
