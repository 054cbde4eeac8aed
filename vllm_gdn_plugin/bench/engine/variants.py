"""What differs between the engines that are compared: the environment, and nothing else."""

import os
import re
from collections.abc import Iterable, Mapping
from importlib.metadata import distributions

from vllm_gdn_plugin.bench.errors import BadInput, WrongResult
from vllm_gdn_plugin.decide.plan import REQUESTS, SERIAL
from vllm_gdn_plugin.settings import variable

NAME = "vllm_gdn_plugin"
OFF = "off"
"""The stock engine: the plugin is not loaded, and every other plugin is."""

PLUGINS = "VLLM_PLUGINS"
STRATEGY = variable("strategy")
STRING_NAMES = {"VLLM_USE_LAYERNAME": "0"}
"""vLLM's switch back to layer names that are strings."""


def variants(strategies: Iterable[str]) -> dict[str, dict[str, str]]:
    """The settings of the stock engine and of one engine for each strategy, by name, the stock engine first.

    Raises BadInput.
    """
    choices = [name for name in REQUESTS if name != SERIAL]
    found = {OFF: {PLUGINS: plugins_without_ours(os.environ)}}
    for strategy in strategies:
        if strategy not in choices:
            raise BadInput(f"--strategy {strategy!r} is not one of {', '.join(choices)}")
        found[strategy] = {STRATEGY: strategy, **_plugins_with_ours(os.environ)}
    return found


def plugins_without_ours(environment: Mapping[str, str]) -> str:
    """``VLLM_PLUGINS`` for an engine like this one that does not load the plugin, and loads all else it would load."""
    if PLUGINS in environment:
        names = environment[PLUGINS].split(",")
    else:
        points = [point for distribution in distributions() for point in distribution.entry_points]
        names = sorted({point.name for point in points if re.fullmatch(r"vllm\..*plugins", point.group)})
    return ",".join(name for name in names if name not in ("", NAME))


def _plugins_with_ours(environment: Mapping[str, str]) -> dict[str, str]:
    if PLUGINS not in environment:
        return {}
    names = [name for name in environment[PLUGINS].split(",") if name]
    return {PLUGINS: ",".join(names if NAME in names else [*names, NAME])}


def require_at_work(name: str, log: str) -> str:
    """The line in the engine's log that says what the plugin did; raises unless it is what the variant's name says.

    Without this, a plugin that stepped aside would be compared with itself.
    """
    lines: list[str] = re.findall(r"vllm-gdn-plugin.*", log)
    if name == OFF:
        if lines:
            raise WrongResult(f"the engine without the plugin has loaded it: {lines[0]}")
        return ""
    at_work = [line for line in lines if re.search(r" on [1-9]\d* of \d+ GDN layers", line)]
    if not at_work:
        why = lines[-1] if lines else "its log says nothing of it"
        raise BadInput(f"with {STRATEGY}={name} the plugin does nothing here: {why}")
    return at_work[-1]
