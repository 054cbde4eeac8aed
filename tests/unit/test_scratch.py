import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_gdn_plugin.decide.scratch import UNQUANTIZED, WIDE_METHODS_BESIDE_UNQUANTIZED, share_no_scratch


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
