"""Says beforehand what the plugin will do here, with the very decision that ``register()`` takes."""

import importlib
import json
import os
import sys
import zipfile
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

import vllm_gdn_plugin
from vllm_gdn_plugin.decide.checkpoint import (
    NOT_LOOKED_AT,
    EngineFlags,
    LayerGroup,
    ModelFacts,
    Undecidable,
    Unreadable,
    group,
    unquantised_facts,
)
from vllm_gdn_plugin.decide.contract import Contract, check_contract
from vllm_gdn_plugin.decide.decision import Decision, Status, decide, held_by, refusal
from vllm_gdn_plugin.decide.decode import DecodeFacts, why_no_kernel
from vllm_gdn_plugin.decide.decode_contract import why_no_decode_kernel
from vllm_gdn_plugin.decide.plan import AUTO, DUAL_STREAM, SERIAL, platform_plan
from vllm_gdn_plugin.host import facts, imports
from vllm_gdn_plugin.host.model_files import find_directory, load_config, quantised_by
from vllm_gdn_plugin.host.plugins import GROUP, NAME, PLUGINS, plugin_names
from vllm_gdn_plugin.report import in_one_line
from vllm_gdn_plugin.settings import Settings, read_settings
from vllm_gdn_plugin.versions import SUPPORTED_RANGE, judge_version

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable


EXIT_ACTIVE, EXIT_ASIDE, EXIT_UNKNOWN = 0, 1, 2


class CannotTell(Exception):
    """The question cannot be answered: vLLM is missing or broken, or a path is not what it should be."""


@dataclass(frozen=True)
class Report:
    """What ``check`` found. ``--json`` prints exactly these fields."""

    status: Status
    reason: str
    strategy: str
    what_to_do: str = ""
    decode_kernel: str | None = None
    """That it may run, or :data:`OFF` and why; None where the plugin takes no part."""
    plugin_version: str = vllm_gdn_plugin.__version__
    supported_range: str = SUPPORTED_RANGE
    vllm_version: str | None = None
    torch_version: str | None = None
    platform: str | None = None
    device: str | None = None
    contract: str | None = None
    entry_point: str | None = None
    vllm_plugins: str | None = None
    model: list[str] = field(default_factory=list)
    """With ``--model``: one line for each group of layers that are alike."""
    engine: str | None = None
    """With ``--model``: the flags of the engine that the plan is for, and those that are not looked at."""
    warnings: list[str] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        return {"active": EXIT_ACTIVE, "unknown": EXIT_UNKNOWN}.get(self.status, EXIT_ASIDE)

    def required(self, strategy: str) -> "Report":
        """This report, turned into a refusal unless ``strategy`` is what will be used."""
        if self.strategy == strategy and self.status in ("active", "serial"):
            return replace(self, status="active")
        if self.status == "unknown":
            return self
        if self.status not in ("active", "serial"):
            reason = f"{strategy} is required: {self.reason}"
        elif self.strategy == AUTO:
            reason = f"{strategy} is required, and auto decides layer by layer: name the model with --model"
        else:
            reason = f"{strategy} is required but the strategy will be {self.strategy}: {self.reason}"
        return replace(self, status=self.status if self.status != "active" else "refused", reason=reason, what_to_do="")

    def as_json(self) -> str:
        return json.dumps(asdict(self), indent=2)

    def as_text(self) -> str:
        lists = ("model", "warnings")
        rows = [(name.replace("_", " "), value) for name, value in asdict(self).items() if value and name not in lists]
        rows += [("model", line) for line in self.model]
        rows += [("warning", warning) for warning in self.warnings]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


ADVICE: dict[Status, str] = {
    "active": "nothing: start vllm serve as usual",
    "serial": "nothing: there is no gain to be had here, and no harm in leaving the plugin installed",
    "refused": "nothing has to be done: vLLM runs as without the plugin; the reason says what would change that",
    "disabled": "add vllm_gdn_plugin to VLLM_PLUGINS, or unset it",
    "unknown": "install vLLM, or repair it, in the environment of this command",
}


