"""The command line, run in this process on the stand-in host of conftest.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from contextlib import nullcontext
from dataclasses import fields
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import Any

import pytest

import vllm_gdn_plugin
from vllm_gdn_plugin.cli import check
from vllm_gdn_plugin.cli.check import Report
from vllm_gdn_plugin.cli.main import main
from vllm_gdn_plugin.decide.checkpoint import NOT_LOOKED_AT, EngineFlags
from vllm_gdn_plugin.decide.contract import GDN_CLASSES, Contract
from vllm_gdn_plugin.decide.decision import refusal
from vllm_gdn_plugin.host.plugins import GROUP, NAME
from vllm_gdn_plugin.settings import describe
from vllm_gdn_plugin.versions import SUPPORTED_RANGE, judge_version

GDN, OLD_GDN = GDN_CLASSES


def dist_info(root: Path, distribution: str, **points: str) -> None:
    """What pip leaves of a distribution: enough for ``importlib.metadata`` to find its entry points."""
    folder = root / f"{distribution}-0.1.0.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 0.1.0\n")
    lines = "".join(f"{name} = {value}\n" for name, value in points.items())
    command = f"[console_scripts]\n{distribution.replace('_', '-')} = not:a.plugin\n"
    (folder / "entry_points.txt").write_text(f"{command}[{GROUP}]\n{lines}" if lines else command)


@pytest.fixture
def installed(host: Any) -> Any:
    """The host, and the plugin and another one installed beside it, whatever this environment has."""
    dist_info(host.root, "vllm_gdn_plugin", **{NAME: "vllm_gdn_plugin:register"})
    dist_info(host.root, "another_plugin", another="another:register")
    return host


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    """(exit status, stdout, stderr) of ``vllm-gdn-plugin ARGUMENTS``."""

    def run(*arguments: str) -> tuple[int, str, str]:
        try:
            code = main(arguments)
        except SystemExit as stop:
            code = stop.code  # type: ignore[assignment]
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def report(run: Any) -> Any:
    """(exit status, JSON) of ``check --json ARGUMENTS``."""

    def report(*arguments: str) -> tuple[int, dict[str, Any]]:
        code, out, _ = run("check", "--json", *arguments)
        return code, json.loads(out)

    return report


def test_all_well(installed: Any, report: Any, run: Any) -> None:
    code, found = report()
    assert (code, found["status"]) == (0, "active")
    assert found["strategy"] != "serial"
    assert found["reason"]
    expected = {
        "plugin_version": vllm_gdn_plugin.__version__,
        "supported_range": SUPPORTED_RANGE,
        "vllm_version": "0.32.0",
        "torch_version": "2.13.0+stub",
        "platform": "cuda",
        "device": "Stub Device",
        "entry_point": "vllm_gdn_plugin = vllm_gdn_plugin:register",
        "vllm_plugins": "not set: every plugin is loaded",
        "warnings": [],
    }
    assert {name: found[name] for name in expected} == expected
    code, text, errors = run("check")
    assert (code, errors) == (0, "")
    for value in expected.values():
        assert not value or str(value) in text


CASES = {
    "all well": (lambda tree: None, 0, "active"),
    "an old layout": (lambda tree: tree.make_old(), 0, "active"),
    "an old version": (lambda tree: tree.version("0.19.1"), 1, "refused"),
    "a new version": (lambda tree: tree.version("0.34.0"), 1, "refused"),
    "cpu": (lambda tree: tree.platform("cpu"), 1, "serial"),
    "rocm": (lambda tree: tree.platform("rocm"), 1, "serial"),
    "xpu": (lambda tree: tree.platform("xpu"), 1, "serial"),
    "an out-of-tree platform": (lambda tree: tree.platform("npu"), 1, "serial"),
    "another layer": (lambda tree: tree.edit(GDN, ("in_proj_ba", "in_proj_gates")), 1, "refused"),
    "overlap of its own": (
        lambda tree: tree.edit(
            GDN, ("ba, _ = self.in_proj_ba(", "with aux_stream():\n            ba, _ = self.in_proj_ba(")
        ),
        1,
        "refused",
    ),
    "a helper gone": (lambda tree: tree.remove("vllm.utils.torch_utils"), 1, "refused"),
}


@pytest.mark.parametrize(("change", "code", "status"), CASES.values(), ids=CASES)
def test_check_foretells_what_register_does(
    installed: Any, plugin: Any, report: Any, change: Any, code: int, status: str
) -> None:
    change(installed)
    found_code, found = report()
    assert (found_code, found["status"]) == (code, status)
    plugin.register()
    stock = plugin.import_gdn(OLD_GDN if installed.path(OLD_GDN).exists() else GDN)
    assert bool(plugin.replaced) == (code == 0) == (type(stock("layers.0")) is not stock)
    assert all(found["reason"] in message for _, message in plugin.said), "the log and the report say the same"
    assert bool(plugin.said) == bool(code)


NEWER = {
    "as expected": (lambda tree: None, "VLLM_GDN_PLUGIN_ALLOW_UNTESTED=1 to try it all the same"),
    "moved": (lambda tree: tree.remove(GDN), "the GDN layer has moved"),
    "another layer": (CASES["another layer"][0], "in_proj_ba(hidden_states) is called 0 times"),
    "overlap of its own": (CASES["overlap of its own"][0], "you can uninstall vllm-gdn-plugin"),
}


@pytest.mark.parametrize("allow", [False, True], ids=["", "allow_untested"])
@pytest.mark.parametrize("change", NEWER)
def test_a_newer_version_is_told_what_would_help(
    installed: Any, plugin: Any, report: Any, change: str, allow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit, told = NEWER[change]
    installed.version("0.34.0")
    edit(installed)
    monkeypatch.setenv("VLLM_GDN_PLUGIN_ALLOW_UNTESTED", str(int(allow)))
    code, found = report()
    assert code == (not allow or change != "as expected")
    assert ("to try it all the same" in found["reason"]) == (not allow and change == "as expected")
    source = report("--vllm-version", "0.34.0", "--vllm-source", str(installed.root))
    plugin.register()
    if change != "moved":
        plugin.import_gdn()
    assert bool(plugin.replaced) == (not code)
    if code:
        assert told in found["reason"]
        assert source == (1, source[1] | {"reason": found["reason"]})
        ((_, message),) = plugin.said
        assert message.endswith(f"steps aside, vLLM runs as it is: {found['reason']}")
        assert "vLLM 0.34.0 is newer" in message


@pytest.mark.parametrize("name", ["cuda", "cpu", "npu"])
def test_the_platform_is_reported_by_its_name(installed: Any, report: Any, name: str) -> None:
    installed.platform(name)
    assert report()[1]["platform"] == name


class NoVllm(MetaPathFinder):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.partition(".")[0] == "vllm":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


@pytest.mark.parametrize("options", [(), ("--require", "dual_stream")], ids=["", "require"])
def test_without_vllm_it_cannot_tell(isolated: None, report: Any, run: Any, options: tuple[str, ...]) -> None:
    sys.meta_path.insert(0, NoVllm())
    code, found = report(*options)
    assert (code, found["status"], found["strategy"]) == (2, "unknown", "serial")
    assert found["reason"] == "vLLM cannot be imported: ModuleNotFoundError: No module named 'vllm'"
    code, out, errors = run("check", *options)
    assert (code, errors) == (2, "")
    assert [line for line in out.splitlines() if "cannot be imported" in line] == [f"{'reason':<15}  {found['reason']}"]


@pytest.mark.parametrize(
    ("module", "source", "told"),
    [
        ("vllm", "raise ImportError('libcudart.so.12: cannot open')", "ImportError: libcudart.so.12: cannot open"),
        ("vllm", "raise RuntimeError('torch is too old')", "RuntimeError: torch is too old"),
        ("vllm", "raise RuntimeError('one\\n  two\\n')", "RuntimeError: one two"),
        ("vllm", "raise SystemExit(3)", "SystemExit: 3"),
        ("vllm", "x = (", "SyntaxError"),
        ("vllm", "", "__version__"),
        ("vllm.platforms", "raise OSError('no\\ndriver')", "vLLM cannot tell its platform: OSError: no driver"),
        ("vllm.platforms", "raise SystemExit('no driver')", "vLLM cannot tell its platform: SystemExit: no driver"),
    ],
    ids=[
        *("ImportError", "RuntimeError", "several lines", "SystemExit", "SyntaxError"),
        *("no version", "no platform", "SystemExit of the platform"),
    ],
)
def test_a_broken_vllm_is_named_without_a_traceback(
    installed: Any, run: Any, module: str, source: str, told: str
) -> None:
    installed.write(module, source)
    code, out, errors = run("check")
    assert (code, errors) == (2, "")
    (reason,) = (line for line in out.splitlines() if line.startswith("reason "))
    assert told in reason
    assert "Traceback" not in out
    assert all("  " in line for line in out.splitlines()), "one line for each row"


@pytest.mark.parametrize("module", ["vllm", "vllm.platforms"])
def test_only_the_report_is_printed(installed: Any, run: Any, module: str) -> None:
    installed.write(module, f"print('hello')\n{installed.path(module).read_text()}")
    code, out, errors = run("check", "--json")
    assert (code, errors) == (0, "hello\n")
    assert json.loads(out)["status"] == "active"


@pytest.mark.parametrize(
    ("plugins", "code", "status", "warned"),
    [
        (None, 0, "active", []),
        ("vllm_gdn_plugin", 0, "active", []),
        ("another,vllm_gdn_plugin", 0, "active", []),
        ("", 1, "disabled", []),
        ("another", 1, "disabled", []),
        ("vllm-gdn-plugin", 1, "disabled", ["'vllm-gdn-plugin'"]),
        ("vllm_gdn_plugin,anothr", 0, "active", ["'anothr'"]),
    ],
)
def test_what_vllm_plugins_means_for_us(
    installed: Any,
    report: Any,
    plugins: str | None,
    code: int,
    status: str,
    warned: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if plugins is not None:
        monkeypatch.setenv("VLLM_PLUGINS", plugins)
    found_code, found = report()
    assert (found_code, found["status"]) == (code, status)
    assert found["vllm_plugins"] == ("not set: every plugin is loaded" if plugins is None else repr(plugins))
    assert len(found["warnings"]) == len(warned)
    assert all(name in warning for name, warning in zip(warned, found["warnings"], strict=True))
    if status == "disabled":
        assert f"VLLM_PLUGINS={plugins!r} leaves vllm_gdn_plugin out" in found["reason"]
        assert "VLLM_PLUGINS" in found["what_to_do"]


def test_a_plugin_that_vllm_does_not_see_is_no_plugin(host: Any, report: Any) -> None:
    dist_info(host.root, "vllm_gdn_plugin")  # hides the one that is installed here
    code, found = report()
    assert (code, found["status"], found["entry_point"]) == (1, "disabled", None)
    assert f"no entry point {NAME} in {GROUP}" in found["reason"]


@pytest.mark.parametrize(
    ("strategy", "required", "code", "status"),
    [
        ("dual_stream", "dual_stream", 0, "active"),
        ("fused", "fused", 0, "active"),
        ("serial", "serial", 0, "active"),
        ("fused", "dual_stream", 1, "refused"),
        ("dual_stream", "serial", 1, "refused"),
        ("serial", "dual_stream", 1, "serial"),
    ],
)
def test_require(
    installed: Any,
    report: Any,
    strategy: str,
    required: str,
    code: int,
    status: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VLLM_GDN_PLUGIN_STRATEGY", strategy)
    found_code, found = report("--require", required)
    assert (found_code, found["status"], found["strategy"]) == (code, status, strategy)
    assert code == 0 or f"{required} is required but the strategy will be {strategy}" in found["reason"]


@pytest.mark.parametrize("required", ["serial", "dual_stream"])
def test_where_the_plugin_is_refused_require_names_the_reason(installed: Any, report: Any, required: str) -> None:
    installed.version("0.19.1")
    code, found = report("--require", required)
    assert (code, found["status"]) == (1, "refused")
    assert found["reason"].startswith(f"{required} is required: vLLM 0.19.1 ")


@pytest.mark.parametrize(
    ("change", "strategy", "stops"),
    [
        (lambda tree: None, "auto", False),
        (lambda tree: tree.platform("cpu"), "auto", True),
        (lambda tree: tree.platform("cpu"), "serial", False),
        (lambda tree: tree.version("0.19.1"), "dual_stream", True),
    ],
    ids=["all well", "cpu", "serial", "refused"],
)
def test_where_strict_will_stop_the_engine_the_advice_says_so(
    installed: Any, plugin: Any, report: Any, change: Any, strategy: str, stops: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_GDN_PLUGIN_STRICT", "1")
    monkeypatch.setenv("VLLM_GDN_PLUGIN_STRATEGY", strategy)
    change(installed)
    assert ("unset VLLM_GDN_PLUGIN_STRICT" in report()[1]["what_to_do"]) == stops
    with pytest.raises(RuntimeError, match="STRICT=1") if stops else nullcontext():
        plugin.register(), plugin.import_gdn()


def test_a_setting_that_cannot_be_read_is_a_warning(
    installed: Any, report: Any, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_GDN_PLUGIN_TUNE", "many")
    code, found = report()
    assert code == 0
    assert [w.partition("=")[0] for w in found["warnings"]] == ["VLLM_GDN_PLUGIN_TUNE"]
    code, text, _ = run("check")
    assert [line for line in text.splitlines() if line.startswith("warning")] == [
        f"{'warning':<15}  {found['warnings'][0]}"
    ]


def test_require_is_not_met_where_the_plugin_is_left_out(
    installed: Any, report: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "")
    assert [(code, found["status"]) for code, found in [report("--require", "serial")]] == [(1, "disabled")]


def test_a_device_without_a_name_is_no_obstacle(installed: Any, report: Any) -> None:
    installed.edit("vllm.platforms", ('return "Stub Device"', "raise OSError('no driver')"))
    code, found = report()
    assert (code, found["platform"], found["device"]) == (0, "cuda", "not known: OSError: no driver")


@pytest.mark.parametrize("stream", [None, "ext://sys.stdout"])
def test_vllm_logs_to_stderr_unless_told_otherwise(
    installed: Any, report: Any, stream: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VLLM_LOGGING_STREAM")
    if stream:
        monkeypatch.setenv("VLLM_LOGGING_STREAM", stream)
    report()
    assert os.environ["VLLM_LOGGING_STREAM"] == (stream or "ext://sys.stderr")


@pytest.mark.parametrize(
    ("version", "allow", "code"),
    [
        ("0.20.0", "0", 0),
        ("0.33.0+cu130", "0", 0),
        ("0.19.1", "1", 1),
        ("0.34.0", "0", 1),
        ("0.34.0", "1", 0),
        ("dev", "0", 1),
        ("", "0", 1),
    ],
)
def test_a_version_that_is_not_installed(
    report: Any, run: Any, isolated: None, version: str, allow: str, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_GDN_PLUGIN_ALLOW_UNTESTED", allow)
    found_code, found = report("--vllm-version", version)
    assert (found_code, found["status"]) == (code, "refused" if code else "active")
    assert f"vLLM {version}" in found["reason"]
    assert found["vllm_version"] == version
    assert (found["strategy"] == "serial") == bool(code)
    assert ("run check where vLLM is installed" in found["what_to_do"]) == (not code)
    assert "None" not in run("check", "--vllm-version", version)[1], "what is not known is left out"
    assert "vllm" not in sys.modules


def test_sources_that_are_not_installed(tree: Any, report: Any, isolated: None) -> None:
    for path in (tree.root, tree.package, tree.wheel()):
        code, found = report("--vllm-source", str(path))
        assert (code, found["status"], found["contract"]) == (0, "active", found["reason"])
        assert found["vllm_version"] is None
        assert report("--vllm-source", str(path), "--vllm-version", "0.19.1")[0] == 1
    tree.edit(GDN, ("in_proj_ba", "in_proj_gates"))
    for path in (tree.root, tree.package, tree.wheel()):
        code, found = report("--vllm-source", str(path), "--vllm-version", "0.33.0")
        assert (code, found["status"]) == (1, "refused")
        assert "in_proj_ba" in found["reason"]
        assert "0.33.0" not in found["reason"], "only what does not hold is a reason"
    assert "vllm" not in sys.modules


@pytest.mark.parametrize("options", [("--vllm-source",), ("--vllm-version", "0.32.0", "--vllm-source")], ids=len)
def test_serial_is_serial_also_where_vllm_is_not_installed(
    tree: Any, report: Any, options: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_GDN_PLUGIN_STRATEGY", "serial")
    code, found = report(*options, str(tree.root))
    assert (code, found["status"], found["strategy"]) == (1, "serial", "serial")
    assert "serial was asked for" in found["reason"]
    assert report("--require", "serial", *options, str(tree.root))[0] == 0


def empty_wheel(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("other/envs.py", "")


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda path: None, "check: there is no "),
        (lambda path: path.write_text("text"), "is a file but not a wheel"),
        (lambda path: path.mkdir(), "holds no vLLM"),
        (empty_wheel, "holds no vLLM"),
    ],
    ids=["missing", "no wheel", "a directory without vLLM", "a wheel without vLLM"],
)
def test_a_path_that_holds_no_sources(tmp_path: Path, run: Any, make: Any, told: str) -> None:
    path = tmp_path / "given"
    make(path)
    code, out, errors = run("check", "--vllm-source", str(path))
    assert (code, out) == (2, "")
    assert errors.count("\n") == 1
    assert str(path) in errors
    assert told in errors


@pytest.mark.parametrize("path", ["a" * 5000, "a/" * 5000, "a\0b", ""], ids=["long", "deep", "NUL", "empty"])
def test_a_path_that_cannot_be_a_path(tmp_path: Path, run: Any, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, errors = run("check", "--vllm-source", path)
    assert (code, out, errors.count("\n")) == (2, "", 1)


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("serve",),
        ("check", "--fast"),
        ("check", "extra"),
        ("check", "--require", "auto"),
        ("check", "--vllm-version"),
    ],
    ids=" ".join,
)
def test_arguments_that_are_not_known(run: Any, arguments: tuple[str, ...]) -> None:
    code, out, errors = run(*arguments)
    assert (code, out) == (2, "")
    assert "usage: vllm-gdn-plugin" in errors


def test_help_and_version(run: Any) -> None:
    code, text, _ = run("check", "--help")
    assert code == 0
    for name, default, _help in describe():
        assert f"{name} (default {default})" in text
    for part in ("VLLM_PLUGINS", "\n  0  ", "\n  1  ", "\n  2  ", "--json", "--require", "--vllm-source", "--revision"):
        assert part in text
    for flag in fields(EngineFlags):
        assert f"--{flag.name.replace('_', '-')}" in text
    for flag in NOT_LOOKED_AT:
        assert flag in text
    assert run("--version") == (0, f"vllm-gdn-plugin {vllm_gdn_plugin.__version__}\n", "")


def test_python_dash_m(installed: Any) -> None:
    search = os.pathsep.join([str(installed.root), str(Path(vllm_gdn_plugin.__file__).parents[1])])
    result = subprocess.run(
        [sys.executable, "-m", "vllm_gdn_plugin", "check", "--json"],
        env=os.environ | {"PYTHONPATH": search},
        cwd=installed.root,
        capture_output=True,
        text=True,
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert json.loads(result.stdout)["torch_version"] == "2.13.0+stub"


def test_a_vllm_that_is_too_old_is_refused_for_its_age_whatever_its_source_lacks() -> None:
    """What would help is to upgrade vLLM, not the plugin."""
    older, breached = judge_version("0.19.1", True), Contract("module", "Class", ("there is no helper",))
    assert refusal(older, breached) == older.reason
    assert "upgrade vLLM" in older.reason


@pytest.mark.parametrize("text", ["0", "-1", "two", "1.5", ""])
def test_a_size_that_is_none_is_refused_also_without_a_model(run: Any, text: str) -> None:
    code, out, err = run("check", f"--tensor-parallel-size={text}")
    assert (code, out) == (2, "")
    assert f"{text!a} is not a whole number from 1 on" in err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--vllm-source", ""), "--vllm-source is empty"),
        (("--model", "one\ntwo"), "--model one two: there is no such path: it takes"),
    ],
)
def test_odd_arguments_get_one_line(installed: Any, run: Any, arguments: tuple[str, ...], says: str) -> None:
    code, out, err = run("check", *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert says in err


@pytest.fixture
def looked_up(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """(model, revision, flags) of each `--model`."""
    seen: list[Any] = []

    def with_model(report: Report, *what: Any) -> Report:
        seen.append(what)
        return report

    monkeypatch.setattr(check, "with_model", with_model)
    return seen


def test_the_engines_flags_have_its_names_and_defaults(installed: Any, run: Any, looked_up: list[Any]) -> None:
    assert run("check", "--model", "Qwen/X")[0] == 0
    flags = "-tp 4 -q fp8 --dtype half --enforce-eager --enable-lora --enable-dbo --cpu-offload-gb 1.5"
    flags += " --offload-group-size 8 --mamba-ssm-cache-dtype float32 --speculative-config {}"
    assert run("check", "--model", "Qwen/X", "--revision", "v2", *flags.split())[0] == 0
    assert looked_up == [
        ("Qwen/X", None, EngineFlags()),
        ("Qwen/X", "v2", EngineFlags(4, "fp8", "half", True, True, True, 1.5, 8, "float32", "{}")),
    ]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("--cpu-offload-gb=-1", "'-1' is not a number from 0 on"),
        ("--cpu-offload-gb=nan", "'nan' is not a number from 0 on"),
        ("--cpu-offload-gb=inf", "'inf' is not a number from 0 on"),
        ("--offload-group-size=x", "'x' is not a whole number"),
        ("--dtype=int8", "invalid choice: 'int8'"),
        ("--mamba-ssm-cache-dtype=int8", "invalid choice: 'int8'"),
    ],
)
def test_a_flag_that_makes_no_sense_is_refused(run: Any, arguments: str, says: str) -> None:
    code, out, err = run("check", arguments)
    assert (code, out) == (2, "")
    assert says in err


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full to write to")
def test_a_report_that_cannot_be_written_gets_one_line() -> None:
    command = [sys.executable, "-m", "vllm_gdn_plugin", "check", "--vllm-version", "0.30.0"]
    env = os.environ | {"PYTHONPATH": str(Path(vllm_gdn_plugin.__file__).parents[1])}
    with open("/dev/full", "w") as full:
        result = subprocess.run(command, env=env, stdout=full, stderr=subprocess.PIPE, text=True)
    assert result.returncode == 2
    assert result.stderr == "vllm-gdn-plugin check: the report cannot be written: No space left on device\n"


@pytest.fixture
def kernel_host(installed: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The host, of whose sources what the decode kernel relies on holds. On real sources: tests/engine."""
    monkeypatch.setattr(check, "why_no_decode_kernel", lambda package: None)
    return installed


