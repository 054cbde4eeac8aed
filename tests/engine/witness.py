"""A vLLM plugin of the tests: it writes down what happens in each process, and breaks a step where it is told to.

Made an installed distribution by the fixture `witness`. vLLM loads it before the plugin under test, in each process.

    WITNESS_FILE    where each event is appended as a line of JSON
    WITNESS_BREAKS  the step of vllm_gdn_plugin that fails: a key of `BREAKS`; or of `CORRUPTS`, to compute wrongly
    WITNESS_PADS    1: each fused layer runs as wide as it may be padded, which otherwise `auto` does on a GPU alone
"""

import functools
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
"""Calls of the plugin's ops in this process, by strategy."""


def register() -> None:
    if any(isinstance(finder, _Watch) for finder in sys.meta_path):
        return
    note("plugins loaded")
    sys.meta_path.insert(0, _Watch())
    try:
        from vllm_gdn_plugin import host, install
    except ImportError:
        return
    _note_settings(install)
    _count_op_calls(host)
    if os.environ.get("WITNESS_PADS"):
        _pad()
    broken = os.environ.get("WITNESS_BREAKS")
    if broken:
        (BREAKS | CORRUPTS)[broken]()


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


def _count_op_calls(host: Any) -> None:
    layer_by_name = host.layer_by_name

    def counting(layer_name: Any) -> Any:
        layer = layer_by_name(layer_name)
        if os.environ.get("WITNESS_BREAKS") == "projection":
            layer.in_proj_ba.forward = _run_out
        if layer.gdn_strategy not in calls:
            note(f"{layer.gdn_strategy} op called")
        calls[layer.gdn_strategy] = calls.get(layer.gdn_strategy, 0) + 1
        with open(_calls_file(), "a") as file:
            file.write(f"{layer.gdn_strategy}\n")
        return layer

    host.layer_by_name = counting


def _pad() -> None:
    from vllm_gdn_plugin.decide import plan
    from vllm_gdn_plugin.run import dual_stream as op
    from vllm_gdn_plugin.run import fused

    FusedProjections = fused.FusedProjections

    def widest(layer: Any, hidden_states: Any) -> str:
        rows = layer.gdn_fused.rows
        note("padded", rows=rows, width=sum(layer.gdn_fused.sizes) + layer.gdn_padding)
        return max(rows, key=rows.__getitem__)

    plan.MOST_PADDING = 1.0  # of a small model
    fused.layers_per_allocation = lambda *sizes: 2
    fused.FusedProjections = lambda qkvz, ba, ways: FusedProjections(qkvz, ba, plan.PADDED_TO)
    op.way_to_fuse = widest


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


def _break_from(call: int, module: str, path: str) -> Any:
    """Let what lies at `path` in `module` fail from this call on; the first is call 0."""

    def apply() -> None:
        *owners, name = path.split(".")
        owner = functools.reduce(getattr, owners, importlib.import_module(module))
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


def _break(name: str) -> Any:
    def apply() -> None:
        from vllm_gdn_plugin import host

        setattr(host, name, _fail)

    return apply


def _hold_class() -> None:
    """Take the place of the GDN class as another plugin would, when its module is first imported."""
    from vllm.model_executor.custom_op import op_registry_oot

    class OtherPluginsLayer:
        """Taken away again right after the plugin has looked: it cannot run."""

    op_registry_oot["QwenGatedDeltaNetAttention"] = OtherPluginsLayer
    from vllm_gdn_plugin import host

    replacement_of = host.replacement_of
    host.replacement_of = lambda name: (replacement_of(name), op_registry_oot.pop(name))[0]


BREAKS = {
    "contract": _break_contract,
    "held": _hold_class,
    "layer module": _break_layer_module,
    **{
        name: _break(name)
        for name in (
            "version",
            "package_directory",
            "declare_variables",
            "when_imported",
            "replacement_of",
            "platform",
            "replace",
            "layer_facts",
            "after_loading",
        )
    },
    "plan": _break_from(0, "vllm_gdn_plugin.install", "plan"),
    "fused weights": _break_from(0, "vllm_gdn_plugin.run.fused", "FusedProjections.__init__"),
    "fused is loaded": _break_from(0, "vllm_gdn_plugin.run.fused", "FusedProjections.is_loaded"),
    "report": _break_from(0, "vllm_gdn_plugin.report", "Ledger.finish"),
    "op, first call": _break_from(0, "vllm_gdn_plugin.decide.scratch", "stays_serial"),
    "op, later call": _break_from(10, "vllm_gdn_plugin.decide.scratch", "stays_serial"),
    "fused op, first call": _break_from(0, "vllm_gdn_plugin.run.fused", "FusedProjections._packed_weights"),
    "fused op, later call": _break_from(10, "vllm_gdn_plugin.run.fused", "FusedProjections._packed_weights"),
    "projection": lambda: None,  # see _count_op_calls
}


def _negate_ba() -> None:
    from vllm_gdn_plugin.run.layer import ProjectedLayer

    right = ProjectedLayer.in_proj_ba

    def wrong(self: Any, hidden_states: Any) -> Any:
        ba, _ = right(self, hidden_states)
        return -ba, None

    ProjectedLayer.in_proj_ba = wrong


CORRUPTS = {"in_proj_ba": _negate_ba}
"""What makes the plugin compute something else than stock vLLM, without an error."""
