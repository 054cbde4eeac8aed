"""Whether the plugin takes part at all: one function, the same for ``register()`` and for ``check``."""

from dataclasses import dataclass
from typing import Literal

from vllm_gdn_plugin.decide.contract import Contract
from vllm_gdn_plugin.decide.plan import SERIAL, platform_plan
from vllm_gdn_plugin.settings import Settings
from vllm_gdn_plugin.versions import VersionVerdict, judge_version

Status = Literal["active", "serial", "refused", "disabled", "unknown"]


@dataclass(frozen=True)
class Decision:
    """The outcome: ``active`` (the layer is replaced), ``serial`` (nothing to gain or serial asked for) or
    ``refused`` (the plugin cannot be sure); in the last two vLLM's class stays untouched."""

    status: Status
    strategy: str
    reason: str


def refusal(verdict: VersionVerdict | None, contract: Contract | None) -> str | None:
    """What happened and what to do, where the version or the contract does not hold; None where both do.

    Either may be unknown (None). To allow an untested version is only advised where the contract may hold.
    """
    if contract is None or contract.holds or (verdict is not None and verdict.standing == "older"):
        return None if verdict is None or verdict.admitted else verdict.reason
    if verdict is None or verdict.standing == "supported":
        return contract.reason
    return f"{verdict.what}; {contract.reason}"


def decide(
    settings: Settings,
    vllm_version: str,
    contract: Contract,
    platform: str,
) -> Decision:
    """Version, contract, platform: the first that does not hold decides.

    Args:
        vllm_version: ``vllm.__version__``.
        contract: what the check of the host's source found.
        platform: the host's.
    """
    verdict = judge_version(vllm_version, settings.allow_untested)
    why = refusal(verdict, contract)
    if why is not None:
        return Decision("refused", SERIAL, why)
    chosen = platform_plan(platform, settings.strategy)
    if settings.strategy == SERIAL and settings.decode_kernel == "1" and platform == "cuda":
        return Decision("active", SERIAL, "VLLM_GDN_PLUGIN_DECODE_KERNEL=1 asks for the decode kernel alone")
    return Decision("serial" if chosen.strategy == SERIAL else "active", chosen.strategy, chosen.reason)


def held_by(holder: str) -> str:
    """Why the plugin steps aside where another plugin's class ``holder`` replaces the layer, and what to do."""
    return (
        f"{holder} of another plugin replaces the GDN layer, and vLLM allows one replacement;"
        " to use this plugin, leave the other one out of VLLM_PLUGINS"
    )
