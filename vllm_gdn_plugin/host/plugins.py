"""vLLM's plugins by name: this one, those that are installed, and what an engine without this one loads."""

from collections.abc import Mapping
from importlib.metadata import entry_points

GROUP = "vllm.general_plugins"
"""The kind of plugin that this one is: vLLM loads it in every process."""

NAME = "vllm_gdn_plugin"
"""Of this one's entry point."""

PLUGINS = "VLLM_PLUGINS"
"""The variable that names the plugins which vLLM loads; not set: all."""


def plugin_names() -> set[str]:
    """The names of all of vLLM's plugins that are installed, of whatever kind."""
    points = entry_points()
    return {point.name for group in points.groups if group.startswith("vllm.") for point in points.select(group=group)}


def plugins_without_ours(environment: Mapping[str, str]) -> str:
    """``VLLM_PLUGINS`` for an engine like this one that does not load the plugin, and loads all else it would load."""
    names = environment[PLUGINS].split(",") if PLUGINS in environment else sorted(plugin_names())
    return ",".join(name for name in names if name not in ("", NAME))
