"""Which class vLLM makes a GDN layer of, beside other plugins and in every engine, and what becomes of it when loaded.

The host is the stand-in of conftest.py, in which the plugin's own layer class is the real one.
"""

from __future__ import annotations

import copy
import gc
import importlib
import importlib.util
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_gdn_plugin.decide.contract import GDN_CLASSES
from vllm_gdn_plugin.settings import Settings

GDN, _ = GDN_CLASSES
CLASS = GDN_CLASSES[GDN]
HIDDEN = SimpleNamespace(size=lambda i: 4, dtype="bfloat16", device="cuda:0", shape=(4, 8))


@pytest.fixture
def stock(plugin: Any) -> Any:
    """vLLM's class, with the plugin installed."""
    plugin.register()
    return plugin.import_gdn()


def is_ours(layer: Any) -> bool:
    return getattr(type(layer), "is_gdn_plugin", False)


def config(plugin: Any) -> Any:
    return plugin.vllm("config.vllm").config


def test_our_class_goes_by_the_name_of_stock(stock: Any) -> None:
    """vllm-mach looks for the layer by ``type(layer).__name__``."""
    ours = type(stock("layers.0"))
    assert ours.__bases__ == (stock,)
    assert (ours.__name__, ours.__qualname__) == (CLASS, CLASS)


# Other plugins.


def register_theirs(plugin: Any) -> Any:
    """What LightDelta and vllm-suffix-hybrid do: import the layer's module, derive a class and register it."""
    stock = plugin.import_gdn()

    class Theirs(stock):  # type: ignore[misc]
        pass

    plugin.vllm("model_executor.custom_op").PluggableLayer.register_oot(CLASS)(Theirs)
    return Theirs


def test_who_holds_the_name_can_be_asked(plugin: Any) -> None:
    plugin.register()
    layers = importlib.import_module("vllm_gdn_plugin.host.layers")
    assert layers.holder_of([CLASS]) == ""
    theirs = register_theirs(plugin)
    assert layers.holder_of(["Other", CLASS]) == f"{theirs.__module__}.{theirs.__qualname__}"


