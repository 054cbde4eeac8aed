"""What an engine has answered and logged, and how it is compared with stock vLLM's."""

from typing import Any

import pytest

TOLERANCE = 0.05
"""Of a log-probability: one GEMM may round differently from two."""


def said(got: Any) -> tuple[Any, Any]:
    return got["token_ids"], got["logprobs"]


def our_lines(log: str) -> list[str]:
    return [line for line in log.splitlines() if "vllm-gdn-plugin" in line]


def assert_same_but_for_rounding(got: Any, stock: Any, tolerance: float = TOLERANCE) -> None:
    assert got["token_ids"] == stock["token_ids"]
    for ours, theirs in zip(got["logprobs"], stock["logprobs"], strict=True):
        assert ours == pytest.approx(theirs, rel=0, abs=tolerance)
