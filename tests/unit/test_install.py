"""What register() does to a host, and what it never does. The host is the stand-in of conftest.py."""

from __future__ import annotations

import ast
import gc
import importlib
import importlib.util
import inspect
import multiprocessing
import os
import sys
import time
import tracemalloc
from contextlib import nullcontext
from importlib.abc import MetaPathFinder
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import vllm_gdn_plugin
from vllm_gdn_plugin import install
from vllm_gdn_plugin.decide.contract import GDN_CLASSES
from vllm_gdn_plugin.report import Ledger
from vllm_gdn_plugin.settings import Settings, variable

GDN, OLD_GDN = GDN_CLASSES
CLASS = GDN_CLASSES[GDN]
STRICT = "VLLM_GDN_PLUGIN_STRICT"


def boom(*args: Any, **kwargs: Any) -> Any:
    raise ZeroDivisionError("boom")


def levels(plugin: Any) -> list[str]:
    return [level for level, _ in plugin.said]


def key(plugin: Any) -> str:
    """What vLLM's compile-cache keys hold of the plugin's state."""
    factor: str = plugin.vllm("envs").compile_factors()["VLLM_GDN_PLUGIN"]
    return factor.removeprefix(f"{vllm_gdn_plugin.__version__} ")


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
    assert plugin.replaced == [GDN_CLASSES[module]]
    assert plugin.registry == {}, "the name is left to others"
    assert stock("layers.0").is_gdn_plugin
    assert sys.meta_path == finders, "nothing is left behind in the import system"

    plugin.register()
    assert stock("layers.0").is_gdn_plugin
    assert sys.meta_path == finders
    assert plugin.said == []


def test_a_class_that_is_already_there_is_replaced_at_once(plugin: Any) -> None:
    stock = plugin.import_gdn()
    finders = list(sys.meta_path)
    plugin.register()
    assert stock("layers.0").is_gdn_plugin
    assert sys.meta_path == finders


def import_the_old_module(plugin: Any) -> None:
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module(OLD_GDN)


def import_a_shim(plugin: Any) -> None:
    plugin.tree.write(OLD_GDN, f"from {GDN} import {CLASS} as {GDN_CLASSES[OLD_GDN]}\n")
    importlib.import_module(OLD_GDN)


def import_a_shim_of_its_own(plugin: Any) -> None:
    plugin.tree.write(OLD_GDN, f"class {GDN_CLASSES[OLD_GDN]}:\n    pass\n")
    importlib.import_module(OLD_GDN)


def fail_once(plugin: Any) -> None:
    source = plugin.tree.path(GDN).read_text()
    plugin.tree.write(GDN, "raise RuntimeError('interrupted')")
    with pytest.raises(RuntimeError, match="interrupted"):
        importlib.import_module(GDN)
    plugin.tree.write(GDN, source)
    importlib.invalidate_caches()


def register_after_a_shim(plugin: Any) -> None:
    import_a_shim_of_its_own(plugin)
    plugin.register()


BEFORE_THE_LAYER = {
    "find_spec": lambda plugin: importlib.util.find_spec(GDN),
    "the old module": import_the_old_module,
    "a shim of the old module": import_a_shim,
    "another class in the old module": import_a_shim_of_its_own,
    "the old module is there already": register_after_a_shim,
    "a failed import": fail_once,
}


@pytest.mark.parametrize("before", BEFORE_THE_LAYER.values(), ids=BEFORE_THE_LAYER)
def test_what_comes_before_the_layer_does_not_end_the_watch(plugin: Any, before: Any) -> None:
    finders = list(sys.meta_path)
    plugin.register()
    before(plugin)
    assert plugin.import_gdn()("layers.0").is_gdn_plugin
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
    finders = list(sys.meta_path)
    plugin.register()
    plugin.register()
    assert levels(plugin) == ["warning"]
    assert f"vLLM {version}" in plugin.said[0][1]
    assert sys.meta_path == finders
    declared = {"VLLM_GDN_PLUGIN", *map(variable, vars(Settings()))}
    assert declared < {*plugin.vllm("envs").environment_variables}, "or --fail-on-environ-validation ends the engine"
    stock = plugin.import_gdn()
    assert type(stock("layers.0")) is stock

    monkeypatch.setenv(STRICT, "1")
    with pytest.raises(plugin.install.Refused, match=f"vLLM {version}.*{STRICT}=1"):
        plugin.register()


