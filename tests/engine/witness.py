"""A vLLM plugin of the tests: it writes down what happens in each process, and breaks a step where it is told to.

Made an installed distribution by the fixture `witness`. vLLM loads it before the plugin under test, in each process.

    WITNESS_FILE    where each event is appended as a line of JSON
    WITNESS_BREAKS  the step of vllm_gdn_plugin that fails: a key of `BREAKS`
"""

import importlib.abc
import json
import multiprocessing
import os
import sys
from collections import Counter
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
        from vllm_gdn_plugin import host
    except ImportError:
        return
    _count_op_calls(host)
    broken = os.environ.get("WITNESS_BREAKS")
    if broken:
        BREAKS[broken]()


def note(event: str) -> None:
    with open(os.environ["WITNESS_FILE"], "a") as file:
        file.write(json.dumps({"event": event, "process": process_name(), "pid": os.getpid()}) + "\n")


def process_name() -> str:
    """`main`, `inspection` (of the model class), or the name vLLM gave its child without the number."""
    if multiprocessing.parent_process() is not None:
        return multiprocessing.current_process().name.split("_")[0].rstrip("0123456789-")
    return "inspection" if "vllm.model_executor.models.registry" in " ".join(sys.orig_argv) else "main"


class _Watch(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.endswith(GDN_MODULE):
            note("GDN module imported")


def _count_op_calls(host: Any) -> None:
    layer_by_name = host.layer_by_name

    def counting(layer_name: Any) -> Any:
        layer = layer_by_name(layer_name)
        if layer.gdn_strategy not in calls:
            note(f"{layer.gdn_strategy} op called")
        calls[layer.gdn_strategy] = calls.get(layer.gdn_strategy, 0) + 1
        with open(_calls_file(), "a") as file:
            file.write(f"{layer.gdn_strategy}\n")
        return layer

    host.layer_by_name = counting


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


def _break_contract() -> None:
    from vllm_gdn_plugin import install
    from vllm_gdn_plugin.contract import Contract

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
    **{
        name: _break(name)
        for name in ("declare_variables", "when_imported", "platform", "replace", "layer_facts", "after_loading")
    },
}
