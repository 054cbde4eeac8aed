"""What vLLM's entry point runs: decide, install, report. Stepping aside never disturbs the host."""

import multiprocessing
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from types import ModuleType
from typing import Any

import vllm_gdn_plugin
from vllm_gdn_plugin import host
from vllm_gdn_plugin.decide.contract import GDN_CLASSES, check_contract, layer_module
from vllm_gdn_plugin.decide.decision import decide, refusal
from vllm_gdn_plugin.decide.plan import AUTO, FUSED, SERIAL, plan
from vllm_gdn_plugin.decide.scratch import share_no_scratch
from vllm_gdn_plugin.report import Refused, ledger, stepping_aside
from vllm_gdn_plugin.settings import Settings, read_settings, variable
from vllm_gdn_plugin.tune.times import tuner
from vllm_gdn_plugin.versions import judge_version


def register() -> None:
    """Decide, install, report: vLLM calls this in every process, possibly twice.

    Raises nothing, unless ``VLLM_GDN_PLUGIN_STRICT=1`` turns stepping aside into :class:`Refused`.
    """
    settings, problems = read_settings()
    with stepping_aside(settings, speaks=lambda: multiprocessing.parent_process() is None) as say:
        package = host.package_directory()
        verdict = judge_version(host.version(), settings.allow_untested)
        if not verdict.admitted or layer_module(package) is None:  # no import of the layer to wait for
            raise Refused(refusal(verdict, check_contract(package)))
        for problem in problems:
            say("warning", problem)
        factors = compile_factors(settings)
        try:
            host.declare_variables(factors)
            host.when_imported(tuple(GDN_CLASSES), partial(install, settings))
        except BaseException:
            host.stop_watching()
            host.withdraw(factors, GDN_CLASSES.values())
            raise


def install(settings: Settings, module: ModuleType) -> bool:
    """Replace the GDN class of ``module``, which the host has just imported, if every condition holds.

    Answers False where the layer is in another module, which is still to come. Whatever fails, the host is left as
    it was before :func:`register`.
    """
    with stepping_aside(settings, speaks=host.is_first_rank) as say:
        class_name = GDN_CLASSES[module.__name__]
        try:
            return _install(settings, module, class_name, say)
        except BaseException:
            host.withdraw(compile_factors(settings), [class_name])
            raise
    return True


def _install(settings: Settings, module: ModuleType, class_name: str, say: Callable[..., None]) -> bool:
    present = host.replacement_of(class_name)
    if getattr(present, "is_gdn_plugin", False):
        return True
    contract = check_contract(host.package_directory())
    if contract.module not in (None, module.__name__):
        return False
    platform = host.platform()
    decision = decide(settings, host.version(), contract, lambda: platform, holder=lambda name: present)
    unwanted = decision.status == "serial" and settings.strategy != SERIAL
    if decision.status == "refused" or (unwanted and settings.strict):
        raise Refused(decision.reason)
    if decision.status == "serial":
        say("info", f"stock vLLM is left untouched: {decision.reason}")
        return True
    from vllm_gdn_plugin.run.layer import make_layer_class

    host.replace(class_name, make_layer_class(getattr(module, class_name), partial(adopt, settings, platform)))
    return True


def adopt(settings: Settings, platform: str, layer: Any) -> None:
    """Plan a layer that vLLM has just constructed. A layer that cannot be planned stays serial."""
    layer.gdn_strategy = SERIAL
    with stepping_aside(settings, speaks=host.is_first_rank_of_stage):
        ledger.construct(layer)
        facts = replace(host.layer_facts(layer, platform), overlap_allowed=settings.max_tokens > 0)
        chosen = plan(facts, settings.strategy)
        if chosen.strategy == SERIAL:
            raise Refused(chosen.reason)
        after_loading = host.after_loading(layer, partial(loaded, settings, platform))
        layer.gdn_max_tokens = settings.max_tokens
        layer.gdn_tuned, layer.gdn_padding = {}, 0
        layer.gdn_safe_pair = share_no_scratch(facts.qkvz.linear_method, facts.ba.linear_method)
        ways = tuner.add(layer, facts) if settings.strategy == AUTO and settings.tune else ()
        if chosen.strategy == FUSED:
            from vllm_gdn_plugin.run.fused import FusedProjections

            layer.gdn_fused = FusedProjections(layer.in_proj_qkvz, layer.in_proj_ba, ways)
            layer.gdn_padding = layer.gdn_fused.padding
        host.hold_first(layer, after_loading)
        layer.gdn_strategy = chosen.strategy
        ledger.record(layer.prefix, chosen.strategy, layer.gdn_padding)


def loaded(settings: Settings, platform: str, layer: Any) -> None:
    """Finish a layer whose weights are in place, and with the last one say what was done in this engine, or stage.

    A loader may have replaced a parameter instead of writing into it: then the layer is not fused.
    """
    planned, layer.gdn_strategy = layer.gdn_strategy, SERIAL
    with stepping_aside(settings, speaks=host.is_first_rank_of_stage):
        if planned == FUSED and not layer.gdn_fused.is_loaded():
            del layer.gdn_fused
            raise Refused("the loader replaced a weight that fused needs in place")
        layer.gdn_strategy = planned
    with stepping_aside(settings, speaks=host.is_first_rank_of_stage) as say:
        ledger.finish(layer.prefix, layer.gdn_strategy)
        timed = "" if ledger.loading else tuner.run(layer)
        summary = ledger.summary()
        if summary:
            stage = host.pipeline_stage()
            where = "" if stage is None else f" of pipeline stage {stage}"
            ways = f"; in CUDA graphs {timed}" if timed else ""
            say("info", f"{summary}{where} (platform {platform}, vLLM {host.version()}){ways}", again=True)


def compile_factors(settings: Settings) -> dict[str, Callable[[], Any]]:
    """What must be part of vLLM's compile-cache keys: the plugin's version, its state and every setting."""
    factors: dict[str, Callable[[], Any]] = {
        variable(name): partial(_constant, value) for name, value in asdict(settings).items()
    }
    factors["VLLM_GDN_PLUGIN"] = lambda: f"{vllm_gdn_plugin.__version__} {ledger.state()}"
    return factors


def _constant(value: Any) -> Any:
    return value
