from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_gdn_plugin.decide.plan import (
    AUTO,
    DUAL_STREAM,
    FUSED,
    REQUESTS,
    RULES,
    SERIAL,
    STRATEGIES,
    LayerFacts,
    ProjectionFacts,
    plan,
    platform_plan,
)
from vllm_gdn_plugin.decide.scratch import UNQUANTIZED

BA = ProjectionFacts(UNQUANTIZED, "bfloat16", 64)
FP8 = ProjectionFacts("Fp8LinearMethod", "bfloat16", 12288)
MADE_FOR = {
    FUSED: LayerFacts("cuda", ProjectionFacts(UNQUANTIZED, "bfloat16", 12288), BA, "bfloat16"),
    DUAL_STREAM: LayerFacts("cuda", FP8, BA, "bfloat16"),
}
"""The layer that each strategy is for: of a bf16 checkpoint, and of an official FP8 one."""

COMMON: dict[str, list[tuple[dict[str, Any], str]]] = {
    "no LoRA": [({"lora": True}, "LoRA is enabled")],
    "both projections are plain linear layers": [
        ({"qkvz": {"plain": False}}, "a projection has a bias"),
        ({"ba": {"plain": False}}, "a projection has a bias"),
    ],
    "both give the activations' dtype": [
        ({"qkvz": {"dtype": "float32"}}, "in_proj_qkvz gives float32"),
        ({"ba": {"dtype": "float32"}}, "in_proj_ba float32"),
        ({"activation_dtype": "float16"}, "the activations are float16"),
    ],
}
BROKEN: dict[str, dict[str, list[tuple[dict[str, Any], str]]]] = {
    FUSED: COMMON
    | {
        "both are unquantised": [
            ({"qkvz": {"linear_method": "Fp8LinearMethod"}}, "one GEMM cannot serve Fp8LinearMethod and Unquant"),
            ({"ba": {"linear_method": "Fp8LinearMethod"}}, f"one GEMM cannot serve {UNQUANTIZED} and Fp8LinearMethod"),
        ],
        "`VLLM_BATCH_INVARIANT` is off": [({"batch_invariant": True}, "VLLM_BATCH_INVARIANT=1 promises bit-equal")],
        "no CPU offload, and the weights lie on the device from the start": [
            ({"offload": True}, "the weights are offloaded or not yet in place"),
            ({"weights_in_place": False}, "the weights are offloaded or not yet in place"),
        ],
    },
    DUAL_STREAM: COMMON
    | {
        "`in_proj_ba` is unquantised, and `in_proj_qkvz` shares no scratch memory with it": [
            ({"qkvz": {"linear_method": "HomemadeMethod"}}, "HomemadeMethod and UnquantizedLinearMethod are not known"),
            ({"ba": {"linear_method": "Fp8LinearMethod"}}, "are not known to be safe side by side"),
        ],
        "CUDA graphs are on (the CPU runs the two one after the other)": [
            ({"cuda_graphs": False}, "CUDA graphs are off")
        ],
        "no CPU offload": [({"offload": True}, "weights are offloaded to the CPU")],
        "no dual batch overlap (`--enable-dbo`)": [({"ubatching": True}, "dual batch overlap (--enable-dbo) runs")],
    },
}
"""For each strategy and rule: what breaks it and no other rule, and what the user is told."""


def changed(facts: LayerFacts, change: dict[str, Any]) -> LayerFacts:
    return replace(
        facts,
        **{n: replace(getattr(facts, n), **value) if isinstance(value, dict) else value for n, value in change.items()},
    )


def test_the_tables_cover_every_strategy_rule_and_fact() -> None:
    assert list(RULES) == [s for s in STRATEGIES if s != SERIAL] == list(BROKEN) == list(MADE_FOR)
    for strategy, rules in RULES.items():
        assert list(BROKEN[strategy]) == [rule.needs for rule in rules]
    touched = {name for table in BROKEN.values() for rows in table.values() for change, _ in rows for name in change}
    assert touched == {f.name for f in fields(LayerFacts)} - {"platform", "quantization"}


@pytest.mark.parametrize(
    ("strategy", "needs", "change", "told"),
    [(s, needs, *row) for s, table in BROKEN.items() for needs, rows in table.items() for row in rows],
)
def test_each_rule_can_forbid_its_strategy_and_says_why(
    strategy: str, needs: str, change: dict[str, Any], told: str
) -> None:
    assert plan(MADE_FOR[strategy], strategy).strategy == strategy
    facts = changed(MADE_FOR[strategy], change)
    assert [rule.needs for rule in RULES[strategy] if not rule.holds(facts)] == [needs]
    by_name, auto = plan(facts, strategy), plan(facts, AUTO)
    assert by_name.strategy == SERIAL
    assert told in by_name.reason
    assert auto.strategy != strategy
    assert auto.reason.count(told) == 1, "also where auto takes the next one, and once where both refuse for it"


