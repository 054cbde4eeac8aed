"""Whether the plugin takes part at all: one function, the same for ``register()`` and for ``check``."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from vllm_gdn_plugin.contract import Contract
from vllm_gdn_plugin.plan import SERIAL, platform_plan
from vllm_gdn_plugin.settings import Settings
from vllm_gdn_plugin.versions import judge_version

Status = Literal["active", "serial", "refused", "disabled", "unknown"]


@dataclass(frozen=True)
class Decision:
    """The outcome: ``active`` (the layer is replaced), ``serial`` (nothing to gain or serial asked for) or
    ``refused`` (the plugin cannot be sure); in the last two vLLM's class stays untouched."""

    status: Status
    strategy: str
    reason: str


def decide(
    settings: Settings,
    vllm_version: str,
    contract: Callable[[], Contract],
    platform: Callable[[], str],
    holder: Callable[[str], Any] = lambda class_name: None,
) -> Decision:
    """Version, contract, a free place, platform: the first that does not hold decides.

    Args:
        vllm_version: ``vllm.__version__``.
        contract: checks the host's source; only called where the version is admitted.
        platform: names the host's platform; only called where the contract holds.
        holder: the class another plugin has registered in place of the host's, or None.
    """
    verdict = judge_version(vllm_version, settings.allow_untested)
    if not verdict.admitted:
        return Decision("refused", SERIAL, verdict.reason)
    found = contract()
    if not found.holds:
        return Decision("refused", SERIAL, found.reason)
    other = holder(found.class_name or "")
    if other is not None:
        name = f"{other.__module__}.{other.__qualname__}"
        return Decision(
            "refused",
            SERIAL,
            f"{name} already replaces {found.class_name}: vLLM allows one replacement;"
            " leave one of the two plugins out of VLLM_PLUGINS",
        )
    chosen = platform_plan(platform(), settings.strategy)
    return Decision("serial" if chosen.strategy == SERIAL else "active", chosen.strategy, chosen.reason)
