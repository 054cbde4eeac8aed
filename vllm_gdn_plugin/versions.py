"""Which vLLM releases the plugin supports, and the verdict on the one that was found."""

from dataclasses import dataclass
from typing import Literal

from packaging.version import InvalidVersion, Version

OLDEST = "0.20.0"
"""The oldest supported release."""

NEWEST_SERIES = "0.33"
"""The newest supported series: every 0.33.x, and what is built from it."""

_major, _minor = NEWEST_SERIES.split(".")
SUPPORTED_RANGE = f">={OLDEST},<{_major}.{int(_minor) + 1}"
"""The range as pip would write it, for messages and tables."""

_NEXT_SERIES = Version(f"{_major}.{int(_minor) + 1}.dev0")

Standing = Literal["supported", "older", "newer", "unknown"]


@dataclass(frozen=True)
class VersionVerdict:
    """Where a version stands, and whether the plugin may go on to the contract."""

    standing: Standing
    admitted: bool
    what: str
    """Where the version stands, in words."""
    advice: str = ""
    """What to do where the version is not admitted."""

    @property
    def reason(self) -> str:
        return f"{self.what}; {self.advice}" if self.advice else self.what


def judge_version(found: str, allow_untested: bool = False) -> VersionVerdict:
    """Judge a value of ``vllm.__version__`` by what it is.

    A local part (``0.33.0+cu130``) is ignored. A development build or release candidate counts as what precedes
    its release: ``0.33.1.dev5`` follows 0.33.0 and is supported, ``0.20.0rc1`` precedes 0.20.0 and is older,
    ``0.34.0.dev1`` already belongs to the 0.34 series and is newer. ``allow_untested`` admits a newer or an
    unreadable version (``dev``), never an older one: the contract is still checked afterwards.
    """
    standing = _standing(found)
    if standing == "supported":
        return VersionVerdict(standing, True, f"vLLM {found} is in the supported range {SUPPORTED_RANGE}")
    what = {
        "older": "is older than",
        "newer": "is newer than",
        "unknown": "cannot be compared with",
    }[standing]
    what = f"vLLM {found} {what} the supported range {SUPPORTED_RANGE}"
    if standing == "older":
        return VersionVerdict(standing, False, what, "upgrade vLLM to use the plugin")
    if allow_untested:
        return VersionVerdict(standing, True, f"{what}; admitted by VLLM_GDN_PLUGIN_ALLOW_UNTESTED=1")
    advice = "upgrade vllm-gdn-plugin, or set VLLM_GDN_PLUGIN_ALLOW_UNTESTED=1 to try it all the same"
    return VersionVerdict(standing, False, what, advice)


def _standing(found: str) -> Standing:
    try:
        version = Version(found)
    except InvalidVersion:
        return "unknown"
    if version < Version(OLDEST):
        return "older"
    if version >= _NEXT_SERIES:
        return "newer"
    return "supported"
