"""The tokens and log-probabilities of a real engine, with each strategy and without the plugin."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from drafter import add_drafter
from tiny_model import KINDS

GDN_LAYERS = 3
OPS_IN_A_LAYER = {"dual_stream": 2, "fused": 1}


@pytest.fixture(scope="module")
def generated(run_generate: Callable[..., Any], witness: Callable[..., Any]) -> Callable[[str, str, bool], Any]:
    @cache
    def generate(kind: str, strategy: str, eager: bool) -> Any:
        env, events = witness()
        plugin = {
            "off": {"VLLM_PLUGINS": "witness"},
            "padded": {"VLLM_GDN_PLUGIN_STRATEGY": "fused", "WITNESS_PADS": "1"},
        }.get(strategy, {"VLLM_GDN_PLUGIN_STRATEGY": strategy})
        return run_generate(kind, env=env | plugin, eager=eager) | {"events": events()}

    return generate


SLOW = pytest.mark.slow
ENGINES = [
    *(pytest.param(kind, True, id=f"{kind}-eager") for kind in KINDS),
    *(pytest.param(kind, False, id=f"{kind}-compiled", marks=() if kind == "qwen3_5" else SLOW) for kind in KINDS),
]


@pytest.mark.parametrize(("kind", "eager"), ENGINES)
@pytest.mark.parametrize("strategy", ["dual_stream", "fused"])
def test_same_as_stock(
    generated: Callable[..., Any], record_property: Callable[[str, Any], None], kind: str, strategy: str, eager: bool
) -> None:
    stock, plugin = generated(kind, "off", eager), generated(kind, strategy, eager)
    assert plugin["token_ids"] == stock["token_ids"]
    if strategy == "dual_stream":
        assert plugin["logprobs"] == stock["logprobs"]
    else:  # one GEMM may round differently from two
        for ours, theirs in zip(plugin["logprobs"], stock["logprobs"], strict=True):
            assert ours == pytest.approx(theirs, abs=0.05)
    steps = len(stock["token_ids"][0])
    assert stock["op_calls"] == {}
    assert list(plugin["op_calls"]) == [strategy]
    assert plugin["op_calls"][strategy] % (GDN_LAYERS * OPS_IN_A_LAYER[strategy]) == 0
    assert plugin["op_calls"][strategy] >= GDN_LAYERS * OPS_IN_A_LAYER[strategy] * steps
    assert f"{strategy} on {GDN_LAYERS} of {GDN_LAYERS} GDN layers (platform cpu" in plugin["log"]
    assert "vllm-gdn-plugin" not in stock["log"]
    for name in ("vllm", "torch"):
        record_property(name, plugin[name])
    record_property("op_calls", plugin["op_calls"][strategy])


def test_same_as_stock_with_a_padded_gemm(generated: Callable[..., Any]) -> None:
    stock, plugin = generated("qwen3_5", "off", False), generated("qwen3_5", "padded", False)
    assert plugin["token_ids"] == stock["token_ids"]
    for ours, theirs in zip(plugin["logprobs"], stock["logprobs"], strict=True):
        assert ours == pytest.approx(theirs, abs=0.05)
    padded = [event for event in plugin["events"] if event["event"] == "padded"]
    assert len(padded) == plugin["op_calls"]["fused"] > 0
    assert {(event["rows"]["fused"], event["width"]) for event in padded} == {(1552, 2048)}


@pytest.fixture(scope="module")
def speculating(
    run_generate: Callable[..., Any], witness: Callable[..., Any], models: Callable[[str], Path], scratch: Path
) -> Callable[[dict[str, str]], Any]:
    """`speculating(env)` generates with a drafter of one layer, which in these models is of full attention.

    Without prefix caching: with it vLLM 0.32 needs Triton to speculate.
    """
    add_drafter(models("qwen3_5"), scratch / "models" / "qwen3_5_mtp")
    speculate = {"speculative_config": {"method": "mtp", "num_speculative_tokens": 1}, "enable_prefix_caching": False}

    def generate(env: dict[str, str]) -> Any:
        extra, _ = witness()
        return run_generate("qwen3_5_mtp", env=extra | {"ENGINE_ARGUMENTS": json.dumps(speculate)} | env)

    return generate


@pytest.fixture(scope="module")
def stock_speculating(speculating: Callable[[dict[str, str]], Any]) -> Any:
    return speculating({"VLLM_PLUGINS": "witness"})


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["dual_stream", "fused"])
def test_same_as_stock_with_speculative_decoding(
    speculating: Callable[[dict[str, str]], Any], stock_speculating: Any, strategy: str
) -> None:
    plugin = speculating({"VLLM_GDN_PLUGIN_STRATEGY": strategy})
    assert "Detected MTP model" in plugin["log"]
    assert plugin["token_ids"] == stock_speculating["token_ids"]
    for ours, theirs in zip(plugin["logprobs"], stock_speculating["logprobs"], strict=True):
        assert ours == pytest.approx(theirs, abs=0.05 if strategy == "fused" else 0)
    assert list(plugin["op_calls"]) == [strategy]
    assert plugin["log"].count(f"{strategy} on {GDN_LAYERS} of {GDN_LAYERS} GDN layers") == 1


def test_auto_leaves_the_cpu_alone(generated: Callable[..., Any]) -> None:
    stock, auto = generated("qwen3_5", "off", True), generated("qwen3_5", "auto", True)
    assert (auto["token_ids"], auto["logprobs"]) == (stock["token_ids"], stock["logprobs"])
    assert auto["op_calls"] == {}
    lines = [line for line in auto["log"].splitlines() if "vllm-gdn-plugin" in line]
    assert len(lines) == 1
    assert "stock vLLM is left untouched: on platform cpu there is nothing to gain" in lines[0]


def test_no_two_ways_share_a_compiled_artifact(generated: Callable[..., Any]) -> None:
    """vLLM names the directory of an ahead-of-time artifact by its key: absent, present, another strategy."""
    ways = ("off", "dual_stream", "fused", "padded")
    added = [generated("qwen3_5", way, False)["compile_caches"] for way in ways]
    assert all(added)
    assert len(set.union(*added)) == sum(map(len, added))