@pytest.mark.parametrize("ours_first", [True, False])
@pytest.mark.parametrize("strict", [False, True], ids=["", "strict"])
def test_a_plugin_that_registers_its_class_keeps_the_name(
    plugin: Any, ours_first: bool, strict: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_GDN_PLUGIN_STRICT", str(int(strict)))
    if ours_first:
        plugin.register()
    theirs = register_theirs(plugin)
    if not ours_first:
        plugin.register()
    stock = plugin.import_gdn()
    assert plugin.said == [], "until a layer is built nobody knows who will hold the name"
    if strict:
        with pytest.raises(RuntimeError, match="of another plugin replaces"):
            stock("layers.0")
    else:
        assert [type(stock(f"layers.{i}")) for i in range(2)] == [theirs, theirs]
    assert plugin.registry == {CLASS: theirs}
    ((level, message),) = plugin.said
    assert level == ("error" if strict else "warning")
    assert f"{theirs.__module__}.{theirs.__qualname__} of another plugin" in message
    assert "leave the other one out of VLLM_PLUGINS" in message

    plugin.registry.clear()
    assert is_ours(stock("layers.0")), "each construction decides for itself"


def test_a_subclass_of_somebody_else_is_left_alone(stock: Any) -> None:
    derived = type(CLASS, (stock,), {})
    assert type(derived("layers.0")) is derived


def test_a_class_that_got_a_new_of_its_own_is_left_alone(plugin: Any) -> None:
    stock = plugin.import_gdn()
    stock.__new__ = new = lambda cls, *args: object.__new__(cls)
    plugin.register()
    assert type(stock("layers.0")) is stock
    assert stock.__new__ is new
    ((level, message),) = plugin.said
    assert (level, "has a __new__ of its own" in message) == ("warning", True)


class Watch(MetaPathFinder):
    """Another plugin's import hook, which calls ``seen`` once the layer's module has been executed."""

    def __init__(self, ask: Callable[[Watch, str, Any], Any]) -> None:
        self.ask, self.busy, self.seen = ask, False, 0

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != GDN or self.busy:
            return None
        spec = self.ask(self, name, path)
        run = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            run(module)
            self.seen += 1

        spec.loader.exec_module = exec_module
        return spec


def ask_guarded(watch: Watch, name: str, path: Any) -> Any:
    watch.busy = True
    try:
        return importlib.util.find_spec(name)
    finally:
        watch.busy = False


def ask_unguarded(watch: Watch, name: str, path: Any) -> Any:
    """The others may ask this one in turn."""
    found = (other.find_spec(name, path) for other in sys.meta_path if other is not watch)
    return next(spec for spec in found if spec is not None)


@pytest.mark.parametrize("ours_first", [True, False])
@pytest.mark.parametrize("ask", [ask_guarded, ask_unguarded])
def test_import_hooks_of_two_plugins_both_act(plugin: Any, ask: Any, ours_first: bool) -> None:
    watch = Watch(ask)
    if ours_first:
        plugin.register()  # whoever comes last is asked first
    sys.meta_path.insert(0, watch)
    if not ours_first:
        plugin.register()
    layer = plugin.import_gdn()("layers.0")
    assert watch.seen == 1
    assert is_ours(layer)
    assert plugin.said == []


def test_a_watch_that_has_ended_finds_nothing(plugin: Any) -> None:
    """Also for somebody who has kept it."""
    plugin.register()
    ended = sys.meta_path[0]
    assert ended.find_spec(GDN, plugin.vllm("model_executor.layers.mamba.gdn").__path__) is not None
    plugin.register()
    assert ended not in sys.meta_path
    assert ended.find_spec(GDN, None) is None


def test_a_second_installation_takes_the_place_of_the_first(
    plugin: Any, stock: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plugin.install.install(Settings(), sys.modules[GDN])
    assert type(stock("layers.0")).__bases__ == (stock,)
    assert plugin.said == []
    monkeypatch.setenv("VLLM_GDN_PLUGIN_STRATEGY", "serial")
    monkeypatch.setenv("VLLM_GDN_PLUGIN_DECODE_KERNEL", "0")
    plugin.register()
    assert type(stock("layers.0")) is stock
    assert "__new__" not in vars(stock)
    assert "serial was asked for" in plugin.said[-1][1]


# Copies.


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy])
def test_a_copy_is_of_its_original_s_class(plugin: Any, stock: Any, how: Any) -> None:
    ours = stock("layers.0")
    assert type(how(ours)) is type(ours)
    config(plugin).lora_config = object()
    assert type(how(stock("layers.1"))) is stock


def test_a_deep_copy_has_weights_of_its_own_and_is_stock_s_in_all_it_does(plugin: Any, stock: Any) -> None:
    original = stock("layers.0")
    copied = copy.deepcopy(original)
    assert copied.gdn.strategy == "serial"
    plugin.load(copied)
    assert plugin.said == [], "the original's weights are still to come"
    assert copied.forward_cuda(HIDDEN)[0] == "stock"
    del original
    gc.collect()
    plugin.load(copied)  # a draft model that outlives the target whose layer it copied


# Engines with different configurations, one after the other in this process.


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("lora_config", object()),
        ("offload_config.uva.cpu_offload_gb", 1),
        ("model_config.dtype", "torch.float16"),
        ("parallel_config.use_ubatching", True),
    ],
)
def test_where_nothing_of_ours_will_run_a_layer_is_of_stock_s_class(
    plugin: Any, stock: Any, path: str, value: object
) -> None:
    first = stock("layers.0")
    *way, last = path.split(".")
    target = config(plugin)
    for name in way:
        target = getattr(target, name)
    usual = getattr(target, last)
    setattr(target, last, value)
    layer = stock("layers.0")
    assert type(layer) is stock
    assert layer._forward_method.__func__ is stock.forward_cuda
    assert layer.forward(HIDDEN)[0] == "stock"
    assert not hasattr(layer, "gdn_after_loading")

    setattr(target, last, usual)
    assert is_ours(stock("layers.0"))
    assert is_ours(first)


