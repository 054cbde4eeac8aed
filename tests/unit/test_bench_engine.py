"""`bench serve` and `bench compile` without an engine: environments, statistics, answers, files, reports."""

import importlib.util
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vllm_gdn_plugin.bench import cli
from vllm_gdn_plugin.bench.engine.results import COMPILE, SERVE, EngineRun
from vllm_gdn_plugin.bench.engine.server import ServerFailed
from vllm_gdn_plugin.bench.engine.variants import OFF, require_at_work, variants
from vllm_gdn_plugin.bench.errors import BadInput, WrongResult
from vllm_gdn_plugin.bench.report import load, write_report
from vllm_gdn_plugin.bench.results import Machine
from vllm_gdn_plugin.cli.main import main
from vllm_gdn_plugin.host.plugins import plugins_without_ours

MACHINE = Machine("cpu", "a processor", "3.11.0", "0.1.0", "2.13.0", vllm="0.32.0")


def needs(*names: str) -> pytest.MarkDecorator:
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


needs_report = needs("numpy", "scipy", "matplotlib")


def run_of(kind: str = SERVE, factors: tuple[float, ...] = (1.0, 1.0, 1.0)) -> EngineRun:
    """A run whose variant `auto` takes `factors` times as long as the stock engine, round by round."""
    run = EngineRun(
        kind=kind,
        command="vllm-gdn-plugin bench ...",
        date="2026-01-01",
        rounds=len(factors),
        model="model",
        vllm_arguments=["--max-model-len", "256"],
        variants={OFF: {"VLLM_PLUGINS": ""}, "auto": {"VLLM_GDN_PLUGIN_STRATEGY": "auto"}},
        machine=MACHINE,
        load="some load" if kind == SERVE else "",
        verified={"auto": "the same 16 tokens"},
        said={"auto": "vllm-gdn-plugin 0.1.0: fused on 3 of 4 GDN layers"},
    )
    for number, factor in enumerate(factors):
        stock = 10.0 + number
        for variant, time in ((OFF, stock), ("auto", factor * stock)):
            if kind == SERVE:
                run.add(number, variant, "start", {"startup_s": time, "host_memory_mib": 1000.0})
                run.add(number, variant, "concurrency 4", {"tpot_ms": time, "ttft_ms": stock})
            else:
                run.add(number, variant, "cold", {"startup_s": time, "artifacts": 3.0})
    return run


# What differs between the engines


