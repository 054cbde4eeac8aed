"""What the plugin says, once and in the process that speaks for the others, and how it steps aside."""

import hashlib
import logging
import weakref
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from traceback import extract_tb
from typing import Any

import vllm_gdn_plugin
from vllm_gdn_plugin.decide.decode import DecodeFacts
from vllm_gdn_plugin.decide.plan import SERIAL, LayerFacts
from vllm_gdn_plugin.host import process
from vllm_gdn_plugin.settings import Settings


class Refused(RuntimeError):
    """The plugin steps aside; under VLLM_GDN_PLUGIN_STRICT=1 this stops the engine."""


DECODE_KERNEL = "decode kernel"


@dataclass
class Record:
    """What is known of one layer of this process."""

    layer: Callable[[], Any]
    """A weak reference: an engine that failed to load must not be kept in memory."""
    facts: LayerFacts | None = None
    sizes: tuple[int, ...] = ()
    """Captured numbers of tokens that are to be timed."""
    strategy: str = SERIAL
    rows: int = 0
    """Of the weight of a fused layer."""
    decode_facts: DecodeFacts | None = None
    no_kernel: str | None = None
    """Why it has no decode kernel; None while it may have one."""
    decodes: bool = False
    """It has the decode kernel."""
    loading: bool = False
    """Its weights are still to come."""
    told: bool = False

    @property
    def runs(self) -> str:
        """What of ours runs in it; empty where it runs as in stock vLLM."""
        strategy = "" if self.strategy == SERIAL else self.strategy
        return " + ".join(filter(None, [strategy, DECODE_KERNEL if self.decodes else ""]))


class Ledger:
    """The layers of this process by name, what each runs with, and which are not yet loaded or reported."""

    def __init__(self) -> None:
        self.records: dict[str, Record] = {}

    def construct(self, layer: Any) -> Record:
        """A layer has been constructed, and is serial until it is planned.

        An engine has one layer of a name. So another engine begins in this process where the name is known, and what
        an earlier one has left, unfinished if it failed to load, is none of its business; nor are layers that are gone.
        """
        known = {} if layer.prefix in self.records else self.records
        self.records = {name: record for name, record in known.items() if record.layer() is not None}
        record = self.records[layer.prefix] = Record(weakref.ref(layer))
        return record

    @property
    def loading(self) -> bool:
        """Whether weights of some layer are still to come."""
        return any(record.loading for record in self.records.values())

    def news(self) -> list[Record]:
        """The layers of which nothing was told yet, once: those of an engine, or of a draft model beside it."""
        news = [record for record in self.records.values() if not record.told]
        for record in news:
            record.told = True
        return news

    def state(self) -> str:
        """Which layers run with what: part of vLLM's compile-cache keys."""
        plans = sorted((name, record.runs, record.rows) for name, record in self.records.items() if record.runs)
        if not plans:
            return "stock"
        used = "+".join(sorted({runs for _, runs, _ in plans}))
        return f"{used} {hashlib.sha256(repr(plans).encode()).hexdigest()[:16]}"


ledger = Ledger()


def summarised(records: Collection[Record]) -> str:
    """``fused + decode kernel on 30 of 30 GDN layers``; empty where all run as in stock vLLM."""
    each = [record.runs for record in records]
    return ", ".join(f"{runs} on {each.count(runs)} of {len(each)} GDN layers" for runs in sorted(set(each)) if runs)


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
        if _answers_yes(process.is_first_rank_of_stage):
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
        return process.logger()
    except Exception:
        return logging.getLogger(process.LOGGER)
