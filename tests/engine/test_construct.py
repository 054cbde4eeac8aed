"""The real layers of a vLLM release, also of one without a CPU engine: replaced, planned, traced, and as exact."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_model import KINDS

GDN_LAYERS = 3
OPS = {"dual_stream": ["gdn_in_proj_fork", "gdn_in_proj_join"], "fused": []}
LINEARS = {"dual_stream": ["in_proj_qkvz", "out_proj"], "fused": ["the one weight", "out_proj"]}


@pytest.fixture(scope="module")
def constructed(run_script: Callable[..., Any], witness: Callable[..., Any], models: Callable[[str], Path]) -> Any:
    """What construct.py found out in one process, for all models and strategies."""
    env, _ = witness()
    kind, *others = KINDS
    script = Path(__file__).with_name("construct.py")
    return run_script(kind, env=env, eager=False, script=script, arguments=["--also", *map(models, others)])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strategy", OPS)
def test_forward_cuda_runs_as_stock_does(
    constructed: Any, record_property: Callable[[str, Any], None], strategy: str, kind: str
) -> None:
    case = constructed["cases"][f"{strategy} {kind}"]
    assert len(case["layers"]) == GDN_LAYERS
    for layer in case["layers"]:
        assert layer["class"] == layer["stock class"], "other plugins look for the layer by this name"
        assert layer["strategy"] == strategy
        assert layer["ops"] == [f"vllm_gdn_plugin.{op}" for op in OPS[strategy]]
        assert layer["linears"] == LINEARS[strategy]
        assert_as_exact(layer["error"], layer["norm"], strategy)
    assert case["ran"] == {strategy: GDN_LAYERS}
    for name in ("vllm", "torch"):
        record_property(name, constructed[name])
    record_property("op_calls", case["ran"][strategy])


def assert_as_exact(error: float, norm: float, strategy: str) -> None:
    assert norm > 0
    assert error <= (0 if strategy == "dual_stream" else 0.01 * norm)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strategy", OPS)
def test_the_model_has_the_names_of_stock_s(constructed: Any, strategy: str, kind: str) -> None:
    assert constructed["cases"][f"{strategy} {kind}"]["names"] == constructed["stock"][kind]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strategy", OPS)
def test_a_layerwise_reload_writes_into_the_parameters(constructed: Any, strategy: str, kind: str) -> None:
    """And calls no hook of ours, so that it must. A release that does otherwise needs another way to fuse."""
    found = constructed["cases"][f"{strategy} {kind}"]["reloaded"]
    assert found["same parameters"]
    assert found["same addresses"]
    assert found["hooks called"] == 0
    assert len(found["norms"]) == GDN_LAYERS
    for error, norm, change in zip(found["errors"], found["norms"], found["changed by"], strict=True):
        assert_as_exact(error, norm, strategy)
        assert change > 0.1 * norm
