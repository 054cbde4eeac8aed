"""`check` tells of a model what vLLM constructs from the same configuration, in every format that it can read here."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from check_formats import FORMATS, GDN_LAYERS, MODELS, MOE

CASES = [(name, model) for name in FORMATS for model in MODELS] + [(MOE[1], MOE[0])]


@pytest.fixture(scope="module")
def found(run_script: Callable[..., Any]) -> Any:
    """What check_formats.py found out in one process."""
    return run_script("qwen3_next", script=Path(__file__).with_name("check_formats.py"))


@pytest.fixture(scope="module")
def answers(found: Any) -> Any:
    return found["answers"]


@pytest.mark.parametrize(("name", "model"), CASES, ids=[f"{name}-{model}" for name, model in CASES])
def test_check_tells_what_vllm_constructs(answers: Any, name: str, model: str) -> None:
    both = answers.get(f"{name} | {model}")
    if both is None:
        pytest.skip(f"this vLLM has no such model: {model}")
    told, constructed = both["told"], both["constructed"]
    assert both.get("by_config", told) == told
    if "error" in constructed and not name.startswith("none"):
        pytest.skip(f"this vLLM does not construct it here: {constructed['error'][:300]}")
    assert told == constructed
    assert len(told["facts"]) == len(GDN_LAYERS)
    assert told["decode"] is None or told["decode"]["interleaved"] == (model == "interleaved")


@pytest.mark.parametrize(
    ("name", "strategy"),
    [
        ("none", "fused"),
        ("auto-round, regexes", "dual_stream"),
        ("modelopt mixed, GDN absent", "fused"),
        ("modelopt mixed, ba absent", "dual_stream"),
        ("compressed-tensors, no GDN targets", "fused"),
    ],
)
@pytest.mark.parametrize("model", MODELS)
def test_formats_that_were_misread(answers: Any, name: str, strategy: str, model: str) -> None:
    both = answers.get(f"{name} | {model}")
    if both is None or "error" in both["constructed"]:
        pytest.skip(f"this vLLM does not construct it here: {both and both['constructed']['error'][:300]}")
    assert both["told"]["strategies"] == [strategy] * len(GDN_LAYERS)


def test_the_command_tells_a_hub_id_from_the_cache_as_a_directory(found: Any) -> None:
    code, out, errors = found["commands"]["id"]
    assert (code, errors) == (0, "")
    report = json.loads(out)
    assert report["decode_kernel"] == "off: it is made for CUDA, this is platform cpu"
    (line,) = report["model"]
    assert line.startswith(f"{len(GDN_LAYERS)} GDN layers (0-2): fused; in_proj_qkvz ")
    assert report["engine"].startswith("vllm serve --dtype float16; not looked at")
    for name in ("directory", "file"):
        assert found["commands"][name] == [0, out, ""]


@pytest.mark.parametrize(
    ("name", "says"), [("unknown", "it is not in the local cache"), ("refused", "vLLM does not take this model here: ")]
)
def test_the_command_has_one_line_for_what_cannot_be_told(found: Any, name: str, says: str) -> None:
    code, out, errors = found["commands"][name]
    assert (code, out, errors.count("\n")) == (2, "", 1)
    assert says in errors