def test_off_loads_every_plugin_but_ours(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for group, name in (("vllm.general_plugins", "one"), ("vllm.platform_plugins", "two"), ("other.plugins", "three")):
        information = tmp_path / f"{name}-0.dist-info"
        information.mkdir()
        (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0\n")
        (information / "entry_points.txt").write_text(f"[{group}]\n{name} = {name}:register\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    names = plugins_without_ours({}).split(",")
    assert {"one", "two"} <= set(names)
    assert not {"three", "vllm_gdn_plugin", ""} & set(names)


def test_an_operators_own_choice_of_plugins_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "mine,vllm_gdn_plugin")
    found = variants(["auto"])
    assert (found[OFF]["VLLM_PLUGINS"], found["auto"]["VLLM_PLUGINS"]) == ("mine", "mine,vllm_gdn_plugin")
    monkeypatch.setenv("VLLM_PLUGINS", "")
    found = variants(["fused"])
    assert (found[OFF]["VLLM_PLUGINS"], found["fused"]["VLLM_PLUGINS"]) == ("", "vllm_gdn_plugin")
    monkeypatch.delenv("VLLM_PLUGINS")
    assert variants(["fused"])["fused"] == {"VLLM_GDN_PLUGIN_STRATEGY": "fused"}


def test_an_engine_may_have_settings_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    found = variants(
        ["auto", "slow=VLLM_GDN_PLUGIN_TUNE=0 VLLM_GDN_PLUGIN_STRATEGY=fused", "rules=VLLM_GDN_PLUGIN_TUNE=0"]
    )
    assert found["auto"] == {"VLLM_GDN_PLUGIN_STRATEGY": "auto"}
    assert found["slow"] == {"VLLM_GDN_PLUGIN_STRATEGY": "fused", "VLLM_GDN_PLUGIN_TUNE": "0"}
    assert found["rules"] == {"VLLM_GDN_PLUGIN_STRATEGY": "auto", "VLLM_GDN_PLUGIN_TUNE": "0"}
    for text, says in (
        ("rules=VLLM_GDN_PLUGIN_TUNED=0", "VLLM_GDN_PLUGIN_TUNED is no setting of the plugin"),
        ("off=VLLM_GDN_PLUGIN_TUNE=0", "'off' is no name"),
        ("rules-2=VLLM_GDN_PLUGIN_TUNE=0", "'rules-2' is no name"),
    ):
        with pytest.raises(BadInput, match=says):
            variants([text])


AT_WORK = "INFO vllm-gdn-plugin 0.1.0: fused on 3 of 4 GDN layers (platform cuda, vLLM 0.32.0)"


def test_an_engine_must_be_what_its_name_says() -> None:
    assert require_at_work(OFF, "nothing of ours") == require_at_work("off-2", "nor here") == ""
    assert require_at_work("auto", f"first\n{AT_WORK}\nlast") == AT_WORK.removeprefix("INFO ")
    for stock in (OFF, "off-2"):
        with pytest.raises(WrongResult, match="without the plugin has loaded it"):
            require_at_work(stock, AT_WORK)
    for log in (AT_WORK.replace("3 of 4", "0 of 4"), "vllm-gdn-plugin 0.1.0 steps aside: because"):
        with pytest.raises(BadInput, match=r"the plugin does nothing here: vllm-gdn-plugin 0\.1\.0"):
            require_at_work("auto", log)
    with pytest.raises(BadInput, match="its log says nothing of it"):
        require_at_work("auto", "")


# The comparison of answers


@needs("psutil")
def test_answers_are_compared_up_to_the_first_token_that_differs() -> None:
    from vllm_gdn_plugin.bench.engine.probe import compare

    stock = (["a", "b", "c"], [-1.0, -2.0, -3.0])
    assert compare(stock, stock) == "the same 3 tokens and log-probabilities"
    rounded = (["a", "x", "y"], [-1.01, -2.05, -9.0])  # from x on, another text
    assert compare(stock, rounded) == "the same first 1 of 3 tokens, log-probabilities within 0.0500 nat"
    for wrong in ((["a", "b", "c"], [-1.0, -2.0, -4.0]), (["x", "b", "c"], [-2.0, -2.0, -3.0])):
        with pytest.raises(WrongResult, match=r"1\.00 nat away"):
            compare(stock, wrong)
    with pytest.raises(WrongResult, match="nan nat away"):
        compare(stock, (["x"] * 3, [float("nan")] * 3))


# Statistics and reports


@needs_report
@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_few_rounds_show_a_difference_only_where_it_is_larger_than_their_spread() -> None:
    from vllm_gdn_plugin.bench.stats import paired_change

    stock = [10.0, 11.0, 12.0, 13.0, 14.0]

    def change(*factors: float) -> Any:
        return paired_change([f * s for f, s in zip(factors, stock, strict=False)], stock[: len(factors)])

    assert not change(1.0, 1.0, 1.0, 1.0, 1.0).shows_difference
    assert not change(1.01, 1.02, 1.03).shows_difference  # one sign, but three rounds say little
    assert not change(2.0).shows_difference
    found = change(1.09, 1.10, 1.11, 1.10, 1.10)
    assert found.shows_difference
    assert 9 < found.low < found.percent < found.high < 11
    assert change(0.5, 0.5, 0.5).high == pytest.approx(-50)


@needs_report
def test_of_many_rounds_slow_ones_move_neither_the_change_nor_its_interval() -> None:
    from vllm_gdn_plugin.bench.stats import MANY, paired_change

    factors = [0.98 + n / 1e4 for n in range(MANY + 1)]
    quiet = paired_change(factors, [1.0] * len(factors))
    assert quiet.percent == pytest.approx(100 * (factors[MANY // 2] - 1))
    # Of 11, the second to the tenth: that the median lies outside has a chance of 1.2 %, of the third to the ninth 6.5.
    assert (quiet.low, quiet.high) == pytest.approx((100 * (factors[1] - 1), 100 * (factors[-2] - 1)))
    assert paired_change([*factors[:-1], 3.0], [1.0] * len(factors)) == quiet
    few = paired_change([*factors[: MANY - 2], 3.0], [1.0] * (MANY - 1))
    assert few.percent > 10, "the mean of so few"
    assert not few.shows_difference


@needs_report
def test_what_two_starts_differ_by_is_a_part_of_the_interval() -> None:
    from vllm_gdn_plugin.bench.engine.table import between_starts, changes, markdown

    run = run_of(factors=(0.95,) * 12)
    once = changes(run, "tpot_ms", "concurrency 4", "auto")
    assert once
    assert (once.percent, once.high) == (pytest.approx(-5), pytest.approx(-5))
    assert between_starts(run, "tpot_ms", "concurrency 4") is None
    run.variants |= {f"{name}-2": settings for name, settings in run.variants.items()}
    for number in range(12):
        run.add(12 + number, "off-2", "concurrency 4", {"tpot_ms": 0.9 * (10.0 + number)})
        run.add(12 + number, "auto-2", "concurrency 4", {"tpot_ms": 0.95 * (10.0 + number)})
    found = changes(run, "tpot_ms", "concurrency 4", "auto")
    assert found
    assert not found.shows_difference
    assert (found.low, found.high) == (pytest.approx(-5), pytest.approx(100 * (0.95 / 0.9 - 1)))
    assert found.percent == pytest.approx((-5 + found.high) / 2)
    assert between_starts(run, "tpot_ms", "concurrency 4") == pytest.approx(100 * (1 / 0.9 - 1))
    row = next(line for line in markdown(run).splitlines() if line.startswith("| concurrency 4"))
    assert row.endswith("| no difference shown (-5.0 % to +5.6 %) | +11.1 % |")


@needs_report
def test_equal_samples_are_reported_as_no_difference() -> None:
    from vllm_gdn_plugin.bench.engine.table import markdown

    text = markdown(run_of())
    rows = [line for line in text.splitlines() if line.startswith(("| concurrency", "| start"))]
    assert len(rows) == 4
    assert "- auto logged: vllm-gdn-plugin 0.1.0: fused on 3 of 4 GDN layers" in text.splitlines()
    assert all("no difference shown" in row for row in rows)
    slower = markdown(run_of(factors=(1.10, 1.11, 1.10)))
    row = next(line for line in slower.splitlines() if line.startswith("| concurrency 4"))
    assert row == "| concurrency 4 | 11 (10 to 12) | 12.21 (11 to 13.2) | +10.3 % (+8.9 % to +11.8 %) |"
    once = markdown(run_of(factors=(1.10,)))
    row = next(line for line in once.splitlines() if line.startswith("| concurrency 4"))
    assert row == "| concurrency 4 | 10 | 11 | +10.0 % (one round, no interval) |"


@needs_report
@pytest.mark.parametrize("kind", [SERVE, COMPILE])
def test_report_makes_the_same_files_again(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / f"{kind}.json"
    run = run_of(kind, (1.0, 1.1, 0.9))
    run.save(path)
    found = load(path)
    case = "cold" if kind == COMPILE else "start"
    assert found.values("startup_s", case, "auto") == pytest.approx({0: 10, 1: 12.1, 2: 10.8})
    found.save(path)
    assert load(path) == found
    write_report(path)
    first = path.with_suffix(".md").read_text()
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert main(["bench", "report", str(path)]) == 0
    assert path.with_suffix(".md").read_text() == first
    assert first in capsys.readouterr().out


DAMAGES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "no samples": (lambda data: data | {"samples": {}}, "it holds no samples"),
    "negative": (lambda data: data["samples"]["start"][OFF].update(startup_s=[-1]) or data, "not a number from 0 on"),
    "text": (lambda data: data["samples"]["start"][OFF].update(startup_s=["x"]) or data, "TypeError"),
    "metric": (lambda data: data["samples"]["start"][OFF].update(speed=[1]) or data, "no known variant or metric"),
    "variant": (lambda data: data["variants"].pop("auto") and data, "no known variant or metric"),
    "field": (lambda data: data | {"more": 1}, "TypeError"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_gets_one_line(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "serve.json"
    run_of().save(path)
    change, message = DAMAGES[damage]
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(BadInput, match=message) as caught:
        load(path)
    assert "\n" not in str(caught.value)


@needs("numpy", "scipy", "matplotlib", "tqdm")
@pytest.mark.parametrize("number", cli.ENDING)
def test_no_signal_ends_the_writing(number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save = EngineRun.save

    def interrupted(run: EngineRun, path: Path) -> None:
        signal.raise_signal(number)
        save(run, path)

    monkeypatch.setattr(EngineRun, "save", interrupted)
    assert cli._measured(run_of(), tmp_path / "serve.json", 1, lambda progress: None) == 0
    assert (tmp_path / "serve.png").exists()


@needs_report
def test_a_run_with_nothing_to_draw_has_no_picture(tmp_path: Path) -> None:
    run = run_of()
    run.samples.clear()
    run.add(0, OFF, "start", {"allocated_mib": 5.0})
    run.save(tmp_path / "serve.json")
    write_report(tmp_path / "serve.json")
    assert "| start | 5 |" in (tmp_path / "serve.md").read_text()
    assert not (tmp_path / "serve.png").exists()


# Wrong input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["serve", "--strategy", "serial"], "--strategy 'serial' is not one of auto, fused, dual_stream"),
        (["serve", "--strategy", "auto,best"], "--strategy 'best' is not one of"),
        (["serve", "--concurrency", "0"], "--concurrency '0' is not whole numbers"),
        (["serve", "--output-len", "1,2"], "--output-len '1,2' is not one number"),
        (["compile", "--at-once", "0"], "--at-once '0' is not whole numbers"),
        (["compile", "--at-once", "2"], "--at-once 2 needs --kv-cache-memory-bytes after --"),
    ],
)
def test_wrong_arguments_get_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(["bench", *arguments, "--model", "no/such/model", "--output", str(tmp_path / "out")])
    errors = capsys.readouterr().err
    assert (code, errors.count("\n")) == (2, 1)
    assert message in errors


@needs("torch", "numpy", "scipy", "matplotlib", "tqdm", "psutil", "vllm")
def test_without_a_gpu_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    for command in ("serve", "compile"):
        assert main(["bench", command, "--model", "x", "--output", str(tmp_path)]) == 2
        assert "torch finds no NVIDIA GPU here" in capsys.readouterr().err


def test_the_cause_of_a_failed_start_is_one_line() -> None:
    log = "INFO a\nERROR [x.py:1] KeyError: 'first'\nERROR [x.py:2] ValueError: no such model\nINFO the end"
    error = ServerFailed("the server stopped with 1", log)
    assert error.cause() == "the server stopped with 1: ValueError: no such model"
    assert "  | INFO the end" in str(error)
    assert ServerFailed("it stopped", "nothing").cause() == "it stopped"


def test_what_serves_needs_nothing_but_the_standard_library() -> None:
    script = "import sys, vllm_gdn_plugin.bench.engine.server; print(*{n.partition('.')[0] for n in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert set(loaded) - set(sys.stdlib_module_names) <= {"vllm_gdn_plugin", "packaging"} | {
        name for name in loaded if name.startswith(("__editable__", "_", "sitecustomize"))
    }
