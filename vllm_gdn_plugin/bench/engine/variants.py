"""What differs between the engines that are compared: the environment, and nothing else."""

import os
import re
from collections.abc import Iterable, Mapping

from vllm_gdn_plugin.bench.errors import BadInput, WrongResult
from vllm_gdn_plugin.decide.plan import AUTO, REQUESTS, SERIAL
from vllm_gdn_plugin.host.plugins import NAME, PLUGINS, plugins_without_ours
from vllm_gdn_plugin.settings import describe, variable

OFF = "off"
"""The stock engine: the plugin is not loaded, and every other plugin is."""

STRATEGY = variable("strategy")
BEFORE_NUMBER = "-"
"""Between a variant's name and the number of its start, from the second on."""


def variants(texts: Iterable[str]) -> dict[str, dict[str, str]]:
    """The settings of the stock engine and of one engine for each text, by name, the stock engine first.

    A text is a strategy, or NAME=SETTING=VALUE with more settings after spaces:
    ``no_kernel=VLLM_GDN_PLUGIN_DECODE_KERNEL=0`` is ``auto`` with that setting. Raises BadInput.
    """
    found = {OFF: {PLUGINS: plugins_without_ours(os.environ)}}
    for text in texts:
        name, _, settings = text.partition("=")
        found[name] = {STRATEGY: AUTO, **_settings(name, settings), **_plugins_with_ours(os.environ)}
    return found


def _settings(name: str, text: str) -> dict[str, str]:
    strategies = [strategy for strategy in REQUESTS if strategy != SERIAL]
    if not text:
        if name not in strategies:
            raise BadInput(f"--strategy {name!r} is not one of {', '.join(strategies)}, and has no settings after a =")
        return {STRATEGY: name}
    if name == OFF or not re.fullmatch(r"\w+", name):
        raise BadInput(f"--strategy {name}={text}: {name!r} is no name of letters, digits and _ other than {OFF}")
    found = dict(one.partition("=")[::2] for one in text.split())
    if unknown := set(found) - {variable for variable, *_ in describe()}:
        raise BadInput(f"--strategy {name}={text}: {', '.join(sorted(unknown))} is no setting of the plugin")
    return found


def kind_of(variant: str) -> str:
    """The variant of which this is another start."""
    return variant.partition(BEFORE_NUMBER)[0]


def start_of(variant: str) -> str:
    """Which start of it this is: empty for the first."""
    return variant.partition(BEFORE_NUMBER)[2]


def starts_of(names: Iterable[str], kind: str) -> list[str]:
    """Those of the names that are starts of this variant."""
    return [name for name in names if kind_of(name) == kind]


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
    if kind_of(name) == OFF:
        if lines:
            raise WrongResult(f"the engine without the plugin has loaded it: {lines[0]}")
        return ""
    at_work = [line for line in lines if re.search(r" on [1-9]\d* of \d+ GDN layers", line)]
    if not at_work:
        why = lines[-1] if lines else "its log says nothing of it"
        raise BadInput(f"{name}: the plugin does nothing here: {why}")
    return at_work[-1]
