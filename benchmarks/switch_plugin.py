"""For scripts that build one engine after another in a process: vLLM loads its plugins for the first of them alone."""

import os
import sys
from collections.abc import Mapping

from vllm_gdn_plugin.bench.engine.variants import STRATEGY
from vllm_gdn_plugin.decide.contract import GDN_CLASSES
from vllm_gdn_plugin.host import imports, layers
from vllm_gdn_plugin.host.plugins import PLUGINS
from vllm_gdn_plugin.install import compile_factors, register
from vllm_gdn_plugin.settings import PREFIX, read_settings


def _settings() -> dict[str, str]:
    """What vLLM and the plugin read at an engine's start, also in worker processes."""
    return {name: value for name, value in os.environ.items() if name == PLUGINS or name.startswith(PREFIX)}


BEFORE = _settings()
"""What the process was started with, for all engines."""


def switch_plugin(variables: Mapping[str, str]) -> None:
    """Have this process build its next engine with these environment variables: with the plugin where they name a
    strategy, else as stock vLLM, whatever an earlier engine was built with."""
    imports.stop_watching()
    known = getattr(sys.modules.get("vllm.envs"), "environment_variables", {})
    for name in compile_factors(read_settings()[0]):
        known.pop(name, None)
    for module, name in GDN_CLASSES.items():
        if module in sys.modules:
            layers.withdraw_from(getattr(sys.modules[module], name))
    for name in _settings():
        del os.environ[name]  # what an earlier engine was built with must not reach this one
    os.environ.update({**BEFORE, **variables})
    if STRATEGY in variables:
        register()