MAY_RUN = "may run: it proves itself when the engine starts"

KERNEL: dict[str, tuple[dict[str, str], str, str | None]] = {
    "auto": ({}, "cuda", MAY_RUN),
    "1": ({"DECODE_KERNEL": "1"}, "cuda", MAY_RUN),
    "0": ({"DECODE_KERNEL": "0"}, "cuda", "off: VLLM_GDN_PLUGIN_DECODE_KERNEL=0"),
    "serial": ({"STRATEGY": "serial"}, "cuda", "off: VLLM_GDN_PLUGIN_STRATEGY=serial turns it off, too"),
    "serial and 1": ({"STRATEGY": "serial", "DECODE_KERNEL": "1"}, "cuda", MAY_RUN),
    "cpu": ({"STRATEGY": "fused"}, "cpu", "off: it is made for CUDA, this is platform cpu"),
    "left out": ({"PLUGINS": ""}, "cuda", None),
}


@pytest.mark.parametrize(("variables", "platform", "told"), KERNEL.values(), ids=KERNEL)
def test_whether_the_decode_kernel_may_run(
    kernel_host: Any,
    report: Any,
    run: Any,
    variables: dict[str, str],
    platform: str,
    told: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kernel_host.platform(platform)
    for name, text in variables.items():
        monkeypatch.setenv(f"VLLM_{'' if name == 'PLUGINS' else 'GDN_PLUGIN_'}{name}", text)
    assert report()[1]["decode_kernel"] == told
    text = run("check")[1]
    assert (f"decode kernel    {told}" in text) == (told is not None)


def test_the_readme_shows_how_it_begins(kernel_host: Any, run: Any) -> None:
    kernel_host.platform("cuda")
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    shown = readme.split("<!-- check -->\n```\n")[1].split("```\n<!-- /check -->")[0]
    assert run("check")[1].startswith(shown)
    assert shown.count("\n") > 3


@pytest.mark.parametrize("change", ["an old version", "another layer"])
def test_where_the_plugin_is_refused_nothing_is_told_of_the_kernel(kernel_host: Any, report: Any, change: str) -> None:
    CASES[change][0](kernel_host)
    assert report()[1]["decode_kernel"] is None


BREACH = "off: the source of "


def test_a_vllm_that_cannot_have_the_kernel_still_has_the_projections(
    installed: Any, report: Any, isolated: None
) -> None:
    """The stub has no metadata module: that is what the contract of the kernel finds."""
    for options in ((), ("--vllm-source", str(installed.root))):
        code, found = report(*options)
        assert (code, found["status"]) == (0, "active")
        assert found["decode_kernel"].startswith(BREACH)


def test_of_a_version_alone_it_is_said_from_which_on(report: Any, isolated: None) -> None:
    assert "with vLLM 0.28 and later" in report("--vllm-version", "0.27.1")[1]["decode_kernel"]
    assert report("--vllm-version", "0.19.1")[1]["decode_kernel"] is None


@pytest.mark.parametrize("elsewhere", [False, True])
def test_the_kernel_alone_is_active_and_its_strategy_serial(
    kernel_host: Any, report: Any, elsewhere: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_GDN_PLUGIN_STRATEGY", "serial")
    monkeypatch.setenv("VLLM_GDN_PLUGIN_DECODE_KERNEL", "1")
    options = ("--vllm-source", str(kernel_host.root)) if elsewhere else ()
    for required, code in (((), 0), (("--require", "serial"), 0), (("--require", "fused"), 1)):
        found_code, found = report(*required, *options)
        assert (found_code, found["status"], found["strategy"]) == (code, "refused" if code else "active", "serial")
    monkeypatch.setattr(check, "why_no_decode_kernel", lambda package: "it says so")
    code, found = report(*options)
    assert (code, found["status"], found["reason"]) == (1, "serial", "no decode kernel: it says so")


@pytest.mark.parametrize("strategy", ["auto", "serial"])
def test_a_strict_engine_stops_where_the_kernel_was_asked_for_and_is_off(
    installed: Any, plugin: Any, report: Any, strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in (("STRICT", "1"), ("DECODE_KERNEL", "1"), ("STRATEGY", strategy)):
        monkeypatch.setenv(f"VLLM_GDN_PLUGIN_{name}", text)
    code, found = report()
    assert (code, found["status"]) == (1, "refused")
    assert "unset VLLM_GDN_PLUGIN_STRICT" in found["what_to_do"]
    plugin.register()
    stock = plugin.import_gdn()
    with pytest.raises(RuntimeError, match="no decode kernel: the source of "):
        stock("layers.0")
    assert found["reason"].startswith("no decode kernel: the source of ")