@pytest.mark.parametrize(
    ("platform", "request_", "for_bf16", "for_fp8"),
    [
        ("cuda", AUTO, FUSED, DUAL_STREAM),
        ("cuda", FUSED, FUSED, SERIAL),
        ("cuda", DUAL_STREAM, DUAL_STREAM, DUAL_STREAM),
        ("cuda", SERIAL, SERIAL, SERIAL),
        ("cpu", AUTO, SERIAL, SERIAL),
        ("cpu", FUSED, FUSED, SERIAL),
        ("cpu", DUAL_STREAM, DUAL_STREAM, DUAL_STREAM),
        ("cpu", SERIAL, SERIAL, SERIAL),
    ],
)
def test_what_a_layer_gets(platform: str, request_: str, for_bf16: str, for_fp8: str) -> None:
    assert plan(replace(MADE_FOR[FUSED], platform=platform), request_).strategy == for_bf16
    assert plan(replace(MADE_FOR[DUAL_STREAM], platform=platform), request_).strategy == for_fp8


def test_auto_takes_dual_stream_for_a_bf16_layer_that_cannot_be_fused() -> None:
    chosen = plan(replace(MADE_FOR[FUSED], batch_invariant=True), AUTO)
    assert chosen.strategy == DUAL_STREAM
    assert "VLLM_BATCH_INVARIANT=1 promises" in chosen.reason


def test_a_cpu_needs_no_cuda_graphs_for_dual_stream() -> None:
    facts = replace(MADE_FOR[DUAL_STREAM], platform="cpu", cuda_graphs=False)
    assert plan(facts, DUAL_STREAM).strategy == DUAL_STREAM


@pytest.mark.parametrize("request_", REQUESTS)
@pytest.mark.parametrize("platform", ["cuda", "cpu", "rocm", "xpu", "npu", ""])
def test_which_platform_is_left_alone(platform: str, request_: str) -> None:
    supported = platform == "cuda" or (platform == "cpu" and request_ != AUTO)
    chosen = platform_plan(platform, request_)
    assert (chosen.strategy != SERIAL) == (supported and request_ != SERIAL)
    if request_ == SERIAL:
        assert "serial was asked for" in chosen.reason
    elif not supported:
        assert f"platform {platform}" in chosen.reason
    elif request_ != AUTO:
        assert chosen.strategy == request_


PROJECTIONS = st.builds(
    ProjectionFacts,
    linear_method=st.sampled_from([UNQUANTIZED, "Fp8LinearMethod", "GPTQMarlinLinearMethod", "HomemadeMethod"]),
    dtype=st.sampled_from(["bfloat16", "float16", "float32", "None"]),
    output_size=st.sampled_from([0, 64, 12288]),
    plain=st.booleans(),
)
RANDOM = st.builds(
    LayerFacts,
    platform=st.sampled_from(["cuda", "cpu"]),
    qkvz=PROJECTIONS,
    ba=PROJECTIONS,
    activation_dtype=st.sampled_from(["bfloat16", "float16"]),
    **{f.name: st.booleans() for f in fields(LayerFacts) if f.type in (bool, "bool")},
)
NEAR = st.builds(  # a layer that one strategy is for, with a few facts that may break a rule
    lambda facts, changes: changed(facts, {name: value for change in changes for name, value in change.items()}),
    st.sampled_from(list(MADE_FOR.values())),
    st.lists(
        st.sampled_from([row[0] for table in BROKEN.values() for rows in table.values() for row in rows]), max_size=2
    ),
)


@given(RANDOM | NEAR, st.sampled_from(REQUESTS))
def test_any_layer_gets_the_first_strategy_whose_rules_all_hold(facts: LayerFacts, request_: str) -> None:
    wanted = [s for s in RULES if request_ in (AUTO, s)] if request_ != AUTO or facts.platform == "cuda" else []
    chosen = plan(facts, request_)
    assert chosen.strategy == next((s for s in wanted if all(rule.holds(facts) for rule in RULES[s])), SERIAL)
    assert chosen.reason
    assert "\n" not in chosen.reason
    assert chosen.strategy == SERIAL or not facts.lora