def test_a_reload_in_an_engine_touches_no_other_engine(plugin: Any, stock: Any) -> None:
    first = [stock(f"layers.{i}") for i in range(2)]
    plugin.load(*first)
    second = stock("layers.0")
    plugin.load(second)
    key = plugin.vllm("envs").compile_factors()["VLLM_GDN_PLUGIN"]
    del plugin.said[:]
    first[0].in_proj_qkvz.bias = object()
    plugin.load(*first)
    assert [layer.gdn.strategy for layer in (*first, second)] == ["serial", "dual_stream", "dual_stream"]
    assert plugin.vllm("envs").compile_factors()["VLLM_GDN_PLUGIN"] == key
    ((level, message),) = plugin.said
    assert (level, "a projection has a bias" in message) == ("warning", True)


# What becomes of a layer when its weights are there.


class HomemadeMethod:
    pass


def test_a_linear_method_that_was_swapped_meanwhile_counts(plugin: Any, stock: Any) -> None:
    """Qwen4-Exp gives the projections vLLM's low-latency GEMMs once they are constructed."""
    layers = [stock(f"layers.{i}") for i in range(2)]
    layers[0].in_proj_qkvz.quant_method = HomemadeMethod()
    plugin.load(*layers)
    assert [layer.gdn.strategy for layer in layers] == ["serial", "dual_stream"]
    assert layers[0].forward(HIDDEN)[0] == "stock"
    (_, why), (_, what) = plugin.said
    assert "HomemadeMethod and UnquantizedLinearMethod are not known to be safe" in why
    assert "dual_stream on 1 of 2 GDN layers" in what