STRICT_ADVICE = "unset VLLM_GDN_PLUGIN_STRICT: with it the engine will stop here"

OFF = "off: "
MAY_RUN = "may run: it proves itself when the engine starts"
MAY_RUN_FROM = "may run with vLLM 0.28 and later: it proves itself when the engine starts"


def check_here() -> Report:
    """What will happen in this environment when vLLM starts. Imports vLLM, and asks it for its platform."""
    settings, warnings = read_settings()
    try:
        with redirect_stdout(sys.stderr):  # the report alone belongs on stdout, whatever an import prints
            found, package = imports.version(), imports.package_directory()
    except (Exception, SystemExit) as error:
        reason = f"vLLM cannot be imported: {in_one_line(error)}"
        return Report("unknown", reason, SERIAL, ADVICE["unknown"], warnings=warnings)
    contract = check_contract(package)
    platform, device = _platform(settings, found, contract)
    decision = decide(settings, found, contract, platform or "unknown")
    if decision.status != "refused" and platform is None:
        decision = Decision("unknown", SERIAL, f"vLLM cannot tell its platform: {device}")
    decision, plugins, entry_point = _seen_by_vllm(decision, warnings)
    advice = ADVICE[decision.status]
    if settings.strict and decision.status in ("serial", "refused") and settings.strategy != SERIAL:
        advice = STRICT_ADVICE
    report = Report(
        decision.status,
        decision.reason,
        decision.strategy,
        advice,
        _decode_kernel(settings, platform, package) if decision.status in ("active", "serial") and platform else None,
        vllm_version=found,
        torch_version=_torch_version(),
        platform=platform,
        device=device if platform else None,
        contract=contract.reason,
        entry_point=entry_point,
        vllm_plugins=plugins,
        warnings=warnings,
    )
    return _if_asked_in_vain(report, settings)


def _decode_kernel(settings: Settings, platform: str, package: "Traversable | None") -> str:
    """Whether the decode kernel may run with these settings and with vLLM's sources, where these are known."""
    why_not = why_no_kernel(DecodeFacts(platform), settings.decode_kernel, settings.strategy)
    if package is not None:
        why_not = why_not or why_no_decode_kernel(package)
    return f"{OFF}{why_not}" if why_not else MAY_RUN if package is not None else MAY_RUN_FROM


def _if_asked_in_vain(report: Report, settings: Settings) -> Report:
    """A strict engine stops where the decode kernel was asked for and is off; one that asked for it alone is stock."""
    told = report.decode_kernel or ""
    if report.status != "active" or settings.decode_kernel != "1" or not told.startswith(OFF):
        return report
    reason = f"no decode kernel: {told.removeprefix(OFF)}"
    if settings.strict:
        return replace(report, status="refused", strategy=SERIAL, reason=reason, what_to_do=STRICT_ADVICE)
    if report.strategy == SERIAL:
        return replace(report, status="serial", reason=reason, what_to_do=ADVICE["serial"])
    return report


