"""Whatever goes wrong in the plugin, the engine answers as stock vLLM does, and one line says why."""

from collections.abc import Callable
from typing import Any

import pytest
from witness import BREAKS

ON = {"VLLM_GDN_PLUGIN_STRATEGY": "dual_stream"}


@pytest.fixture(scope="module")
def stock(run_generate: Callable[..., Any]) -> Any:
    return run_generate("qwen3_5", env={"VLLM_PLUGINS": ""})


QUICK = ("contract", "held", "layer_facts", "after_loading")


@pytest.mark.parametrize("step", [pytest.param(s, marks=() if s in QUICK else pytest.mark.slow) for s in BREAKS])
def test_the_engine_answers_and_one_line_says_why(
    run_generate: Callable[..., Any], witness: Callable[..., Any], stock: Any, step: str
) -> None:
    env, _ = witness(step)
    got = run_generate("qwen3_5", env=env | ON)
    assert (got["token_ids"], got["logprobs"]) == (stock["token_ids"], stock["logprobs"])
    assert got["op_calls"] == {}
    lines = [line for line in got["log"].splitlines() if "vllm-gdn-plugin" in line]
    assert len(lines) == 1, lines
    assert "steps aside, vLLM runs as it is" in lines[0]
    expected = {"contract": "planted breach", "held": "OtherPluginsLayer already replaces"}
    assert expected.get(step, "unexpected ZeroDivisionError: planted by the test") in lines[0]


@pytest.mark.parametrize("step", ["contract", "declare_variables", "layer_facts"])
def test_strict_stops_the_engine(run_generate: Callable[..., Any], witness: Callable[..., Any], step: str) -> None:
    env, _ = witness(step)
    got = run_generate("qwen3_5", env=env | ON | {"VLLM_GDN_PLUGIN_STRICT": "1"}, fails=True)
    lines = [line for line in got["log"].splitlines() if "the engine stops, as VLLM_GDN_PLUGIN_STRICT=1 asks" in line]
    assert len(lines) == 1, got["log"][-2000:]


def test_a_wrong_setting_is_named_once(run_generate: Callable[..., Any], stock: Any) -> None:
    got = run_generate("qwen3_5", env={"VLLM_GDN_PLUGIN_STRATEGY": "fastest", "VLLM_GDN_PLUGIN_MAX_TOKENS": "many"})
    assert got["token_ids"] == stock["token_ids"]
    for name in ("STRATEGY", "MAX_TOKENS"):
        assert got["log"].count(f"VLLM_GDN_PLUGIN_{name}=") == 1
    assert "Unknown vLLM environment variable" not in got["log"]
