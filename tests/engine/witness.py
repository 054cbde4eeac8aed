"""A vLLM plugin of the tests: it writes down what happens in each process, and breaks a step where it is told to.

Made an installed distribution by the fixture `witness`. vLLM loads it before the plugin under test, in each process.

    WITNESS_FILE    where each event is appended as a line of JSON
    WITNESS_BREAKS  the step of vllm_gdn_plugin that fails: a key of `BREAKS`; or of `CHANGES`, to have it do otherwise
"""

import functools
import importlib
import importlib.abc
import itertools
import json
import multiprocessing
import os
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

GDN_MODULE = "qwen_gdn_linear_attn"
calls: dict[str, int] = {}
"""Projections that the plugin has run in this process, by strategy; of compiled code, in which no Python runs, how
often it was traced where the projection is no op."""


def register() -> None:
    if any(isinstance(finder, _Watch) for finder in sys.meta_path):
        return
    note("plugins loaded")
    sys.meta_path.insert(0, _Watch())
    try:
        from vllm_gdn_plugin import install
    except ImportError:
        return
    _note_settings(install)
    _count_joins()
    _count_fused()
    broken = os.environ.get("WITNESS_BREAKS")
    if broken:
        (BREAKS | CHANGES)[broken]()


def note(event: str, **more: Any) -> None:
    with open(os.environ["WITNESS_FILE"], "a") as file:
        file.write(json.dumps({"event": event, "process": process_name(), "pid": os.getpid()} | more) + "\n")


def process_name() -> str:
    """`main`, `inspection` (of the model class), `ray`, or the name vLLM gave its child without the number."""
    if multiprocessing.parent_process() is not None:
        return multiprocessing.current_process().name.split("_")[0].rstrip("0123456789-")
    command = " ".join(sys.orig_argv)
    if "ray/_private/workers/default_worker.py" in command:
        return "ray"
    return "inspection" if "vllm.model_executor.models.registry" in command else "main"


