"""What the plugin says, once and in the process that speaks for the others, and how it steps aside."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import vllm_gdn_plugin
from vllm_gdn_plugin import host
from vllm_gdn_plugin.plan import SERIAL, Plan
from vllm_gdn_plugin.settings import Settings


class Refused(RuntimeError):
    """The plugin steps aside; under VLLM_GDN_PLUGIN_STRICT=1 this stops the engine."""


class Ledger:
    """The plans of this process by layer name, and which of them are not yet reported."""

    def __init__(self) -> None:
        self.plans: dict[str, Plan] = {}
        self.pending: set[str] = set()

    def record(self, layer_name: str, chosen: Plan) -> None:
        self.plans[layer_name] = chosen
        self.pending.add(layer_name)

    def summary(self) -> str:
        """``dual_stream on 30 of 30 GDN layers`` for the layers recorded since the last call; empty if none."""
        strategies = [self.plans[name].strategy for name in self.pending]
        self.pending = set()
        used = sorted({strategy for strategy in strategies if strategy != SERIAL})
        return ", ".join(f"{s} on {strategies.count(s)} of {len(strategies)} GDN layers" for s in used)

    def state(self) -> str:
        """Which strategies are in use: part of vLLM's compile-cache keys."""
        return "+".join(sorted({chosen.strategy for chosen in self.plans.values()})) or "stock"


ledger = Ledger()

_said: set[str] = set()


@contextmanager
def stepping_aside(settings: Settings, speaks: Callable[[], bool]) -> Iterator[Callable[[str, str], None]]:
    """Run a step of ours so that whatever goes wrong in it ends in one line, not in the host.

    Yields ``say(level, message)``, which logs each message once. ``speaks`` tells whether this process is the one
    that speaks for the others; where it cannot be asked, every process does.
    """

    def say(level: str, message: str) -> None:
        if message not in _said and _answers_yes(speaks):
            _said.add(message)
            getattr(_logger(), level)("vllm-gdn-plugin %s: %s", vllm_gdn_plugin.__version__, message)

    try:
        yield say
    except Exception as error:
        reason = str(error) if isinstance(error, Refused) else f"unexpected {type(error).__name__}: {error}"
        if settings.strict:
            say("error", f"the engine stops, as VLLM_GDN_PLUGIN_STRICT=1 asks: {reason}")
            raise Refused(f"vllm-gdn-plugin: {reason} (VLLM_GDN_PLUGIN_STRICT=1)") from error
        say("warning", f"steps aside, vLLM runs as it is: {reason}")


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
