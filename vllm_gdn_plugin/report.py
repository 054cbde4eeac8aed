"""What the plugin says, once and in the process that speaks for the others, and how it steps aside."""

import hashlib
import logging
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from traceback import extract_tb
from typing import Any

import vllm_gdn_plugin
from vllm_gdn_plugin import host
from vllm_gdn_plugin.decide.plan import SERIAL
from vllm_gdn_plugin.settings import Settings


class Refused(RuntimeError):
    """The plugin steps aside; under VLLM_GDN_PLUGIN_STRICT=1 this stops the engine."""


class Ledger:
    """The strategies of this process's layers by name, and which layers are not yet loaded or reported."""

    def __init__(self) -> None:
        self.layers: dict[str, Callable[[], Any]] = {}
        """Weak references, by name."""
        self.strategies: dict[str, str] = {}
        self.paddings: dict[str, int] = {}
        """Outputs that a compiled graph has for nothing: how many depends on what else is done with a layer."""
        self.loading: set[str] = set()
        self.pending: set[str] = set()

    def construct(self, layer: Any) -> None:
        """A layer has been constructed, and is serial until it is planned.

        An engine has one layer of a name. So another engine begins in this process where the name is known, and what
        an earlier one has left, unfinished if it failed to load, is none of its business; nor are layers that are gone.
        """
        if layer.prefix in self.layers:
            self.__init__()  # type: ignore[misc]
        for name in [name for name, known in self.layers.items() if known() is None]:
            self.forget(name)
        self.layers[layer.prefix] = weakref.ref(layer)
        self.record(layer.prefix, SERIAL)

    def forget(self, layer_name: str) -> None:
        """A layer is gone, with the engine that it was a part of."""
        del self.layers[layer_name], self.strategies[layer_name], self.paddings[layer_name]
        self.loading.discard(layer_name)
        self.pending.discard(layer_name)

    def record(self, layer_name: str, strategy: str, padding: int = 0) -> None:
        """A layer has been planned. One that is not serial is finished once its weights are in place."""
        self.strategies[layer_name], self.paddings[layer_name] = strategy, padding
        self.pending.add(layer_name)
        if strategy == SERIAL:
            self.loading.discard(layer_name)
        else:
            self.loading.add(layer_name)

    def finish(self, layer_name: str, strategy: str) -> None:
        """A layer's weights are in place, and this is what it runs with."""
        self.strategies[layer_name] = strategy
        self.loading.discard(layer_name)

    def summary(self) -> str:
        """``dual_stream on 30 of 30 GDN layers``, once for an engine, when its last layer is finished; else empty."""
        if self.loading:
            return ""
        strategies = [self.strategies[name] for name in self.pending]
        self.pending = set()
        used = sorted({strategy for strategy in strategies if strategy != SERIAL})
        return ", ".join(f"{s} on {strategies.count(s)} of {len(strategies)} GDN layers" for s in used)

    def state(self) -> str:
        """Which layers run with what, and how wide: part of vLLM's compile-cache keys."""
        plans = sorted(
            (name, strategy, self.paddings[name]) for name, strategy in self.strategies.items() if strategy != SERIAL
        )
        if not plans:
            return "stock"
        used = "+".join(sorted({strategy for _, strategy, _ in plans}))
        return f"{used} {hashlib.sha256(repr(plans).encode()).hexdigest()[:16]}"


ledger = Ledger()

_said: set[str] = set()


@contextmanager
def stepping_aside(settings: Settings, speaks: Callable[[], bool]) -> Iterator[Callable[..., None]]:
    """Run a step of ours so that whatever goes wrong in it ends in one line, not in the host.

    Yields ``say(level, message, again=False)``, which logs each message once unless told to say it ``again``; of
    unexpected errors, one of a type from one place. ``speaks`` tells whether this process is the one that speaks for
    the others; where it cannot be asked, every process does.
    """

    def say(level: str, message: str, again: bool = False, kind: str = "") -> None:
        if (again or (kind or message) not in _said) and _answers_yes(speaks):
            _said.add(kind or message)
            _log(level, message)

    try:
        yield say
    except Exception as error:
        refused, place = isinstance(error, Refused), extract_tb(error.__traceback__)[-1]
        reason, kind = (str(error), "") if refused else (unexpected(error), f"{type(error).__name__} at {place}")
        if settings.strict:
            say("error", f"the engine stops, as VLLM_GDN_PLUGIN_STRICT=1 asks: {reason}", kind=kind)
            raise Refused(f"vllm-gdn-plugin: {reason} (VLLM_GDN_PLUGIN_STRICT=1)") from error
        say("warning", f"steps aside, vLLM runs as it is: {reason}", kind=kind)


def warn_once(what: str, reason: str) -> None:
    """Say what happened while the engine runs, and the first reason: once, however many calls of how many layers.

    VLLM_GDN_PLUGIN_STRICT=1 stops an engine that starts, never one that serves.
    """
    if what not in _said:
        _said.add(what)
        if _answers_yes(host.is_first_rank_of_stage):
            _log("warning", f"{what}: {reason}")


def unexpected(error: Exception) -> str:
    """An error that is not a refusal, in one line."""
    return f"unexpected {in_one_line(error)}"


def in_one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _log(level: str, message: str) -> None:
    getattr(_logger(), level)("vllm-gdn-plugin %s: %s", vllm_gdn_plugin.__version__, message)


def _answers_yes(speaks: Callable[[], bool]) -> bool:
    try:
        return speaks()
    except Exception:
        return True


def _logger() -> logging.Logger:
    try:
        return host.logger()
    except Exception:
        return logging.getLogger(host.LOGGER)
