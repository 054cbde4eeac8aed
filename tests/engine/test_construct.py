"""The real layers of a vLLM release, also of one without a CPU engine: replaced, planned, traced, and as exact."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_model import KINDS

GDN_LAYERS = 3
OPS = {"dual_stream": ["gdn_in_proj_fork", "gdn_in_proj_join"], "fused": ["gdn_fused_in_proj"]}


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
        assert layer["class"].startswith("GdnPlugin")
        assert layer["strategy"] == strategy
        assert layer["traced"] == [f"vllm_gdn_plugin.{op}" for op in OPS[strategy]]
        assert layer["norm"] > 0
        assert layer["error"] <= (0 if strategy == "dual_stream" else 0.01 * layer["norm"])
    assert case["op_calls"] == {strategy: GDN_LAYERS * len(OPS[strategy])}
    for name in ("vllm", "torch"):
        record_property(name, constructed[name])
    record_property("op_calls", case["op_calls"][strategy])
