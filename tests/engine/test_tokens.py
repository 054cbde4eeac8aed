"""The tokens and log-probabilities of a real engine, with each strategy and without the plugin."""

import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from answered import TOLERANCE, assert_same_but_for_rounding, our_lines, said
from drafter import add_drafter
from tiny_model import KINDS

GDN_LAYERS = 3
SLOW = pytest.mark.slow
QUICK = {("qwen3_5", "fused", False)}
"""One of dual_stream is in test_processes.py, with two ranks; layers of Qwen3-Next are in test_construct.py."""


@pytest.fixture(scope="module")
def generated(
    run_generate: Callable[..., Any], witness: Callable[..., Any], request: pytest.FixtureRequest
) -> Callable[[str, str, bool], Any]:
    @cache
    def generate(kind: str, strategy: str, eager: bool) -> Any:
        if (kind, strategy, eager) == ("qwen3_5", "off", True):
            return request.getfixturevalue("stock")
        env, _ = witness()
        plugin = {"VLLM_PLUGINS": "witness"} if strategy == "off" else {"VLLM_GDN_PLUGIN_STRATEGY": strategy}
        return run_generate(kind, env=env | plugin, eager=eager)

    return generate


def cases() -> Iterator[Any]:
    """All kinds of models and both strategies; slow but for QUICK."""
    for kind in KINDS:
        for strategy in ("dual_stream", "fused"):
            for eager in (True, False):
                quick = (kind, strategy, eager) in QUICK
                name = f"{strategy}-{kind}-{'eager' if eager else 'compiled'}"
                yield pytest.param(strategy, kind, eager, id=name, marks=() if quick else SLOW)


@pytest.mark.parametrize(("strategy", "kind", "eager"), list(cases()))
def test_same_as_stock(
    generated: Callable[..., Any], record_property: Callable[[str, Any], None], kind: str, strategy: str, eager: bool
) -> None:
    stock, plugin = generated(kind, "off", eager), generated(kind, strategy, eager)
    assert_same_but_for_rounding(plugin, stock, TOLERANCE if strategy == "fused" else 0)
    assert stock["ran"] == {}
    assert list(plugin["ran"]) == [strategy]
    # In compiled code fused is no op, and is seen when it is traced.
    steps = 1 if strategy == "fused" and not eager else len(stock["token_ids"][0])
    assert plugin["ran"][strategy] % GDN_LAYERS == 0
    assert plugin["ran"][strategy] >= GDN_LAYERS * steps
    assert f"{strategy} on {GDN_LAYERS} of {GDN_LAYERS} GDN layers (platform cpu" in plugin["log"]
    assert "vllm-gdn-plugin" not in stock["log"]
    for name in ("vllm", "torch"):
        record_property(name, plugin[name])
    record_property("op_calls", plugin["ran"][strategy])


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
    assert_same_but_for_rounding(plugin, stock_speculating, TOLERANCE if strategy == "fused" else 0)
    assert list(plugin["ran"]) == [strategy]
    assert plugin["log"].count(f"{strategy} on {GDN_LAYERS} of {GDN_LAYERS} GDN layers") == 1


def test_auto_leaves_the_cpu_alone(generated: Callable[..., Any]) -> None:
    stock, auto = generated("qwen3_5", "off", True), generated("qwen3_5", "auto", True)
    assert said(auto) == said(stock)
    assert auto["ran"] == {}
    assert auto["classes"] == stock["classes"]
    lines = our_lines(auto["log"])
    assert len(lines) == 1
    assert "stock vLLM is left untouched: on platform cpu there is nothing to gain" in lines[0]


def test_no_two_ways_share_a_compiled_artifact(generated: Callable[..., Any]) -> None:
    """vLLM names the directory of an ahead-of-time artifact by its key: absent, present."""
    added = [generated("qwen3_5", way, False)["compile_caches"] for way in ("off", "fused")]
    assert all(added)
    assert not set.intersection(*added)


@SLOW
def test_nor_do_two_strategies(generated: Callable[..., Any]) -> None:
    added = [generated("qwen3_5", way, False)["compile_caches"] for way in ("dual_stream", "fused")]
    assert all(added)
    assert not set.intersection(*added)
