"""What register() does to a host, and what it never does. The host is the stand-in of conftest.py."""

from __future__ import annotations

import ast
import gc
import importlib
import importlib.util
import inspect
import multiprocessing
import os
import subprocess
import sys
import time
import tracemalloc
from contextlib import nullcontext
from importlib.abc import MetaPathFinder
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import vllm_gdn_plugin
from vllm_gdn_plugin import install
from vllm_gdn_plugin.decide.contract import GDN_CLASSES
from vllm_gdn_plugin.decide.plan import PADDED_TO
from vllm_gdn_plugin.report import Ledger
from vllm_gdn_plugin.settings import Settings, variable

GDN, OLD_GDN = GDN_CLASSES
CLASS = GDN_CLASSES[GDN]
STRICT = "VLLM_GDN_PLUGIN_STRICT"
HIDDEN = SimpleNamespace(size=lambda i: 4, dtype="bfloat16", device="cuda:0", shape=(4, 8))


def boom(*args: Any, **kwargs: Any) -> Any:
    raise ZeroDivisionError("boom")


def levels(plugin: Any) -> list[str]:
    return [level for level, _ in plugin.said]


def test_importing_the_package_imports_no_host() -> None:
    command = "import sys, vllm_gdn_plugin.cli.main as c; print(sorted({'torch', 'vllm', 'numpy'} & set(sys.modules)))"
    env = os.environ | {"PYTHONPATH": str(Path(vllm_gdn_plugin.__file__).parents[1])}
    result = subprocess.run([sys.executable, "-c", command], env=env, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("module", GDN_CLASSES)
def test_the_class_is_replaced_when_the_host_imports_it_and_not_before(plugin: Any, module: str) -> None:
    if module == OLD_GDN:
        plugin.tree.make_old()
    finders = list(sys.meta_path)
    plugin.register()
    plugin.register()
    assert len(sys.meta_path) == len(finders) + 1, "a second call takes the place of the first"
    assert module not in sys.modules, "register() must not import the layer: others serve another model"
    cuda = importlib.import_module("torch.cuda")
    assert cuda.touched == [], "register() must not initialise CUDA: it runs before the host forks"

    stock = plugin.import_gdn(module)
    assert cuda.touched == ["get_device_capability"], "the stand-in counts what the host itself does"
    assert list(plugin.replaced) == [GDN_CLASSES[module]]
    layer = stock()
    assert type(layer) is not stock
    assert isinstance(layer, stock)
    assert sys.meta_path == finders, "nothing is left behind in the import system"

    plugin.register()
    assert type(stock()) is type(layer)
    assert sys.meta_path == finders
    assert plugin.said == []


def test_a_class_that_is_already_there_is_replaced_at_once(plugin: Any) -> None:
    stock = plugin.import_gdn()
    finders = list(sys.meta_path)
    plugin.register()
    assert type(stock()) is not stock
    assert sys.meta_path == finders


def import_the_old_module(plugin: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module(OLD_GDN)


def import_a_shim(plugin: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plugin.tree.write(OLD_GDN, f"from {GDN} import {CLASS} as {GDN_CLASSES[OLD_GDN]}\n")
    importlib.import_module(OLD_GDN)


def import_a_shim_of_its_own(plugin: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plugin.tree.write(OLD_GDN, f"class {GDN_CLASSES[OLD_GDN]}:\n    pass\n")
    importlib.import_module(OLD_GDN)


def fail_once(plugin: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    source = plugin.tree.path(GDN).read_text()
    plugin.tree.write(GDN, "raise RuntimeError('interrupted')")
    with pytest.raises(RuntimeError, match="interrupted"):
        importlib.import_module(GDN)
    plugin.tree.write(GDN, source)
    importlib.invalidate_caches()


def register_after_a_shim(plugin: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import_a_shim_of_its_own(plugin, monkeypatch)
    plugin.register()


BEFORE_THE_LAYER = {
    "find_spec": lambda plugin, monkeypatch: importlib.util.find_spec(GDN),
    "the old module": import_the_old_module,
    "a shim of the old module": import_a_shim,
    "another class in the old module": import_a_shim_of_its_own,
    "the old module is there already": register_after_a_shim,
    "a failed import": fail_once,
}


@pytest.mark.parametrize("before", BEFORE_THE_LAYER.values(), ids=BEFORE_THE_LAYER)
def test_what_comes_before_the_layer_does_not_end_the_watch(
    plugin: Any, before: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    finders = list(sys.meta_path)
    plugin.register()
    before(plugin, monkeypatch)
    stock = plugin.import_gdn()
    assert list(plugin.replaced) == [CLASS]
    assert type(stock()) is not stock
    assert sys.meta_path == finders
    assert plugin.said == []


def test_a_strict_refusal_is_not_used_up_by_the_first_import(plugin: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(STRICT, "1")
    plugin.tree.edit(GDN, ("in_proj_ba", "in_proj_gates"))
    plugin.register()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="in_proj_ba"):
            plugin.import_gdn()


def test_the_hooked_module_is_as_without_the_hook(plugin: Any) -> None:
    def looks(module: Any) -> dict[str, Any]:
        spec = module.__spec__
        assert spec.loader is module.__loader__
        names = ("name", "origin", "cached", "submodule_search_locations", "has_location", "parent")
        return {n: getattr(spec, n) for n in names} | {
            "spec": type(spec),
            "loader": (type(spec.loader), vars(spec.loader)),
            "file": module.__file__,
            "names": sorted(vars(module)),
            "source": inspect.getsource(getattr(module, CLASS)),
        }

    without = looks(importlib.import_module(GDN))
    del sys.modules[GDN]
    plugin.register()
    assert looks(importlib.import_module(GDN)) == without
    assert plugin.replaced, "or the hook was not there"


class FailingFinder(MetaPathFinder):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name == GDN:
            raise OSError("the disk is gone")


@pytest.mark.parametrize(
    "source",
    ["raise RuntimeError('host', 1)", "import vllm.nothing", "x = (", "import sys\nsys.exit(3)", None, FailingFinder],
    ids=["raises", "ImportError", "SyntaxError", "SystemExit", "no module", "finder raises"],
)
def test_the_host_gets_its_own_errors(plugin: Any, source: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if source is None:
        plugin.tree.remove(GDN)
    elif source is FailingFinder:
        monkeypatch.setattr(sys, "meta_path", [FailingFinder(), *sys.meta_path])
    else:
        plugin.tree.write(GDN, source)

    def error_of_the_import() -> tuple[type, Any]:
        with pytest.raises(BaseException) as caught:  # noqa: PT011  whatever it is, it must be the same
            importlib.import_module(GDN)
        assert GDN not in sys.modules
        return caught.type, caught.value.args

    without = error_of_the_import()
    plugin.register()
    assert error_of_the_import() == without
    assert levels(plugin) == ([] if source else ["warning"]), "a layer that has moved is never imported: said at once"


@pytest.mark.parametrize("version", ["0.19.1", "0.34.0", "dev"])
def test_an_unsupported_version_is_left_alone(plugin: Any, version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plugin.tree.version(version)
    finders, variables = list(sys.meta_path), dict(plugin.vllm("envs").environment_variables)
    plugin.register()
    plugin.register()
    assert levels(plugin) == ["warning"]
    assert f"vLLM {version}" in plugin.said[0][1]
    assert sys.meta_path == finders
    assert plugin.vllm("envs").environment_variables == variables
    assert type(plugin.import_gdn()()).__name__ == CLASS

    monkeypatch.setenv(STRICT, "1")
    with pytest.raises(plugin.install.Refused, match=f"vLLM {version}.*{STRICT}=1"):
        plugin.register()


def test_a_newer_version_can_be_admitted(plugin: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plugin.tree.version("0.34.0")
    monkeypatch.setenv("VLLM_GDN_PLUGIN_ALLOW_UNTESTED", "1")
    plugin.register()
    plugin.import_gdn()
    assert list(plugin.replaced) == [CLASS]


@pytest.mark.parametrize(
    ("strategy", "platform", "told"),
    [("serial", "cuda", "serial was asked for"), ("auto", "cpu", "platform cpu"), ("dual_stream", "rocm", "CUDA only")],
)
def test_serial_leaves_the_class_untouched(
    plugin: Any, strategy: str, platform: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_GDN_PLUGIN_STRATEGY", strategy)
    plugin.tree.platform(platform)
    plugin.register()
    stock = plugin.import_gdn()
    assert plugin.replaced == {}
    assert type(stock()) is stock
    ((level, message),) = plugin.said
    assert level == "info"
    assert told in message


@pytest.mark.parametrize(("strategy", "stops"), [("serial", False), ("auto", True)])
def test_strict_stops_where_nothing_can_be_gained_unless_that_was_asked_for(
    plugin: Any, strategy: str, stops: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_GDN_PLUGIN_STRATEGY", strategy)
    monkeypatch.setenv(STRICT, "1")
    plugin.tree.platform("cpu")
    plugin.register()
    if stops:
        with pytest.raises(plugin.install.Refused, match="platform cpu"):
            plugin.import_gdn()
    else:
        plugin.import_gdn()
    assert plugin.replaced == {}


def test_another_plugin_keeps_its_class(plugin: Any) -> None:
    class Theirs:
        pass

    plugin.replaced[CLASS] = Theirs
    plugin.register()
    plugin.import_gdn()
    assert plugin.replaced == {CLASS: Theirs}
    ((level, message),) = plugin.said
    assert level == "warning"
    for part in (f"{Theirs.__module__}.{Theirs.__qualname__} already replaces {CLASS}", "VLLM_PLUGINS"):
        assert part in message


def test_a_layer_that_changed_upstream_is_left_alone(plugin: Any) -> None:
    plugin.tree.edit(GDN, ("in_proj_ba", "in_proj_gates"))
    plugin.register()
    stock = plugin.import_gdn()
    assert type(stock()) is stock
    assert levels(plugin) == ["warning"]
    assert "in_proj_ba" in plugin.said[0][1]


FAILING_STEPS = {
    "the version": (lambda p, m: p.tree.edit("vllm", ("__version__", "version")), "AttributeError"),
    "declare_variables": (lambda p, m: p.tree.edit("vllm.envs", ("environment_variables", "renamed")), "ImportError|"),
    "when_imported": (lambda p, m: m.setattr(p.install.host, "when_imported", boom), "ZeroDivisionError: boom"),
    "check_contract": (lambda p, m: m.setattr(p.install, "check_contract", boom), "ZeroDivisionError: boom"),
    "the platform": (
        lambda p, m: p.tree.edit("vllm.platforms", ('return self.device_name == "cuda"', "raise OSError('driver')")),
        "OSError: driver",
    ),
    "op_registry_oot": (
        lambda p, m: m.delattr(p.vllm("model_executor.custom_op"), "op_registry_oot"),
        "ImportError: cannot import name 'op_registry_oot'",
    ),
    "the layer module": (lambda p, m: m.setitem(sys.modules, "vllm_gdn_plugin.run.layer", None), "ModuleNotFoundError"),
    "make_layer_class": (lambda p, m: m.setattr(p.layer, "make_layer_class", boom), "ZeroDivisionError: boom"),
    "replace": (
        lambda p, m: m.setattr(p.vllm("model_executor.custom_op").PluggableLayer, "register_oot", boom),
        "ZeroDivisionError: boom",
    ),
}
"""A step of ours and how it fails. ``|`` ends an alternative: the host may fail in more than one way."""


@pytest.mark.parametrize("strict", [False, True], ids=["", "strict"])
@pytest.mark.parametrize(("fail", "told"), FAILING_STEPS.values(), ids=FAILING_STEPS)
def test_whatever_fails_ends_in_one_line(
    plugin: Any, fail: Any, told: str, strict: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail(plugin, monkeypatch)
    monkeypatch.setenv(STRICT, str(int(strict)))
    if strict:
        with pytest.raises(plugin.install.Refused, match=f"{STRICT}=1") as caught:
            plugin.register(), plugin.import_gdn()
        assert caught.value.__cause__ is not None
    else:
        plugin.register()
        plugin.register()
        stock = plugin.import_gdn()
        if hasattr(plugin.vllm("model_executor.custom_op"), "op_registry_oot"):
            assert type(stock()) is stock
    ((level, message),) = plugin.said
    assert level == ("error" if strict else "warning")
    assert told.rstrip("|") in message or told.endswith("|")
    assert f"vllm-gdn-plugin {vllm_gdn_plugin.__version__}: " in message
    assert "unexpected " in message


OUR_CALLS = [
    ast.unparse(node.func)
    for function in (install.register, install.install, install._install)
    for node in ast.walk(ast.parse(inspect.getsource(function)))
    if isinstance(node, ast.Call)
]
NO_STEPS = ("getattr", "tuple", "GDN_CLASSES.values", "partial", "say", "Refused", "stepping_aside", "_install")
NO_STEPS += ("read_settings", "multiprocessing.parent_process", "host.withdraw", "host.stop_watching", "refusal")
STEPS = sorted(set(OUR_CALLS) - set(NO_STEPS))


@pytest.mark.parametrize("strict", [False, True], ids=["", "strict"])
@pytest.mark.parametrize("imported", ["imported before", "imported after"])
@pytest.mark.parametrize("fails", ["fails before it acts", "fails after it acted"])
@pytest.mark.parametrize("step", STEPS)
def test_nothing_is_half_installed(
    plugin: Any, step: str, fails: str, imported: str, strict: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = {"host": plugin.install.host}.get(step.partition(".")[0], plugin.install)
    owner = plugin.layer if step == "make_layer_class" else owner
    name = step.rpartition(".")[2]
    original = getattr(owner, name)

    def failing(*args: Any, **kwargs: Any) -> Any:
        if fails == "fails after it acted":
            original(*args, **kwargs)
        boom()

    def state() -> dict[str, Any]:
        return {
            "import system": list(sys.meta_path),
            "replacements": dict(plugin.replaced),
            "variables": dict(plugin.vllm("envs").environment_variables),
            "class": dict(vars(sys.modules[GDN].QwenGatedDeltaNetAttention)) if GDN in sys.modules else None,
        }

    monkeypatch.setattr(owner, name, failing)
    monkeypatch.setenv(STRICT, str(int(strict)))
    if imported == "imported before":
        plugin.import_gdn()
    before = state()
    with pytest.raises(plugin.install.Refused) if strict else nullcontext():
        plugin.register()
        plugin.import_gdn()
    after = state()
    if GDN in sys.modules and before["class"] is None:
        assert not any("gdn_plugin" in member for member in after.pop("class"))
        before.pop("class")
    if strict:  # the watch is there to refuse the next import as well
        after["import system"] = [
            f for f in after["import system"] if not isinstance(f, plugin.install.host._ImportWatch)
        ]
    assert after == before
    if not strict:
        stock = plugin.import_gdn()
        assert type(stock()) is stock
        assert levels(plugin) == ["warning"]


def test_a_layer_that_cannot_be_planned_stays_serial(plugin: Any) -> None:
    plugin.tree.edit("vllm.config.vllm", ("return config", "raise LookupError('no config')"))
    plugin.register()
    layers = [plugin.import_gdn()() for _ in range(2)]
    assert [layer.gdn_strategy for layer in layers] == ["serial", "serial"]
    ((level, message),) = plugin.said
    assert (level, "LookupError: no config" in message) == ("warning", True)
    assert layers[0].forward(HIDDEN)[0] == "stock"


def test_a_setting_that_leaves_nothing_to_overlap_is_said(plugin: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_GDN_PLUGIN_STRATEGY", "dual_stream")
    monkeypatch.setenv("VLLM_GDN_PLUGIN_MAX_TOKENS", "0")
    plugin.register()
    assert plugin.import_gdn()().gdn_strategy == "serial"
    ((_, message),) = plugin.said
    assert "VLLM_GDN_PLUGIN_MAX_TOKENS=0 leaves no batch to overlap" in message


def test_what_was_done_is_said_once_when_the_weights_are_there(plugin: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_GDN_PLUGIN_STRATEGY", "dual_stream")
    monkeypatch.setenv("VLLM_GDN_PLUGIN_MAX_TOKENS", "7")
    plugin.register()
    layers = [plugin.import_gdn()(f"layers.{i}") for i in range(3)]
    for layer in layers:
        assert (layer.gdn_strategy, layer.gdn_max_tokens, layer.gdn_safe_pair) == ("dual_stream", 7, True)
    assert plugin.said == [], "until then a loader can still change a layer"
    for layer in layers:
        layer.gdn_after_loading.quant_method.process_weights_after_loading(layer)
    ((level, message),) = plugin.said
    assert level == "info"
    for part in ("dual_stream on 3 of 3 GDN layers", "platform cuda", "vLLM 0.32.0"):
        assert part in message
    assert "dual_stream" in plugin.vllm("envs").compile_factors()["VLLM_GDN_PLUGIN"]
    for layer in layers:
        layer.gdn_after_loading.quant_method.process_weights_after_loading(layer)
    assert len(plugin.said) == 1, "a reload changes nothing"
    another = plugin.import_gdn()("layers.0")
    another.gdn_after_loading.quant_method.process_weights_after_loading(another)
    assert "dual_stream on 1 of 1 GDN layers" in plugin.said[1][1], "and a second engine has a line of its own"


@pytest.mark.parametrize(
    ("variables", "timed"),
    [({}, True), ({"TUNE": "0"}, False), ({"STRATEGY": "dual_stream"}, False), ({"STRATEGY": "fused"}, False)],
    ids=str,
)
def test_auto_chooses_by_time_and_what_is_asked_for_by_name_does_not(
    plugin: Any, variables: dict[str, str], timed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    added: list[Any] = []
    ran: list[Any] = []
    tuner = SimpleNamespace(
        add=lambda layer, facts: added.append((layer, facts)) or (), run=lambda last: ran.append(last) or "words"
    )
    monkeypatch.setattr(plugin.install, "tuner", tuner)
    for name, text in variables.items():
        monkeypatch.setenv(f"VLLM_GDN_PLUGIN_{name}", text)
    plugin.register()
    layers = [plugin.import_gdn()(f"layers.{i}") for i in range(2)]
    assert [layer for layer, _ in added] == (layers if timed else [])
    assert all(layer.gdn_tuned == {} for layer in layers if layer.gdn_strategy != "serial")
    assert all(facts.qkvz.output_size == 6 for _, facts in added)
    if variables != {"STRATEGY": "fused"}:  # whose weights do not lie on one device here
        for layer in layers:
            layer.gdn_after_loading.quant_method.process_weights_after_loading(layer)
        ((_, message),) = plugin.said
        assert message.endswith("(platform cuda, vLLM 0.32.0); in CUDA graphs words")
        assert ran == layers[-1:], "the others' weights are in place by then, and not before"


def weights_to_fuse(plugin: Any) -> None:
    """Give the projections of the stand-in weights, and the plugin a ``FusedProjections`` that notes its arguments."""
    plugin.tree.edit(
        "vllm.model_executor.layers.linear",
        ("class Merged", "class Weight:\n    device = 'cuda:0'\n\n\nclass Merged"),
        ("        self.quant_method", "        self.weight = Weight()\n        self.quant_method"),
    )
    fused = ModuleType("vllm_gdn_plugin.run.fused")
    fused.FusedProjections = lambda qkvz, ba, ways: SimpleNamespace(  # type: ignore[attr-defined]
        both=(qkvz, ba), ways=ways, padding=448 if ways else 8
    )
    sys.modules[fused.__name__] = fused


@pytest.mark.parametrize(
    ("variables", "sizes", "timed"),
    [
        ({}, [1, 2, 512], True),
        ({"MAX_TOKENS": "2"}, [2, 4], True),
        ({"MAX_TOKENS": "2"}, [4, 8], False),
        ({}, [], False),
        ({"TUNE": "0"}, [1, 2], False),
        ({"STRATEGY": "fused"}, [1, 2], False),
    ],
    ids=str,
)
def test_a_fused_layer_is_made_for_the_ways_that_auto_will_choose_from(
    plugin: Any, variables: dict[str, str], sizes: list[int], timed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A padded GEMM needs room behind the weight, which the layer is given when it is constructed, or not at all."""
    weights_to_fuse(plugin)
    plugin.tree.edit(
        "vllm.config.vllm", ('Config(name="FULL")', f'Config(name="FULL"), cudagraph_capture_sizes={sizes}')
    )
    plugin.tree.edit(GDN, ("Linear(6)", "Linear(12288)"), ("Linear(2)", "Linear(64)"))
    plugin.tree.edit("vllm.model_executor.layers.linear", ("bias, gather", "input_size = 4096\n    bias, gather"))
    for name, text in variables.items():
        monkeypatch.setenv(f"VLLM_GDN_PLUGIN_{name}", text)
    plugin.register()
    layer = plugin.import_gdn()()
    assert layer.gdn_strategy == "fused"
    assert layer.gdn_fused.both == (layer.in_proj_qkvz, layer.in_proj_ba)
    assert layer.gdn_fused.ways == (("fused", *PADDED_TO, "dual_stream", "serial") if timed else ())
    key = Ledger()
    key.record(layer.prefix, "fused", 448 if timed else 8)
    compiled_for = plugin.vllm("envs").compile_factors()["VLLM_GDN_PLUGIN"]
    assert compiled_for == f"{vllm_gdn_plugin.__version__} {key.state()}", "a graph of another width would not run"
    assert plugin.said == []


IN_PLACE = {
    (True, True): ([("info", "fused on 2 of 2 GDN layers")], "fused "),
    (True, False): ([("warning", "the loader replaced a weight"), ("info", "fused on 1 of 2 GDN layers")], "fused "),
    (False, True): ([("warning", "the loader replaced a weight"), ("info", "fused on 1 of 2 GDN layers")], "fused "),
    (False, False): ([("warning", "the loader replaced a weight")], "stock"),
}
"""For each of two layers whether its weights are still in place when they are loaded: what is said, and the state."""


@pytest.mark.parametrize(("in_place", "said", "state"), [(key, *value) for key, value in IN_PLACE.items()])
def test_a_fused_layer_goes_back_to_serial_where_a_loader_replaced_a_weight(
    plugin: Any, in_place: tuple[bool, ...], said: list[tuple[str, str]], state: str
) -> None:
    weights_to_fuse(plugin)
    plugin.register()
    layers = [plugin.import_gdn()(f"layers.{i}") for i in range(2)]
    for layer, still in zip(layers, in_place, strict=True):
        assert (layer.gdn_strategy, layer.gdn_padding) == ("fused", 8)
        assert layer.gdn_fused.both == (layer.in_proj_qkvz, layer.in_proj_ba)
        layer.gdn_fused.is_loaded = lambda still=still: still

    for layer in layers:
        layer.gdn_after_loading.quant_method.process_weights_after_loading(layer)
    assert [layer.gdn_strategy for layer in layers] == ["fused" if still else "serial" for still in in_place]
    assert levels(plugin) == [level for level, _ in said]
    assert all(told in message for (_, told), (_, message) in zip(said, plugin.said, strict=True))
    key = plugin.vllm("envs").compile_factors()["VLLM_GDN_PLUGIN"]
    assert key.startswith(f"{vllm_gdn_plugin.__version__} {state}")


@pytest.mark.parametrize(("names", "collected"), [("abcd", False), ("abcd", True), ("wxyz", True)])
def test_an_engine_that_failed_to_load_does_not_silence_the_next(names: str, collected: bool) -> None:
    """In one process: the layers were waiting for their weights, and the next model has fewer of them, or others."""

    class Layer:
        def __init__(self, prefix: str) -> None:
            self.prefix = prefix

    ledger, alone = Ledger(), Ledger()
    failed = [Layer(name) for name in names]
    for layer in failed:
        ledger.construct(layer)
        ledger.record(layer.prefix, "fused")
    ledger.finish(names[0], "fused")
    if collected:
        del failed, layer
    layers = []
    for one in (ledger, alone):
        for name, strategy in {"a": "serial", "b": "fused"}.items():
            layers.append(Layer(name))
            one.construct(layers[-1])
            one.record(name, strategy)
        one.finish("b", "fused")
        assert one.summary() == "fused on 1 of 2 GDN layers"
        assert one.summary() == ""
    assert ledger.state() == alone.state()


def test_the_compile_key_tells_which_layer_runs_with_what() -> None:
    def state(**strategies: str) -> str:
        ledger = Ledger()
        for name, what in strategies.items():
            strategy, _, padding = what.partition(" ")
            ledger.record(name, strategy, int(padding or 0))
        return ledger.state()

    plans = [
        {"a": "fused", "b": "fused"},
        {"a": "fused", "b": "fused 448"},
        {"a": "fused", "b": "serial"},
        {"a": "serial", "b": "fused"},
        {"a": "fused", "b": "dual_stream"},
        {"a": "dual_stream", "b": "fused"},
        {},
    ]
    assert len({state(**strategies) for strategies in plans}) == len(plans)
    assert state(a="serial") == state() == "stock"
    assert state(a="fused", b="fused") == state(b="fused", a="fused")


@pytest.mark.parametrize("step", ["layer_facts", "after_loading"])
def test_a_layer_that_could_not_be_set_up_counts_as_serial(
    plugin: Any, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else its graph, which is stock, would be stored under the key of one that is not."""
    plugin.register()
    stock = plugin.import_gdn()
    monkeypatch.setattr(plugin.install.host, step, boom)
    layer = stock("layers.0")
    assert layer.gdn_strategy == "serial"
    assert plugin.vllm("envs").compile_factors()["VLLM_GDN_PLUGIN"].endswith(" stock")


@pytest.mark.parametrize("strict", [False, True], ids=["", "strict"])
def test_a_rule_that_a_layer_breaks_is_said_once(plugin: Any, strict: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    plugin.tree.edit("vllm.config.vllm", ("lora_config=None", "lora_config=1"))
    monkeypatch.setenv(STRICT, str(int(strict)))
    plugin.register()
    stock = plugin.import_gdn()
    if strict:
        with pytest.raises(plugin.install.Refused, match="LoRA is enabled"):
            stock()
    else:
        assert [stock().gdn_strategy for _ in range(2)] == ["serial", "serial"]
    ((level, message),) = plugin.said
    assert level == ("error" if strict else "warning")
    assert "LoRA is enabled" in message


def test_settings_that_cannot_be_read_are_named_once_and_the_rest_goes_on(
    plugin: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_GDN_PLUGIN_STRATEGY", "fastest")
    monkeypatch.setenv("VLLM_GDN_PLUGIN_MAX_TOKENS", "-1")
    plugin.register()
    plugin.register()
    plugin.import_gdn()
    assert levels(plugin) == ["warning", "warning"]
    assert [name for name in ("STRATEGY", "MAX_TOKENS") if any(name in text for _, text in plugin.said)] == [
        "STRATEGY",
        "MAX_TOKENS",
    ]
    assert list(plugin.replaced) == [CLASS]


ANY_VALUE = st.binary().map(lambda octets: os.fsdecode(octets.replace(b"\0", b""))) | st.sampled_from(["1", "serial"])


@given(st.dictionaries(st.sampled_from([*map(variable, vars(Settings())), "VLLM_GDN_PLUGIN_OTHER"]), ANY_VALUE))
@hypothesis_settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_no_value_of_a_variable_raises_or_is_warned_of_twice(plugin: Any, environ: dict[str, str]) -> None:
    importlib.import_module("vllm_gdn_plugin.report")._said.clear()
    plugin.said.clear()
    plugin.replaced.clear()
    sys.modules.pop(GDN, None)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environ.items():
            patch.setenv(name, value)
        plugin.register()
        plugin.register()
        plugin.import_gdn()
        plugin.register()
    assert len(plugin.said) <= len(environ)
    assert len(set(plugin.said)) == len(plugin.said)


GROWS = {
    "active": lambda plugin, patch: None,
    "refused": lambda plugin, patch: plugin.tree.edit(GDN, ("in_proj_ba", "in_proj_gates")),
    "fails": lambda plugin, patch: patch.setattr(plugin.install, "check_contract", boom_differently),
    "fails for each layer": lambda plugin, patch: patch.setattr(plugin.install.host, "layer_facts", boom_differently),
}


def boom_differently(*args: Any) -> Any:
    raise ZeroDivisionError(f"boom {time.time_ns()}".ljust(10_000, "!"))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts the open files in /proc, which is Linux")
@pytest.mark.parametrize("case", GROWS.values(), ids=GROWS)
def test_memory_and_handles_do_not_grow(plugin: Any, case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    case(plugin, monkeypatch)

    def rounds(count: int) -> tuple[int, int, int]:
        for _ in range(count):
            plugin.replaced.clear()
            plugin.register()
            for layer in [stock(f"layers.{i}") for i in range(3)]:
                if hasattr(layer, "gdn_after_loading"):
                    layer.gdn_after_loading.quant_method.process_weights_after_loading(layer)
            del layer
            plugin.said[:] = plugin.said[:1]
        gc.collect()
        return len(os.listdir("/proc/self/fd")), len(gc.get_objects()), tracemalloc.get_traced_memory()[0]

    stock = plugin.import_gdn()
    tracemalloc.start()
    seen = [rounds(count) for count in (10, 100, 100)]
    tracemalloc.stop()
    # What we keep is kept in each hundred; Python's table of interned strings, of megabytes, grows once in a while.
    files, objects, octets = (min(two - one, three - two) for one, two, three in zip(*seen, strict=True))
    assert files <= 0
    assert objects < 100, "less than one in a round"
    assert octets < 100 * 5000, "what Python itself caches is less; a message kept in each round would be 10000"


def test_one_process_speaks_for_all(plugin: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plugin.tree.version("0.19.1")
    monkeypatch.setattr(multiprocessing, "parent_process", lambda: object())
    plugin.register()
    assert plugin.said == []


@pytest.mark.parametrize("group", ["TP", "PCP", "PP"])
def test_one_rank_speaks_for_all(plugin: Any, group: str) -> None:
    plugin.tree.edit("vllm.distributed.parallel_state", (f"{group} = Group(0, 1)", f"{group} = Group(1, 2)"))
    plugin.tree.edit(GDN, ("in_proj_ba", "in_proj_gates"))
    plugin.register()
    stock = plugin.import_gdn()
    assert type(stock()) is stock
    assert plugin.said == []


SPEAKS = {
    "PP = Group(0, 2)": " of pipeline stage 0",
    "PP = Group(1, 2)": " of pipeline stage 1",
    "TP = Group(0, 2)": "",
    "TP = Group(1, 2)": None,
    "PCP = Group(1, 2)": None,
    "INITIALIZED = False": "",
}
"""A process's place among the others, and what it adds to the report; None: another process gives it."""


@pytest.mark.parametrize(("place", "stage"), SPEAKS.items())
@pytest.mark.parametrize("refused", [False, True], ids=["", "refused"])
def test_each_pipeline_stage_speaks_for_its_own_layers(
    plugin: Any, place: str, stage: str | None, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_GDN_PLUGIN_STRATEGY", "dual_stream")
    name = place.split(" ")[0]
    usual = "INITIALIZED = True" if name == "INITIALIZED" else f"{name} = Group(0, 1)"
    plugin.tree.edit("vllm.distributed.parallel_state", (usual, place))
    if refused:
        plugin.tree.edit("vllm.config.vllm", ("lora_config=None", "lora_config=1"))
    plugin.register()
    layer = plugin.import_gdn()()
    if not refused:
        layer.gdn_after_loading.quant_method.process_weights_after_loading(layer)
    told = "LoRA is enabled" if refused else f"dual_stream on 1 of 1 GDN layers{stage} (platform cuda"
    assert [told in message for _, message in plugin.said] == ([] if stage is None else [True])
    for _ in range(2):
        importlib.import_module("vllm_gdn_plugin.report").warn_once("what befell a layer", "why")
    assert sum("what befell a layer: why" in message for _, message in plugin.said) == (stage is not None)


@pytest.mark.parametrize(
    ("module", "name", "version"),
    [
        ("vllm.logger", "init_logger", "0.32.0"),
        ("vllm.logger", "init_logger", "0.19.1"),
        ("vllm.distributed.parallel_state", "get_tp_group", "0.32.0"),
    ],
)
def test_a_host_without_a_voice_is_left_alone_all_the_same(
    plugin: Any, module: str, name: str, version: str, caplog: pytest.LogCaptureFixture
) -> None:
    plugin.tree.edit(module, (name, "renamed"))
    plugin.tree.version(version)
    plugin.register()
    stock = plugin.import_gdn()
    assert type(stock()) is stock
    said = plugin.said + [(record.levelname.lower(), record.getMessage()) for record in caplog.records]
    ((level, message),) = said
    assert level == "warning"
    assert (name if version == "0.32.0" else f"vLLM {version}") in message


def test_every_setting_and_the_plugin_itself_are_part_of_the_compile_cache_key(
    plugin: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def key(**settings: str) -> dict[str, Any]:
        for name in vars(Settings()):
            monkeypatch.delenv(variable(name), raising=False)
        for name, text in settings.items():
            monkeypatch.setenv(variable(name), text)
        plugin.register()
        factors: dict[str, Any] = plugin.vllm("envs").compile_factors()
        return factors

    bare = key()
    assert set(bare) == {"VLLM_OWN", "VLLM_GDN_PLUGIN", *map(variable, vars(Settings()))}
    assert bare["VLLM_GDN_PLUGIN"] == f"{vllm_gdn_plugin.__version__} stock"
    others = {"strategy": "dual_stream", "max_tokens": "7", "tune": "0", "allow_untested": "1", "strict": "1"}
    assert others.keys() == vars(Settings()).keys()
    for name, text in others.items():
        assert [n for n, value in key(**{name: text}).items() if value != bare[n]] == [variable(name)]
