from dataclasses import asdict, fields, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_gdn_plugin.decide.plan import REQUESTS
from vllm_gdn_plugin.settings import Settings, describe, read_settings, variable

NAMES = [f.name for f in fields(Settings)]

GOOD: dict[str, list[tuple[str, Any]]] = {
    "strategy": [(text, text.strip().lower()) for r in REQUESTS for text in (r, r.upper(), f" {r}\n")],
    "decode_kernel": [("auto", "auto"), (" AUTO ", "auto"), ("1", "1"), ("on", "1"), ("0", "0"), ("No", "0")],
    "tune": [("1", True), ("on", True), ("0", False), ("NO", False)],
    "allow_untested": [("1", True), ("true", True), (" 1 ", True), ("0", False), ("False", False), ("no", False)],
    "strict": [("1", True), ("YES", True), ("On", True), ("0", False), ("OFF", False), ("off ", False)],
}
BAD = {
    "strategy": ["fast", "dual-stream", "auto,serial", "1", "\0", "\N{SNOWMAN}"],
    "decode_kernel": ["2", "-1", "automatic", "\N{ARABIC-INDIC DIGIT ONE}"],
    "tune": ["auto", "5"],
    "allow_untested": ["2", "yess", "None", "1 0"],
    "strict": ["-1", "y", "TRUE!"],
}


def test_the_tables_cover_every_setting() -> None:
    assert GOOD.keys() == BAD.keys() == set(NAMES)


@pytest.mark.parametrize(("name", "text", "value"), [(n, t, v) for n, rows in GOOD.items() for t, v in rows])
def test_a_value_is_read(name: str, text: str, value: Any) -> None:
    assert read_settings({variable(name): text}) == (replace(Settings(), **{name: value}), [])


@pytest.mark.parametrize(("name", "text"), [(n, t) for n, texts in BAD.items() for t in texts])
def test_a_wrong_value_leaves_the_default_and_is_named(name: str, text: str) -> None:
    settings, (problem,) = read_settings({variable(name): text})
    assert settings == Settings()
    for part in (f"{variable(name)}={text!a}", "is not", f"using {getattr(Settings(), name)!r}"):
        assert part in problem


@pytest.mark.parametrize("text", ["", "  ", "\t\n"])
@pytest.mark.parametrize("name", NAMES)
def test_an_empty_value_counts_as_not_set(name: str, text: str) -> None:
    assert read_settings({variable(name): text}) == (Settings(), [])


def test_the_process_environment_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_GDN_PLUGIN_STRICT", "1")
    monkeypatch.setenv("VLLM_GDN_PLUGIN_STRATEGY", "fused")
    assert read_settings() == (Settings(strict=True, strategy="fused"), [])


def test_describe_covers_every_setting_and_its_defaults_can_be_typed() -> None:
    assert [row[0] for row in describe()] == [f"VLLM_GDN_PLUGIN_{name.upper()}" for name in NAMES]
    assert all(text for *_, text in describe())
    assert read_settings({name: default for name, default, _ in describe()}) == (Settings(), [])


ANY_TEXT = st.text(st.characters(exclude_categories=())) | st.sampled_from([t for row in GOOD.values() for t, _ in row])


@given(st.dictionaries(st.sampled_from([*map(variable, NAMES), "VLLM_GDN_PLUGIN", "VLLM_GDN_PLUGIN_OTHER"]), ANY_TEXT))
def test_no_environment_raises_and_a_problem_means_the_default(environ: dict[str, str]) -> None:
    settings, problems = read_settings(environ)
    wrong = [name for name in NAMES if any(p.startswith(f"{variable(name)}=") for p in problems)]
    assert len(problems) == len(wrong), "one line for each variable that is wrong, and no other"
    assert all(problem.isascii() and problem.isprintable() for problem in problems), "whatever the log's encoding is"
    for name, value in asdict(settings).items():
        default = getattr(Settings(), name)
        assert type(value) is type(default)
        if name in wrong or not environ.get(variable(name), "").strip():
            assert value == default
