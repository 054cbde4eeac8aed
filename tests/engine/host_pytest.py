"""Run vLLM's own tests in a process that has loaded vLLM's plugins, as each process of an engine does.

    python host_pytest.py {with,without} [PYTEST-ARGUMENTS]...

Every installed plugin is loaded, the one under test only `with`. Ends with a line that says what it did here.
"""

import os
import sys

import pytest

from vllm_gdn_plugin.host.plugins import PLUGINS, plugin_names, plugins_without_ours


class WithoutCleanup:
    """vLLM's clean-up after each test takes longer than the test, and fails where a platform has no accelerator."""

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            item.add_marker("skip_global_cleanup")


def main() -> int:
    names = ",".join(sorted(plugin_names()))
    os.environ[PLUGINS] = plugins_without_ours({PLUGINS: names}) if sys.argv[1] == "without" else names
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    status = pytest.main(sys.argv[2:], plugins=[WithoutCleanup()])
    from vllm import envs

    from vllm_gdn_plugin.decide.contract import GDN_CLASSES
    from vllm_gdn_plugin.host.layers import is_built_in_place_of

    known = {name: getattr(sys.modules.get(module), name, None) for module, name in GDN_CLASSES.items()}
    ours = [name for name, stock in known.items() if stock is not None and is_built_in_place_of(stock)]
    print(f"vllm_gdn_plugin loaded: {'VLLM_GDN_PLUGIN' in envs.environment_variables}, replaced: {ours}")
    return status


if __name__ == "__main__":
    sys.exit(main())