def with_model(report: Report, model: str, revision: str | None = None, flags: EngineFlags | None = None) -> Report:
    """The report with the plan for the layers of a model: a local directory, its config.json, or a Hub id.

    Where vLLM can be asked, it says what it builds; elsewhere only a model without quantisation can be told. Where this
    machine cannot say its platform (vLLM is not installed), the plan is for CUDA, and a warning says so.

    Raises:
        CannotTell: the model cannot be read, has no GDN layers, or it matters what vLLM builds and that is not known.
    """
    flags = flags or EngineFlags()
    settings, _ = read_settings()
    warnings = list(report.warnings)
    if report.platform is None:
        warnings.append("the platform is not known here: the plan for the model is the one for CUDA")
    engine = f"{flags}; not looked at, though they can change the plan: {', '.join(NOT_LOOKED_AT)}"
    report = replace(report, engine=engine, warnings=warnings)
    try:
        found = _model_facts(report, model, revision, flags)
    except Unreadable as error:
        raise CannotTell(f"--model {model}: {error}") from None
    except Undecidable as error:
        if report.status == "active":
            raise CannotTell(f"--model {model}: {error}") from None
        warnings.append(f"the plan for the model cannot be told: {error}")
        return report
    if found.holder and report.status == "active":
        advice = STRICT_ADVICE if settings.strict else ADVICE["refused"]
        return replace(report, status="refused", strategy=SERIAL, reason=held_by(found.holder), what_to_do=advice)
    groups = group(found.shape.hidden_size, found.layers, settings.strategy)
    kernel = _decode_kernel_of(found, report, settings, flags)
    lines = [f"{alike}{_timed(alike, report, settings)}" for alike in groups]
    if kernel:
        lines = [f"{line}; decode kernel {kernel}" for line in lines]
    report = _if_asked_in_vain(replace(report, model=lines, decode_kernel=kernel), settings)
    if report.status != "active":
        return report
    strategies = sorted({alike.plan.strategy for alike in groups})
    if SERIAL in strategies and (kernel or OFF).startswith(OFF):
        reason = next(alike.plan.reason for alike in groups if alike.plan.strategy == SERIAL)
        if settings.strict and settings.strategy != SERIAL:
            return replace(report, status="refused", strategy=SERIAL, reason=reason, what_to_do=STRICT_ADVICE)
        if strategies == [SERIAL]:
            return replace(report, status="serial", strategy=SERIAL, reason=reason, what_to_do=ADVICE["serial"])
    what = "the decode kernel alone, " if strategies == [SERIAL] else ""
    return replace(report, strategy="+".join(strategies), reason=f"{what}by the model's configuration, for {flags}")


def _model_facts(report: Report, model: str, revision: str | None, flags: EngineFlags) -> ModelFacts:
    directory = find_directory(model, revision)
    config = load_config(directory)  # where vLLM reads it itself, too: these errors are plainer
    if report.platform is None:
        batch_invariant = os.environ.get("VLLM_BATCH_INVARIANT", "0") not in ("", "0")
        return unquantised_facts(config, quantised_by(directory), flags, "cuda", batch_invariant)
    decode = report.decode_kernel == MAY_RUN
    with redirect_stdout(sys.stderr):
        from vllm_gdn_plugin.host.model import model_facts

        return model_facts(model, directory, revision, flags, report.platform, decode)


