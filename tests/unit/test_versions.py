import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_gdn_plugin.versions import OLDEST, SUPPORTED_RANGE, judge_version

STANDINGS = {
    "supported": ["0.20.0", "0.20.0+cpu", "0.25.1", "0.33.0+cu130", "0.33.1.dev5+gabc", "0.33.7", "0!0.25.0", OLDEST],
    "older": ["0", "0.19.1", "0.20.0rc1", "0.20.0.dev3", "0.19.1rc1.dev231+g9dd5ee011", "0.9.2"],
    "newer": ["0.34.0", "0.34.0.dev1", "0.34.0rc1", "0.34.0+cu130", "1.0", "1", "2025.1", "1!0.25.0"],
    "unknown": ["dev", "", " ", "garbage", "0.33.x", "v", "0.33.0 (local)", "\n"],
}
ADVICE = {"older": "upgrade vLLM", "newer": "upgrade vllm-gdn-plugin", "unknown": "VLLM_GDN_PLUGIN_ALLOW_UNTESTED=1"}
CASES = [(version, standing) for standing, versions in STANDINGS.items() for version in versions]


@pytest.mark.parametrize("allow", [False, True], ids=["strict", "allow_untested"])
@pytest.mark.parametrize(("found", "standing"), CASES)
def test_the_verdict(found: str, standing: str, allow: bool) -> None:
    verdict = judge_version(found, allow_untested=allow)
    assert verdict.standing == standing
    assert verdict.admitted == (standing == "supported" or (allow and standing != "older"))
    assert f"vLLM {found}" in verdict.reason
    assert SUPPORTED_RANGE in verdict.reason
    if not verdict.admitted:
        assert ADVICE[standing] in verdict.reason
    elif standing != "supported":
        assert "admitted by VLLM_GDN_PLUGIN_ALLOW_UNTESTED=1" in verdict.reason


@given(st.text() | st.from_regex(r"\A[v ]?\d+(\.\d+){0,3}(\.dev|rc|a|post|\+)?[\w.]*\Z"), st.booleans())
def test_no_text_raises(found: str, allow: bool) -> None:
    verdict = judge_version(found, allow)
    assert verdict.standing in STANDINGS
    assert verdict.admitted == (verdict.standing == "supported" or (allow and verdict.standing != "older"))