class _Watch(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.endswith(GDN_MODULE):
            note("GDN module imported")


def _note_settings(install: Any) -> None:
    read_settings = install.read_settings

    def noting() -> Any:
        settings, problems = read_settings()
        note("settings read", settings=asdict(settings))
        return settings, problems

    install.read_settings = noting


def _count(strategy: str) -> None:
    if strategy not in calls:
        note(f"{strategy} ran")
    calls[strategy] = calls.get(strategy, 0) + 1
    with open(_calls_file(), "a") as file:
        file.write(f"{strategy}\n")


def _count_joins() -> None:
    """By the look-up of the layer, which a join does on a CPU; before the module of the ops takes the function over."""
    from vllm_gdn_plugin.host import layers

    layer_by_name = layers.layer_by_name

    def counting(layer_name: Any) -> Any:
        layer = layer_by_name(layer_name)
        if os.environ.get("WITNESS_BREAKS") == "projection":
            layer.in_proj_ba.forward = _run_out
        _count(layer.gdn.strategy)
        return layer

    layers.layer_by_name = counting


def _count_fused() -> None:
    import torch

    from vllm_gdn_plugin.run.fused import FusedWeight

    project = FusedWeight.project

    @torch._dynamo.assume_constant_result  # it runs while it is traced, and leaves nothing in the graph
    def count() -> int:
        _count("fused")
        return 0

    def counting(self: Any, hidden_states: Any) -> Any:
        count()
        return project(self, hidden_states)

    FusedWeight.project = counting


def calls_of_all_processes() -> dict[str, int]:
    """`calls`, added up: vLLM 0.21 and 0.22 run the model in a process of its own, whatever they are told."""
    try:
        return dict(Counter(Path(_calls_file()).read_text().split()))
    except FileNotFoundError:
        return {}


def _calls_file() -> str:
    return os.environ["WITNESS_FILE"] + ".calls"


def _fail(*args: Any, **kwargs: Any) -> Any:
    raise ZeroDivisionError("planted by the test")


def _run_out(*args: Any) -> Any:
    import torch

    raise torch.OutOfMemoryError("planted by the test")


def _break(module: str, path: str, call: int = 0) -> Any:
    """Let what lies at `path` in a module of the plugin fail from this call on; the first is call 0."""

    def apply() -> None:
        *owners, name = path.split(".")
        owner = functools.reduce(getattr, owners, importlib.import_module(f"vllm_gdn_plugin.{module}"))
        original = getattr(owner, name)
        count = itertools.count()
        setattr(owner, name, lambda *a, **k: original(*a, **k) if next(count) < call else _fail())

    return apply


def _break_layer_module() -> None:
    sys.modules["vllm_gdn_plugin.run.layer"] = None  # type: ignore[assignment]


def _break_contract() -> None:
    from vllm_gdn_plugin import install
    from vllm_gdn_plugin.decide.contract import Contract

    install.check_contract = lambda package: Contract(None, None, ("planted breach",))


def _find_a_newer_vllm() -> None:
    from vllm_gdn_plugin.host import imports

    imports.version = lambda: "0.99.0"


BREAKS = {
    "contract": _break_contract,
    "version guard": _find_a_newer_vllm,
    "layer module": _break_layer_module,
    "version": _break("host.imports", "version"),
    "package_directory": _break("host.imports", "package_directory"),
    "declare_variables": _break("host.process", "declare_variables"),
    "when_imported": _break("host.imports", "when_imported"),
    "platform": _break("host.facts", "platform"),
    "build_in_place_of": _break("host.layers", "build_in_place_of"),
    "layer_facts": _break("host.facts", "layer_facts"),
    "after_loading": _break("host.layers", "after_loading"),
    "plan": _break("install", "plan"),
    "plan, once loaded": _break("install", "plan", 3),
    "fused weight": _break("run.fused", "FusedWeight.__init__"),
    "fused take_back": _break("run.fused", "FusedWeight.take_back"),
    "report": _break("install", "summarised"),
    "projection": lambda: None,  # see _count_joins
}
"""With a step for each layer, all three of a tiny model's are constructed before the first one is loaded."""


def _negate_ba() -> None:
    from vllm_gdn_plugin.run.layer import ProjectedLayer

    right = ProjectedLayer.in_proj_ba

    def wrong(self: Any, hidden_states: Any) -> Any:
        ba, _ = right(self, hidden_states)
        return -ba, None

    ProjectedLayer.in_proj_ba = wrong


def _swap_linear_methods() -> None:
    """As vLLM's enable_qwen4_exp_low_latency_gemm does, after the layers have been constructed."""
    from vllm_gdn_plugin import install

    adopt = install.adopt

    def adopt_and_swap(*args: Any) -> None:
        from vllm.model_executor.layers.linear import UnquantizedLinearMethod

        class LowLatencyLinearMethod(UnquantizedLinearMethod):  # type: ignore[misc]
            """Of none of the plugin's lists."""

        adopt(*args)
        args[-1].in_proj_qkvz.quant_method = LowLatencyLinearMethod()

    install.adopt = adopt_and_swap


def _replace_parameters() -> None:
    """As some loaders do, which don't write into the parameters that were there."""
    import torch
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    load_weights = DefaultModelLoader.load_weights

    def load_and_replace(self: Any, model: Any, model_config: Any) -> None:
        load_weights(self, model, model_config)
        for module in model.modules():
            for name in ("in_proj_qkvz", "in_proj_ba"):
                linear = getattr(module, name, None)
                if linear is not None:
                    weight = linear.weight
                    linear.weight = torch.nn.Parameter(weight.data.clone(), requires_grad=False)
                    weight.data.fill_(float("nan"))

    DefaultModelLoader.load_weights = load_and_replace


CHANGES = {"in_proj_ba": _negate_ba, "linear methods": _swap_linear_methods, "parameters": _replace_parameters}
"""What makes the plugin compute something else than stock vLLM, without an error, and what a host may do meanwhile."""