def _decode_kernel_of(found: ModelFacts, report: Report, settings: Settings, flags: EngineFlags) -> str | None:
    """The same for a model, with what earlier starts on this GPU have chosen."""
    may_run = report.decode_kernel
    if found.decode is None or may_run not in (MAY_RUN, MAY_RUN_FROM):
        return may_run
    why_not = why_no_kernel(found.decode, settings.decode_kernel, settings.strategy)
    if why_not:
        return f"{OFF}{why_not}"
    if settings.decode_kernel == "1" or not settings.tune or report.platform is None:
        return may_run
    from vllm_gdn_plugin.run.timing import kept_decode_ways_of

    qkv, heads = (size // flags.tensor_parallel_size for size in (sum(found.shape.qkvz[:3]), found.shape.value_heads))
    chosen = kept_decode_ways_of(found.decode, heads, qkv, report.device or "")
    return f"may run: {chosen} (timed at an earlier start)" if chosen else f"{may_run}, and is timed on this GPU"


def _timed(group: LayerGroup, report: Report, settings: Settings) -> str:
    """What ``auto`` chooses for dual_stream by the times of this GPU, if it was started here before."""
    if settings.strategy != AUTO or not settings.tune or report.platform != "cuda":
        return ""
    if group.plan.strategy != DUAL_STREAM:
        return ""
    from vllm_gdn_plugin.run.timing import kept_ways_of

    chosen = kept_ways_of(group.facts, group.hidden_size, report.device or "")
    if chosen:
        return f"; in CUDA graphs {chosen} (timed at an earlier start)"
    return "; in CUDA graphs dual_stream or serial, as timed on this GPU when the engine starts"


def check_elsewhere(vllm_version: str | None, vllm_source: str | None) -> Report:
    """The verdict on a version, on the sources of a release, or on both; neither needs vLLM installed.

    Raises:
        CannotTell: ``vllm_source`` is neither a source tree of vLLM nor its wheel.
    """
    settings, warnings = read_settings()
    verdict = judge_version(vllm_version, settings.allow_untested) if vllm_version is not None else None
    package = open_source(vllm_source) if vllm_source is not None else None
    contract = check_contract(package) if package is not None else None
    refused = refusal(verdict, contract)
    holds = refused is None
    reason = refused or "; ".join(part.reason for part in (verdict, contract) if part is not None)
    kernel = _decode_kernel(settings, "cuda", package) if holds else None
    chosen = platform_plan("cuda", settings.strategy)
    if holds and chosen.strategy == SERIAL and settings.decode_kernel != "1":
        return Report(
            "serial", chosen.reason, SERIAL, ADVICE["serial"], kernel, vllm_version=vllm_version, warnings=warnings
        )
    report = Report(
        "active" if holds else "refused",
        reason,
        chosen.strategy if holds else SERIAL,
        "run check where vLLM is installed for the whole answer" if holds else ADVICE["refused"],
        kernel,
        vllm_version=vllm_version,
        contract=contract.reason if contract else None,
        warnings=warnings,
    )
    return _if_asked_in_vain(report, settings)


def open_source(path: str) -> "Traversable":
    """The package directory ``vllm`` in a source tree, in a site directory, or in a wheel."""
    root: Any = Path(path)
    if not path:
        raise CannotTell("--vllm-source is empty")
    try:
        if root.is_file():
            root = zipfile.Path(root)
        elif not root.is_dir():
            raise CannotTell(f"there is no {path}")
    except zipfile.BadZipFile:
        raise CannotTell(f"{path} is a file but not a wheel") from None
    except OSError as error:
        raise CannotTell(f"{path[:80]} cannot be read: {error.strerror}") from None
    for candidate in (root / "vllm", root):
        if (candidate / "envs.py").is_file():
            return candidate  # type: ignore[no-any-return]
    raise CannotTell(f"{path} holds no vLLM: there is no vllm/envs.py in it")


def _platform(settings: Settings, found: str, contract: Contract) -> tuple[str | None, str]:
    """(platform, device name), or (None, what went wrong). Not asked where the answer cannot matter."""
    if not contract.holds or not judge_version(found, settings.allow_untested).admitted:
        return None, "not asked"
    try:
        with redirect_stdout(sys.stderr):
            name = facts.platform()
    except (Exception, SystemExit) as error:
        return None, in_one_line(error)
    try:
        return name, facts.gpu()
    except Exception as error:
        return name, f"not known: {in_one_line(error)}"


def _torch_version() -> str | None:
    try:
        return str(importlib.import_module("torch").__version__)
    except Exception:
        return None


def _seen_by_vllm(decision: Decision, warnings: list[str]) -> tuple[Decision, str, str | None]:
    """Whether vLLM will load the plugin at all: its entry point, and what VLLM_PLUGINS says of it."""
    points = entry_points(group=GROUP).select(name=NAME)
    entry_point = ", ".join(sorted(f"{p.name} = {p.value}" for p in points)) or None
    chosen = os.environ.get(PLUGINS)
    shown = "not set: every plugin is loaded" if chosen is None else repr(chosen)
    if chosen is not None:
        known = plugin_names()
        for name in chosen.split(","):
            if name and name not in known:
                warnings.append(f"VLLM_PLUGINS names {name!r}, and no such plugin is installed: vLLM does not say so")
    if decision.status == "unknown":
        return decision, shown, entry_point
    if entry_point is None:
        reason = f"vLLM does not see the plugin: no entry point {NAME} in {GROUP}; install the wheel in its environment"
        return Decision("disabled", SERIAL, reason), shown, entry_point
    if chosen is not None and NAME not in chosen.split(","):
        return Decision("disabled", SERIAL, f"VLLM_PLUGINS={chosen!r} leaves {NAME} out"), shown, entry_point
    return decision, shown, entry_point