@pytest.mark.parametrize(
    ("platform", "batch_invariant", "plain"), [("cuda", False, True), ("cuda", True, False), ("cpu", False, False)]
)
def test_where_the_narrow_gemm_is_the_one_of_torch(
    plugin: Any, platform: str, batch_invariant: bool, plain: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_GDN_PLUGIN_STRATEGY", "dual_stream")
    plugin.tree.platform(platform)
    plugin.vllm("envs").VLLM_BATCH_INVARIANT = batch_invariant
    plugin.register()
    layer = plugin.import_gdn()("layers.0")
    plugin.load(layer)
    assert (layer.gdn.strategy, layer.gdn.plain_gemm) == ("dual_stream", plain)


@pytest.mark.parametrize(
    ("ways", "tokens", "breakable", "overlaps"),
    [
        ({}, 1024, False, True),
        ({}, 1025, False, False),
        ({}, 8, True, False),
        ({8: "serial", 16: "dual_stream"}, 8, False, False),
        ({8: "serial", 16: "dual_stream"}, 9, False, True),
    ],
)
def test_a_captured_call_overlaps_unless_it_is_large_or_timed_slower_or_its_capture_can_break(
    plugin: Any, stock: Any, ways: dict[int, str], tokens: int, breakable: bool, overlaps: bool
) -> None:
    """Asked at each call: an engine has breakable captures and whole ones."""
    layer = stock("layers.0")
    layer.gdn.ways = ways
    capture = SimpleNamespace(is_active=lambda: breakable)
    sys.modules["vllm.compilation.breakable_cudagraph"] = SimpleNamespace(BreakableCUDAGraphCapture=capture)  # type: ignore[assignment]
    dual_stream = importlib.import_module("vllm_gdn_plugin.run.dual_stream")
    dual_stream.is_captured = lambda hidden_states: True
    dual_stream._thread.is_prepared = True
    hidden_states = SimpleNamespace(size=lambda i: tokens, data_ptr=lambda: 7)
    assert (dual_stream.fork(lambda: layer, hidden_states) is not None) == overlaps
    assert plugin.said == []


def test_a_kernel_that_was_asked_for_alone_and_may_not_run_is_said(
    plugin: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_GDN_PLUGIN_STRATEGY", "serial")
    monkeypatch.setenv("VLLM_GDN_PLUGIN_DECODE_KERNEL", "1")
    plugin.register()
    assert type(plugin.import_gdn()("layers.0")) is plugin.import_gdn()
    ((_, line),) = plugin.said
    assert "no decode kernel: " in line


def test_a_reload_never_stops_a_strict_engine(plugin: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It stops one that starts."""
    monkeypatch.setenv("VLLM_GDN_PLUGIN_STRICT", "1")
    plugin.register()
    layer, starting = plugin.import_gdn()("layers.0"), plugin.import_gdn()("layers.1")
    plugin.load(layer)
    for each in (layer, starting):
        each.in_proj_qkvz.quant_method = type("Unknown", (), {})()
    with pytest.raises(RuntimeError, match="not known to be safe"):
        plugin.load(starting)
    ledger = importlib.import_module("vllm_gdn_plugin.report").ledger
    ledger.news()  # all that is told once an engine has started
    plugin.load(layer)
    assert layer.gdn.strategy == "serial"


def test_new_weights_that_do_not_fit_are_told_as_what_they_are(plugin: Any) -> None:
    """Compiled code goes on with the old ones: that is not vLLM as it is."""
    plugin.register()
    layer = plugin.import_gdn()("layers.0")
    plugin.load(layer)
    importlib.import_module("vllm_gdn_plugin.report").ledger.records["layers.0"].strategy = "fused"
    layer.gdn.fused = SimpleNamespace(take_back=lambda layer: False)
    plugin.load(layer)
    level, line = plugin.said[-1]
    assert (level, "compiled code goes on with the old ones: restart" in line) == ("warning", True)


@pytest.mark.parametrize(("right", "ranks"), [(True, 1), (True, 2), (False, 1)])
def test_a_kernel_that_is_merely_slower_stops_no_strict_engine(
    plugin: Any, monkeypatch: pytest.MonkeyPatch, right: bool, ranks: int
) -> None:
    """Where several ranks share a layer it is on in each, and runs at no size: another might find it faster."""
    plugin.tree.edit("vllm.distributed.parallel_state", ("TP = Group(0, 1)", f"TP = Group(0, {ranks})"))
    monkeypatch.setenv("VLLM_GDN_PLUGIN_STRICT", "1")
    decode = importlib.import_module("vllm_gdn_plugin.decide.decode")
    install = importlib.import_module("vllm_gdn_plugin.install")
    monkeypatch.setattr(install, "why_no_decode_kernel", lambda package: None)
    monkeypatch.setattr(install.facts, "decode_facts", lambda layer, facts: decode.DecodeFacts("cuda"))
    monkeypatch.setattr(
        install,
        "plan",
        lambda facts, request: importlib.import_module("vllm_gdn_plugin.decide.plan").Plan(
            "serial", "both are quantised"
        ),
    )
    plugin.register()
    layer = plugin.import_gdn()("layers.0")
    engine = importlib.import_module("vllm_gdn_plugin.run.engine")
    monkeypatch.setattr(engine, "_why_wrong", lambda stock, layer: None if right else "it is wrong")
    monkeypatch.setattr(engine, "decode_ways_of", lambda *args: ({1: "stock"}, "stock at 1 token"))
    if right:
        plugin.load(layer)
        ((level, line),) = plugin.said
        assert level == "info"
        assert (engine.SLOWER in line, "stock at 1 token" in line) == (ranks == 1, ranks == 2)
    else:
        with pytest.raises(RuntimeError, match="no decode kernel: it is wrong"):
            plugin.load(layer)
