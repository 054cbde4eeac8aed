"""What vLLM's entry point runs: decide, install, report. Stepping aside never disturbs the host."""

import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from types import ModuleType
from typing import Any

import vllm_gdn_plugin
from vllm_gdn_plugin import host
from vllm_gdn_plugin.contract import GDN_CLASSES, check_contract
from vllm_gdn_plugin.decision import decide
from vllm_gdn_plugin.overlap import share_no_scratch
from vllm_gdn_plugin.plan import FUSED, SERIAL, Plan, plan
from vllm_gdn_plugin.settings import Settings, read_settings, variable
from vllm_gdn_plugin.versions import judge_version


class Refused(RuntimeError):
    """The plugin steps aside; under VLLM_GDN_PLUGIN_STRICT=1 this stops the engine."""


def register() -> None:
    """Decide, install, report: vLLM calls this in every process, possibly twice.

    Raises nothing, unless ``VLLM_GDN_PLUGIN_STRICT=1`` turns stepping aside into :class:`Refused`.
    """
    settings, problems = read_settings()
    with stepping_aside(settings, speaks=multiprocessing.parent_process() is None) as say:
        verdict = judge_version(host.version(), settings.allow_untested)
        if not verdict.admitted:
            raise Refused(verdict.reason)
        for problem in problems:
            say("warning", problem)
        host.declare_variables(compile_factors(settings))
        host.when_imported(tuple(GDN_CLASSES), partial(install, settings))


def install(settings: Settings, module: ModuleType) -> None:
    """Replace the GDN class of ``module``, which the host has just imported, if every condition holds."""
    with stepping_aside(settings, speaks=host.is_first_rank()) as say:
        class_name = GDN_CLASSES[module.__name__]
        present = host.replacement_of(class_name)
        if getattr(present, "is_gdn_plugin", False):
            return
        platform = host.platform()
        decision = decide(
            settings,
            host.version(),
            contract=lambda: check_contract(host.package_directory()),
            platform=lambda: platform,
            holder=lambda name: present,
        )
        if decision.status == "refused" or (
            decision.status == "serial" and settings.strategy != SERIAL and settings.strict
        ):
            raise Refused(decision.reason)
        if decision.status == "serial":
            say("info", f"stock vLLM is left untouched: {decision.reason}")
            return
        from vllm_gdn_plugin.layer import make_layer_class

        host.replace(class_name, make_layer_class(getattr(module, class_name), partial(adopt, settings, platform)))


def adopt(settings: Settings, platform: str, layer: Any) -> None:
    """Plan a layer that vLLM has just constructed. A layer that cannot be planned stays serial."""
    layer.gdn_strategy = SERIAL
    with stepping_aside(settings, speaks=host.is_first_rank()):
        facts = host.layer_facts(layer, platform)
        chosen = plan(facts, settings.strategy)
        ledger.record(chosen)
        if chosen.strategy == SERIAL:
            raise Refused(chosen.reason)
        if chosen.strategy == FUSED:
            from vllm_gdn_plugin.fused import FusedProjections

            layer.gdn_fused = FusedProjections(layer.in_proj_qkvz, layer.in_proj_ba)
            layer.gdn_padding = layer.gdn_fused.padding
        layer.gdn_max_tokens = settings.max_tokens
        layer.gdn_safe_pair = share_no_scratch(facts.qkvz.linear_method, facts.ba.linear_method)
        layer.quant_method = host.after_loading(partial(loaded, settings, platform))
        layer.gdn_strategy = chosen.strategy


def loaded(settings: Settings, platform: str, layer: Any) -> None:
    """Finish a layer whose weights are in place, and with the first one say what was done in this engine.

    A loader may have replaced a parameter instead of writing into it: then the layer is not fused.
    """
    with stepping_aside(settings, speaks=host.is_first_rank()) as say:
        if layer.gdn_strategy == FUSED and not layer.gdn_fused.is_loaded():
            layer.gdn_strategy = SERIAL
            raise Refused("the loader replaced a weight that fused needs in place")
        summary = ledger.summary()
        if summary:
            say("info", f"{summary} (platform {platform}, vLLM {host.version()})")


class Ledger:
    """The plans of this process: what is not yet reported, and which strategies are in use."""

    def __init__(self) -> None:
        self.pending: list[Plan] = []
        self.in_use: set[str] = set()

    def record(self, chosen: Plan) -> None:
        self.pending.append(chosen)
        self.in_use.add(chosen.strategy)

    def summary(self) -> str:
        """``dual_stream on 30 of 30 GDN layers`` for the layers planned since the last call; empty if none."""
        plans, self.pending = self.pending, []
        counts = {s: sum(p.strategy == s for p in plans) for s in sorted({p.strategy for p in plans})}
        return ", ".join(f"{s} on {n} of {len(plans)} GDN layers" for s, n in counts.items() if s != SERIAL)

    def state(self) -> str:
        return "+".join(sorted(self.in_use)) or "stock"


ledger = Ledger()


def compile_factors(settings: Settings) -> dict[str, Callable[[], Any]]:
    """What must be part of vLLM's compile-cache keys: the plugin's version, its state and every setting."""
    factors: dict[str, Callable[[], Any]] = {
        variable(name): partial(_constant, value) for name, value in asdict(settings).items()
    }
    factors["VLLM_GDN_PLUGIN"] = lambda: f"{vllm_gdn_plugin.__version__} {ledger.state()}"
    return factors


def _constant(value: Any) -> Any:
    return value


_said: set[str] = set()


@contextmanager
def stepping_aside(settings: Settings, speaks: bool) -> Iterator[Callable[[str, str], None]]:
    """Run a step of ours so that whatever goes wrong in it ends in one line, not in the host.

    Yields ``say(level, message)``, which logs each message once, in the process that speaks for the others.
    """

    def say(level: str, message: str) -> None:
        if speaks and message not in _said:
            _said.add(message)
            getattr(host.logger(), level)("vllm-gdn-plugin %s: %s", vllm_gdn_plugin.__version__, message)

    try:
        yield say
    except Exception as error:
        reason = str(error) if isinstance(error, Refused) else f"unexpected {type(error).__name__}: {error}"
        if settings.strict:
            say("error", f"the engine stops, as VLLM_GDN_PLUGIN_STRICT=1 asks: {reason}")
            raise Refused(f"vllm-gdn-plugin: {reason} (VLLM_GDN_PLUGIN_STRICT=1)") from error
        say("warning", f"steps aside, vLLM runs as it is: {reason}")