def test_a_newer_version_can_be_admitted(plugin: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plugin.tree.version("0.34.0")
    monkeypatch.setenv("VLLM_GDN_PLUGIN_ALLOW_UNTESTED", "1")
    plugin.register()
    assert plugin.import_gdn()("layers.0").is_gdn_plugin


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
    assert type(stock("layers.0")) is stock
    assert plugin.replaced == []
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
    assert plugin.replaced == []


def test_a_layer_that_changed_upstream_is_left_alone(plugin: Any) -> None:
    plugin.tree.edit(GDN, ("in_proj_ba", "in_proj_gates"))
    plugin.register()
    stock = plugin.import_gdn()
    assert type(stock("layers.0")) is stock
    assert levels(plugin) == ["warning"]
    assert "in_proj_ba" in plugin.said[0][1]


FAILING_STEPS = {
    "the version": (lambda p, m: p.tree.edit("vllm", ("__version__", "version")), "AttributeError"),
    "declare_variables": (lambda p, m: p.tree.edit("vllm.envs", ("environment_variables", "renamed")), "ImportError|"),
    "the platform": (
        lambda p, m: p.tree.edit("vllm.platforms", ('return self.device_name == "cuda"', "raise OSError('driver')")),
        "OSError: driver",
    ),
    "op_registry_oot": (
        lambda p, m: m.delattr(p.vllm("model_executor.custom_op"), "op_registry_oot"),
        "ImportError: cannot import name 'op_registry_oot'",
    ),
    "the layer module": (lambda p, m: m.setitem(sys.modules, "vllm_gdn_plugin.run.layer", None), "ModuleNotFoundError"),
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
            assert type(stock("layers.0")) is stock
    ((level, message),) = plugin.said
    assert level == ("error" if strict else "warning")
    assert told.rstrip("|") in message or told.endswith("|")
    assert f"vllm-gdn-plugin {vllm_gdn_plugin.__version__}: " in message
    assert "unexpected " in message


OUR_CALLS = [
    ast.unparse(node.func)
    for function in (install.register, install.install)
    for node in ast.walk(ast.parse(inspect.getsource(function)))
    if isinstance(node, ast.Call)
]
NO_STEPS = {"getattr", "tuple", "partial", "say", "Refused", "stepping_aside"}
NO_STEPS |= {"read_settings", "multiprocessing.parent_process", "refusal"}
STEPS = sorted({*OUR_CALLS} - NO_STEPS)


@pytest.mark.parametrize("strict", [False, True], ids=["", "strict"])
@pytest.mark.parametrize("imported", ["imported before", "imported after"])
@pytest.mark.parametrize("step", STEPS)
def test_nothing_is_half_installed(
    plugin: Any, step: str, imported: str, strict: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    room, _, name = step.rpartition(".")
    owner = getattr(plugin.install, room) if room else plugin.install
    if not hasattr(owner, name):
        owner = importlib.import_module("vllm_gdn_plugin.run.layer")

    def state() -> tuple[list[Any], dict[str, Any], list[str]]:
        watches = importlib.import_module("vllm_gdn_plugin.host.imports")._ImportWatch
        refusing = [f for f in sys.meta_path if strict and isinstance(f, watches)]  # the next import, too
        finders = [f for f in sys.meta_path if f not in refusing]
        return finders, dict(plugin.registry), plugin.replaced

    monkeypatch.setattr(owner, name, boom)
    monkeypatch.setenv(STRICT, str(int(strict)))
    if imported == "imported before":
        plugin.import_gdn()
    before = state()
    with pytest.raises(plugin.install.Refused) if strict else nullcontext():
        plugin.register()
        plugin.import_gdn()
    assert state() == before
    if not strict:
        stock = plugin.import_gdn()
        assert type(stock("layers.0")) is stock
        assert levels(plugin) == ["warning"]


@pytest.mark.parametrize("step", ["facts.layer_facts", "ledger.construct", "layers.after_loading", "layers.hold_first"])
def test_a_layer_that_cannot_be_set_up_is_stock_s(plugin: Any, step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else its graph, which is stock, would be stored under the key of one that is not."""
    room, name = step.split(".")
    monkeypatch.setattr(getattr(plugin.install, room), name, boom)
    plugin.register()
    stock = plugin.import_gdn()
    layers = [stock(f"layers.{i}") for i in range(2)]
    assert [type(layer) for layer in layers] == [stock, stock]
    ((level, message),) = plugin.said
    assert (level, "ZeroDivisionError: boom" in message) == ("warning", True)
    assert key(plugin) == "stock"


def test_what_was_done_is_said_once_when_the_weights_are_there(plugin: Any) -> None:
    plugin.register()
    layers = [plugin.import_gdn()(f"layers.{i}") for i in range(3)]
    assert [layer.gdn.strategy for layer in layers] == ["dual_stream"] * 3
    plugin.load(*layers[:2])
    assert plugin.said == [], "until then a loader can still change a layer"
    plugin.load(layers[2])
    ((level, message),) = plugin.said
    assert level == "info"
    for part in ("dual_stream on 3 of 3 GDN layers", "platform cuda", "vLLM 0.32.0"):
        assert part in message
    assert key(plugin).startswith("dual_stream ")
    plugin.load(*layers)
    assert len(plugin.said) == 1, "a reload changes nothing"
    plugin.load(plugin.import_gdn()("layers.0"))
    assert "dual_stream on 1 of 1 GDN layers" in plugin.said[1][1], "and a second engine has a line of its own"


def test_a_layer_that_cannot_be_finished_runs_as_in_stock_vllm(plugin: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plugin.register()
    layers = [plugin.import_gdn()(f"layers.{i}") for i in range(2)]
    with monkeypatch.context() as patch:
        patch.setattr(plugin.install.facts, "projection_facts", boom)
        plugin.load(layers[0])
    plugin.load(layers[1])
    assert [layer.gdn.strategy for layer in layers] == ["serial", "dual_stream"]
    (level, why), (_, done) = plugin.said
    assert (level, "ZeroDivisionError: boom" in why) == ("warning", True)
    assert "dual_stream on 1 of 2 GDN layers" in done


SIZES = 'Config(name="FULL"), cudagraph_capture_sizes=[4, 1, 2]'


@pytest.mark.parametrize(
    ("variables", "sizes"),
    [({}, (1, 2, 4)), ({"TUNE": "0"}, ()), ({"STRATEGY": "dual_stream"}, ())],
    ids=str,
)
def test_auto_chooses_by_time_and_what_is_asked_for_by_name_does_not(
    plugin: Any, variables: dict[str, str], sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def ways_of(layers: Any, ready: Any, facts: Any, sizes: Any) -> Any:
        asked.append((layers, ready, facts.qkvz.output_size, sizes))
        return {2: "serial"}, "words"

    plugin.tree.edit("vllm.config.vllm", ('Config(name="FULL")', SIZES))
    for name, text in variables.items():
        monkeypatch.setenv(f"VLLM_GDN_PLUGIN_{name}", text)
    plugin.register()
    stock = plugin.import_gdn()
    monkeypatch.setattr(importlib.import_module("vllm_gdn_plugin.run.engine"), "ways_of", ways_of)
    layers = [stock(f"layers.{i}") for i in range(3)]
    plugin.load(*layers)
    assert asked == [(layers, layers[:2], 6, sizes)], "the projections of the last layer are not yet processed"
    assert all(layer.gdn.ways == {2: "serial"} for layer in layers)
    assert "in CUDA graphs words" in plugin.said[0][1]
    plugin.load(*layers)
    assert len(asked) == 1, "a reload times nothing"


def test_layers_of_two_kinds_are_timed_apart(plugin: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    plugin.register()
    stock = plugin.import_gdn()
    monkeypatch.setattr(
        importlib.import_module("vllm_gdn_plugin.run.engine"),
        "ways_of",
        lambda layers, *rest: (asked.append(layers) or {}, ""),
    )
    layers = [stock(f"layers.{i}") for i in range(3)]
    layers[1].in_proj_qkvz.output_size_per_partition = 12
    layers[2].in_proj_ba.bias = object()
    plugin.load(*layers)
    assert asked == [layers[:1], layers[1:2]]
    assert layers[2].gdn.strategy == "serial"


@pytest.mark.parametrize("strategy", ["auto", "dual_stream"])
def test_where_timing_fails_the_plan_stands_and_a_line_says_how_to_start_without(
    plugin: Any, strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_GDN_PLUGIN_STRATEGY", strategy)
    plugin.tree.edit("vllm.config.vllm", ('Config(name="FULL")', SIZES))
    plugin.register()
    stock = plugin.import_gdn()
    layers = [stock(f"layers.{i}") for i in range(3)]
    monkeypatch.setattr(importlib.import_module("vllm_gdn_plugin.run.timing"), "settled", boom)
    plugin.load(*layers)
    assert [(layer.gdn.strategy, layer.gdn.ways) for layer in layers] == [("dual_stream", {})] * 3
    *failed, (_, done) = plugin.said
    assert "dual_stream on 3 of 3 GDN layers" in done
    assert len(failed) == (strategy == "auto")
    assert all("VLLM_GDN_PLUGIN_TUNE=0 starts without timing: unexpected ZeroDivision" in text for _, text in failed)


@pytest.fixture
def fusible(plugin: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The installed plugin, where the projections have weights, and 448 rows are the faster ones at 1, 2 and 4 tokens;
    ``FusedWeight`` is a double that notes its arguments, and ``emptied`` grows with PyTorch's cache emptied."""
    weight = "class Weight:\n    device, shape, data = 'cuda:0', (32, 8), 'data'"
    plugin.tree.edit(
        "vllm.model_executor.layers.linear",
        ("class Merged", f"{weight}\n\n\nclass Merged"),
        ("        self.quant_method", "        self.weight = Weight()\n        self.quant_method"),
    )
    plugin.tree.edit("vllm.config.vllm", ('Config(name="FULL")', SIZES))
    plugin.register()
    plugin.import_gdn()
    engine = importlib.import_module("vllm_gdn_plugin.run.engine")
    fused = lambda qkvz, ba, rows: SimpleNamespace(both=(qkvz, ba), rows=rows, take_back=lambda layer: True)  # noqa: E731
    monkeypatch.setattr(engine, "FusedWeight", fused)
    plugin.emptied = []
    monkeypatch.setattr(engine.torch.cuda, "empty_cache", lambda: plugin.emptied.append(1), raising=False)
    monkeypatch.setattr(engine, "ways_of", lambda *arguments: ({}, ""))
    monkeypatch.setattr(engine, "rows_of", lambda like, outputs, sizes: 448 if sizes == (1, 2, 4) else outputs)
    return plugin


@pytest.mark.parametrize(("variables", "rows"), [({}, 448), ({"TUNE": "0"}, 64), ({"STRATEGY": "fused"}, 64)], ids=str)
def test_a_fused_layer_has_as_many_rows_as_auto_finds_best(
    fusible: Any, variables: dict[str, str], rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in variables.items():
        monkeypatch.setenv(f"VLLM_GDN_PLUGIN_{name}", text)
    fusible.register()
    layer = fusible.import_gdn()("layers.0")
    assert (layer.gdn.strategy, layer.gdn.fused.rows) == ("fused", rows)
    assert layer.gdn.fused.both == (layer.in_proj_qkvz, layer.in_proj_ba)
    assert fusible.emptied == [1], "what the two weights leave is for no other weight"
    with_rows, other = Ledger(), Ledger()
    for ledger, count in ((with_rows, rows), (other, rows + 1)):
        record = ledger.construct(layer)
        record.strategy, record.rows = "fused", count
    assert key(fusible) == with_rows.state() != other.state(), "a graph of another width would not run"
    assert fusible.said == []


@pytest.mark.parametrize("group", ["TP", "PCP"])
def test_ranks_that_share_a_layer_do_not_time_its_rows(fusible: Any, group: str) -> None:
    """They might choose differently, and what is compiled has to be alike."""
    setattr(fusible.vllm("distributed.parallel_state"), group, SimpleNamespace(world_size=2, is_first_rank=True))
    assert fusible.import_gdn()("layers.0").gdn.fused.rows == 64


@pytest.mark.parametrize("method", ["UnquantizedLinearMethod", "Fp8LinearMethod"])
def test_a_fused_layer_whose_weight_a_loader_replaced_is_planned_anew(fusible: Any, method: str) -> None:
    stock = fusible.import_gdn()
    layers = [stock(f"layers.{i}") for i in range(2)]
    layers[0].gdn.fused.take_back = lambda layer: False
    layers[0].in_proj_ba.quant_method = type(method, (), {})()
    fusible.load(*layers)
    instead = "dual_stream" if method == "UnquantizedLinearMethod" else "serial"
    assert [layer.gdn.strategy for layer in layers] == [instead, "fused"]
    (level, why), (_, done) = fusible.said
    assert level == "warning"
    assert ("cannot be one storage" if instead == "dual_stream" else "one GEMM cannot serve") in why
    assert ("dual_stream on 1 of 2" in done) == (instead == "dual_stream")
    assert "fused on 1 of 2 GDN layers" in done


class Layer:
    def __init__(self, prefix: str) -> None:
        self.prefix = prefix


def told(ledger: Ledger) -> list[str]:
    return [record.strategy for record in ledger.news()]


@pytest.mark.parametrize(("names", "collected"), [("abcd", False), ("abcd", True), ("wxyz", True)])
def test_an_engine_that_failed_to_load_does_not_silence_the_next(names: str, collected: bool) -> None:
    """In one process: the layers were waiting for their weights, and the next model has fewer of them, or others."""
    ledger, alone = Ledger(), Ledger()
    failed = [Layer(name) for name in names]
    for layer in failed:
        ledger.construct(layer).loading = True
    if collected:
        del failed, layer
    layers = [Layer("a"), Layer("b")]
    for one in (ledger, alone):
        for layer, strategy in zip(layers, ("serial", "fused"), strict=True):
            one.construct(layer).strategy = strategy
        assert not one.loading
        assert [told(one), told(one)] == [["serial", "fused"], []]
    assert ledger.state() == alone.state()


def test_the_compile_key_tells_which_layer_runs_with_what() -> None:
    def state(**plans: tuple[str, int]) -> str:
        ledger, layers = Ledger(), [Layer(name) for name in plans]
        for layer in layers:
            record = ledger.construct(layer)
            record.strategy, record.rows = plans[layer.prefix]
        return ledger.state()

    fused, wider, dual_stream, serial = ("fused", 64), ("fused", 448), ("dual_stream", 0), ("serial", 0)
    pairs = [
        (fused, fused),
        (fused, wider),
        (fused, serial),
        (serial, fused),
        (fused, dual_stream),
        (dual_stream, fused),
    ]
    assert len({state(a=a, b=b) for a, b in pairs} | {state()}) == len(pairs) + 1
    assert state(a=serial) == state() == "stock"
    assert state(a=fused, b=wider) == state(b=wider, a=fused)


@pytest.mark.parametrize("strict", [False, True], ids=["", "strict"])
def test_a_rule_that_a_layer_breaks_is_said_once(plugin: Any, strict: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    plugin.tree.edit("vllm.config.vllm", ("lora_config=None", "lora_config=1"))
    monkeypatch.setenv(STRICT, str(int(strict)))
    plugin.register()
    stock = plugin.import_gdn()
    if strict:
        with pytest.raises(plugin.install.Refused, match="LoRA is enabled"):
            stock("layers.0")
    else:
        assert [type(stock(f"layers.{i}")) for i in range(2)] == [stock, stock]
    ((level, message),) = plugin.said
    assert level == ("error" if strict else "warning")
    assert "LoRA is enabled" in message


def test_settings_that_cannot_be_read_are_named_once_and_the_rest_goes_on(
    plugin: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_GDN_PLUGIN_STRATEGY", "fastest")
    monkeypatch.setenv("VLLM_GDN_PLUGIN_TUNE", "-1")
    plugin.register()
    plugin.register()
    assert levels(plugin) == ["warning", "warning"]
    assert all(name in text for name, (_, text) in zip(("STRATEGY", "TUNE"), plugin.said, strict=True))
    assert plugin.import_gdn()("layers.0").is_gdn_plugin


ANY_VALUE = st.binary().map(lambda octets: os.fsdecode(octets.replace(b"\0", b""))) | st.sampled_from(["1", "serial"])


@given(st.dictionaries(st.sampled_from([*map(variable, vars(Settings())), "VLLM_GDN_PLUGIN_OTHER"]), ANY_VALUE))
@hypothesis_settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=40)
def test_no_value_of_a_variable_raises_or_is_warned_of_twice(plugin: Any, environ: dict[str, str]) -> None:
    importlib.import_module("vllm_gdn_plugin.report")._said.clear()
    plugin.said.clear()
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
    "fails": lambda plugin, patch: patch.setattr(plugin.install, "check_contract", boom_differently),
    "fails for each layer": lambda plugin, patch: patch.setattr(plugin.install.facts, "layer_facts", boom_differently),
}


def boom_differently(*args: Any) -> Any:
    raise ZeroDivisionError(f"boom {time.time_ns()}".ljust(10_000, "!"))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts the open files in /proc, which is Linux")
@pytest.mark.parametrize("case", GROWS.values(), ids=GROWS)
def test_memory_and_handles_do_not_grow(plugin: Any, case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    case(plugin, monkeypatch)

    def rounds(count: int) -> tuple[int, int, int]:
        for _ in range(count):
            plugin.register()
            for layer in [stock(f"layers.{i}") for i in range(3)]:
                if hasattr(layer, "gdn_after_loading"):
                    plugin.load(layer)
            del layer
            plugin.said[:] = plugin.said[:1]
        gc.collect()
        return len(os.listdir("/proc/self/fd")), len(gc.get_objects()), tracemalloc.get_traced_memory()[0]

    stock = plugin.import_gdn()
    tracemalloc.start()
    seen = [rounds(count) for count in (4, 10, 10)]
    tracemalloc.stop()
    # What we keep is kept in both; Python's table of interned strings, of megabytes, grows once in a while.
    files, objects, octets = (min(two - one, three - two) for one, two, three in zip(*seen, strict=True))
    assert files <= 0
    assert objects < 10, "less than one in a round"
    assert octets < 10 * 5000, "what Python itself caches is less; a message kept in each round would be 10000"


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
    assert type(stock("layers.0")) is stock
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
    layer = plugin.import_gdn()("layers.0")
    if not refused:
        plugin.load(layer)
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
    assert type(stock("layers.0")) is stock
    said = plugin.said + [(record.levelname.lower(), record.getMessage()) for record in caplog.records]
    ((level, message),) = said
    assert level == "warning"
    assert (name if version == "0.32.0" else f"vLLM {version}") in message


def test_every_setting_and_the_plugin_itself_are_part_of_the_compile_cache_key(
    plugin: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def factors(**settings: str) -> dict[str, Any]:
        for name in vars(Settings()):
            monkeypatch.delenv(variable(name), raising=False)
        for name, text in settings.items():
            monkeypatch.setenv(variable(name), text)
        plugin.register()
        found: dict[str, Any] = plugin.vllm("envs").compile_factors()
        return found

    bare = factors()
    assert set(bare) == {"VLLM_OWN", "VLLM_GDN_PLUGIN", *map(variable, vars(Settings()))}
    assert bare["VLLM_GDN_PLUGIN"] == f"{vllm_gdn_plugin.__version__} stock"
    others = {"strategy": "dual_stream", "decode_kernel": "1", "tune": "0", "allow_untested": "1", "strict": "1"}
    assert others.keys() == vars(Settings()).keys()
    for name, text in others.items():
        assert [n for n, value in factors(**{name: text}).items() if value != bare[n]] == [variable(name)]
