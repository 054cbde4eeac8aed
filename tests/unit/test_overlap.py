from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_gdn_plugin.decide.scratch import (
    UNQUANTIZED,
    WIDE_METHODS_BESIDE_UNQUANTIZED,
    StaysSerial,
    share_no_scratch,
    stays_serial,
)

OVERLAPS: dict[str, Any] = {
    "aux_stream": True,
    "safe_pair": True,
    "capturing": True,
    "breakable_capture": False,
    "num_tokens": 8,
    "max_tokens": 8,
    "timed_slower": False,
}
SERIAL: dict[StaysSerial, dict[str, Any]] = {
    StaysSerial.NO_AUX_STREAM: {"aux_stream": False},
    StaysSerial.UNSAFE_PAIR: {"safe_pair": False},
    StaysSerial.NOT_CAPTURING: {"capturing": False},
    StaysSerial.BREAKABLE_CAPTURE: {"breakable_capture": True},
    StaysSerial.TOO_MANY_TOKENS: {"num_tokens": 9},
    StaysSerial.TIMED_SLOWER: {"timed_slower": True},
}


def test_nothing_in_the_way_means_overlap() -> None:
    assert stays_serial(**OVERLAPS) is None


@pytest.mark.parametrize("reason", StaysSerial, ids=lambda r: r.name)
def test_each_reason_is_reached_and_the_first_one_is_given(reason: StaysSerial) -> None:
    order = list(StaysSerial)
    assert stays_serial(**OVERLAPS | SERIAL[reason]) is reason
    later = {k: v for r in order[order.index(reason) :] for k, v in SERIAL[r].items()}
    assert stays_serial(**OVERLAPS | later) is reason


@pytest.mark.parametrize(("num_tokens", "max_tokens", "overlaps"), [(0, 0, True), (1, 0, False), (1024, 1024, True)])
def test_max_tokens_is_the_last_size_that_overlaps(num_tokens: int, max_tokens: int, overlaps: bool) -> None:
    reason = stays_serial(**OVERLAPS | {"num_tokens": num_tokens, "max_tokens": max_tokens})
    assert reason is (None if overlaps else StaysSerial.TOO_MANY_TOKENS)


@pytest.mark.parametrize(
    ("qkvz", "ba", "safe"),
    [
        (UNQUANTIZED, UNQUANTIZED, True),
        ("Fp8LinearMethod", UNQUANTIZED, True),
        ("AWQMarlinLinearMethod", UNQUANTIZED, True),
        ("ModelOptNvFp4LinearMethod", UNQUANTIZED, True),
        ("Fp8LinearMethod", "Fp8LinearMethod", False),
        (UNQUANTIZED, "Fp8LinearMethod", False),
        ("SplitKWithStaticScratchMethod", UNQUANTIZED, False),
        (f"{UNQUANTIZED} with rocm_unquantized_gemm", UNQUANTIZED, False),
        (UNQUANTIZED, f"{UNQUANTIZED} with another_gemm", False),
        ("NoneType", UNQUANTIZED, False),
    ],
)
def test_a_pair_is_safe_only_where_it_is_known(qkvz: str, ba: str, safe: bool) -> None:
    assert share_no_scratch(qkvz, ba) is safe


@given(st.text() | st.sampled_from(sorted(WIDE_METHODS_BESIDE_UNQUANTIZED)), st.text())
def test_two_narrow_methods_with_workspaces_are_never_safe(qkvz: str, ba: str) -> None:
    assert not share_no_scratch(qkvz, ba) or ba == UNQUANTIZED
