"""Beside another plugin that replaces the GDN layer: its class is built, and one line says that we step aside.

It is a distribution of its own, as LightDelta and vllm-suffix-hybrid are, and registers its class as they do.
"""

import json
import os
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from answered import our_lines, said

from vllm_gdn_plugin.decide.contract import GDN_CLASSES, layer_module

HERE = Path(__file__).parent
ON = {"VLLM_GDN_PLUGIN_STRATEGY": "dual_stream"}
STOCK = {"VLLM_PLUGINS": "witness"}
GDN_LAYERS = 3

SPEC = find_spec("vllm")
MODULE = layer_module(Path(next(iter(SPEC.submodule_search_locations or [])))) if SPEC else None

OTHER = """
import os
from witness import note

note("other plugin imported")


def take():
    from {module} import {layer}

    class OtherPluginsLayer({layer}):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            note("other plugin's layer built")

    {layer}.register_oot(OtherPluginsLayer)


def register():
    note("other plugin called")
    if os.environ["OTHER_PLUGIN"] == "registers in its function":
        take()


if os.environ["OTHER_PLUGIN"] == "registers at import":
    take()
if os.environ["OTHER_PLUGIN"] == "imports the layer":
    import {module}
    note("layer imported")
"""


@pytest.fixture(scope="module")
def run(run_generate: Callable[..., Any], witness: Callable[..., Any], scratch: Path) -> Callable[..., Any]:
    """`run(env, ours_first=False)`: answers beside the other plugin, what was noted as `events`, our lines as `said`.

    Plugins are loaded in the order of the folders on `sys.path`. Our metadata, put in a folder before the others, hide
    those that are installed.
    """
    for name, metadata, entry_point in (
        ("ours", f"Name: vllm-gdn-plugin\nVersion: {version('vllm-gdn-plugin')}", "vllm_gdn_plugin = vllm_gdn_plugin"),
        ("other", "Name: other-plugin\nVersion: 0", "other_plugin = other_plugin"),
    ):
        information = scratch / name / f"{name}-0.dist-info"
        information.mkdir(parents=True)
        (information / "METADATA").write_text(f"Metadata-Version: 2.1\n{metadata}\n")
        (information / "entry_points.txt").write_text(f"[vllm.general_plugins]\n{entry_point}:register\n")
    text = OTHER.format(module=MODULE, layer=GDN_CLASSES[str(MODULE)])
    (scratch / "other" / "other_plugin.py").write_text(text)

    def generate(env: dict[str, str], ours_first: bool = False, **options: Any) -> Any:
        extra, events = witness()
        first, *others = extra["PYTHONPATH"].split(os.pathsep)  # the witness, which has to be there before both
        folders = [scratch / "ours", scratch / "other"] if ours_first else [scratch / "other"]
        extra["PYTHONPATH"] = os.pathsep.join([first, *map(str, folders), *others])
        got = run_generate("qwen3_5", env=extra | env, **options)
        lines = our_lines(got["log"])
        return got | {"events": [event["event"] for event in events()], "said": lines}

    return generate


def assert_theirs(got: dict[str, Any], stock: dict[str, Any]) -> None:
    assert said(got) == said(stock)
    assert got["events"].count("other plugin's layer built") >= GDN_LAYERS
    assert got["ran"] == {}
    (line,) = got["said"]
    assert "steps aside, vLLM runs as it is: other_plugin." in line
    assert "OtherPluginsLayer of another plugin replaces the GDN layer" in line


QUICK = (True, "registers in its function")
ORDERS = [
    pytest.param(ours_first, how, marks=() if (ours_first, how) == QUICK else pytest.mark.slow)
    for ours_first in (True, False)
    for how in ("registers in its function", "registers at import")
]


@pytest.mark.parametrize(("ours_first", "how"), ORDERS)
def test_the_other_plugin_s_class_is_built(run: Callable[..., Any], stock: Any, ours_first: bool, how: str) -> None:
    got = run(ON | {"OTHER_PLUGIN": how}, ours_first)
    assert_theirs(got, stock)
    order = [event for event in got["events"] if event in ("settings read", "other plugin called")]
    assert order[:2] == ["settings read", "other plugin called"][:: 1 if ours_first else -1]
    assert got["classes"] == ["other_plugin.take.<locals>.OtherPluginsLayer"]


@pytest.mark.slow
def test_the_layer_s_module_is_imported_early_by_somebody_else(run: Callable[..., Any], stock: Any) -> None:
    got = run(ON | {"OTHER_PLUGIN": "imports the layer"})
    assert said(got) == said(stock)
    assert got["events"].index("layer imported") < got["events"].index("settings read")
    assert list(got["ran"]) == ["dual_stream"]
    (line,) = got["said"]
    assert f"dual_stream on {GDN_LAYERS} of {GDN_LAYERS} GDN layers" in line


@pytest.mark.slow
@pytest.mark.parametrize("ours_first", [True, False])
def test_in_spawned_workers(run: Callable[..., Any], ours_first: bool) -> None:
    separate = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_WORKER_MULTIPROC_METHOD": "spawn"}
    how = {"OTHER_PLUGIN": "registers in its function"}
    stock = run(STOCK | separate, tp=2)
    got = run(ON | separate | how, ours_first, tp=2)
    assert_theirs(got, stock)
    assert got["events"].count("other plugin's layer built") == 2 * GDN_LAYERS


def test_each_engine_of_a_process_decides_for_itself(run: Callable[..., Any], stock: Any) -> None:
    """Ours, then with the other plugin's class in the registry, then without it again."""
    env = ON | {"OTHER_PLUGIN": "registers nothing", "ENGINES": json.dumps(["ours", "theirs", "ours"])}
    got = run(env, script=HERE / "engines.py")
    for answer in got["engines"]:
        assert said(answer) == said(stock)
    ours = ["vllm_gdn_plugin.run.layer." + GDN_CLASSES[str(MODULE)]]
    theirs = ["other_plugin.take.<locals>.OtherPluginsLayer"]
    assert [answer["classes"] for answer in got["engines"]] == [ours, theirs, ours]
    ran = [answer["ran"]["dual_stream"] for answer in got["engines"]]
    assert 0 < ran[0] == ran[1] < ran[2]
    first, aside, second = got["said"]
    assert "dual_stream on 3 of 3 GDN layers" in first
    assert "steps aside, vLLM runs as it is: other_plugin." in aside
    assert "dual_stream on 3 of 3 GDN layers" in second
