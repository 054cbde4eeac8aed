"""The plugin's settings: environment variables, each defined once and validated here."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from vllm_gdn_plugin.decide.plan import REQUESTS

PREFIX = "VLLM_GDN_PLUGIN_"


def _strategy(text: str) -> str:
    if text.lower() in REQUESTS:
        return text.lower()
    raise ValueError("one of " + ", ".join(REQUESTS))


def _switch(text: str) -> bool:
    value = {
        "1": True,
        "true": True,
        "yes": True,
        "on": True,
        "0": False,
        "false": False,
        "no": False,
        "off": False,
    }
    if text.lower() in value:
        return value[text.lower()]
    raise ValueError("1 or 0")


def _auto_or_switch(text: str) -> str:
    if text.lower() == "auto":
        return "auto"
    try:
        return str(int(_switch(text)))
    except ValueError:
        raise ValueError("auto, 1 or 0") from None


def _setting(default: Any, parse: Callable[[str], Any], help: str) -> Any:
    return field(default=default, metadata={"parse": parse, "help": help})


@dataclass(frozen=True)
class Settings:
    """What the operator asked for. Field ``name`` is read from ``VLLM_GDN_PLUGIN_<NAME>``."""

    strategy: str = _setting(
        "auto",
        _strategy,
        "How the two matrix products run. auto: the fastest way that is safe for a layer. fused, dual_stream: that one."
        " serial: as in vLLM.",
    )
    decode_kernel: str = _setting(
        "auto",
        _auto_or_switch,
        "One kernel for a layer's decode. auto: where it is right and timed faster. 1: wherever it is right. 0: never.",
    )
    tune: bool = _setting(
        True,
        _switch,
        "1: the first start on a GPU times what auto may choose from. 0: rules alone decide.",
    )
    allow_untested: bool = _setting(False, _switch, "1: try a vLLM newer than the supported range.")
    strict: bool = _setting(False, _switch, "1: stop the engine instead of stepping aside.")


def variable(name: str) -> str:
    """The environment variable of the setting ``name``."""
    return PREFIX + name.upper()


def describe() -> list[tuple[str, str, str]]:
    """(variable, default, help) of every setting, for ``--help`` and the README."""
    return [
        (
            variable(f.name),
            str(int(f.default) if isinstance(f.default, bool) else f.default),
            f.metadata["help"],
        )
        for f in fields(Settings)
    ]


def read_settings(environ: Mapping[str, str] | None = None) -> tuple[Settings, list[str]]:
    """Settings from the environment, and one line for each value that could not be used.

    A wrong value leaves the default in force; an empty one counts as not set. Never raises.
    """
    environ = os.environ if environ is None else environ
    values: dict[str, Any] = {}
    problems: list[str] = []
    for f in fields(Settings):
        text = environ.get(variable(f.name), "").strip()
        if not text:
            continue
        try:
            values[f.name] = f.metadata["parse"](text)
        except ValueError as expected:
            problems.append(f"{variable(f.name)}={text!a} is not {expected}; using {f.default!r}")
    return Settings(**values), problems
