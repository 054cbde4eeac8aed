"""What vLLM's entry point runs, and what follows: register, install, adopt, loaded.

vLLM calls :func:`register` in every process. Once vLLM imports the module of its GDN layer, :func:`install` has it
build the plugin's subclass. :func:`adopt` plans each layer that is built, :func:`loaded` finishes it when its weights
are there. Stepping aside never disturbs the host.
"""

import multiprocessing
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from types import ModuleType
from typing import Any

import vllm_gdn_plugin
from vllm_gdn_plugin.decide.contract import GDN_CLASSES, check_contract, layer_module
from vllm_gdn_plugin.decide.decision import decide, held_by, refusal
from vllm_gdn_plugin.decide.decode import why_no_kernel
from vllm_gdn_plugin.decide.decode_contract import why_no_decode_kernel
from vllm_gdn_plugin.decide.plan import AUTO, FUSED, SERIAL, plan
from vllm_gdn_plugin.host import facts, imports, layers, process
from vllm_gdn_plugin.report import Record, Refused, ledger, stepping_aside, summarised, unexpected
from vllm_gdn_plugin.settings import Settings, read_settings, variable
from vllm_gdn_plugin.versions import judge_version


def register() -> None:
    """Decide, install, report: vLLM calls this in every process, possibly twice.

    Raises nothing, unless ``VLLM_GDN_PLUGIN_STRICT=1`` turns stepping aside into :class:`Refused`.
    """
    settings, problems = read_settings()
    with stepping_aside(settings, speaks=lambda: multiprocessing.parent_process() is None) as say:
        process.declare_variables(compile_factors(settings))  # vLLM may refuse to start for unknown ones
        for problem in problems:
            say("warning", problem)
        package = imports.package_directory()
        verdict = judge_version(imports.version(), settings.allow_untested)
        if not verdict.admitted or layer_module(package) is None:  # no import of the layer to wait for
            raise Refused(refusal(verdict, check_contract(package)))
        imports.when_imported(tuple(GDN_CLASSES), partial(install, settings))


def install(settings: Settings, module: ModuleType) -> bool:
    """Have the plugin's subclass built in place of the GDN class of ``module``, which the host has just imported, if
    every condition holds.

    Answers False where the layer is in another module, which is still to come. Whatever fails, the class is left as
    it was.
    """
    stock = getattr(module, GDN_CLASSES[module.__name__], None)
    with stepping_aside(settings, speaks=process.is_first_rank) as say:
        contract = check_contract(imports.package_directory())
        if contract.module not in (None, module.__name__):
            return False
        platform = facts.platform()
        decision = decide(settings, imports.version(), contract, platform)
        unwanted = decision.status == "serial" and settings.strategy != SERIAL
        if decision.status == "refused" or (unwanted and settings.strict):
            raise Refused(decision.reason)
        layers.withdraw_from(stock)  # vLLM may call twice in a process, with other settings
        if decision.status == "serial":
            say("info", f"stock vLLM is left untouched: {decision.reason}")
            return True
        from vllm_gdn_plugin.run.layer import make_layer_class

        no_kernel = why_no_decode_kernel(imports.package_directory())
        ours = make_layer_class(stock, partial(adopt, settings, platform, no_kernel, stock))
        layers.build_in_place_of(stock, ours, partial(taken, settings))
    return True


def taken(settings: Settings, holder: Any) -> None:
    """A layer is being built, and another plugin has registered its class ``holder`` for it, which keeps it."""
    with stepping_aside(settings, speaks=process.is_first_rank_of_stage):
        raise Refused(held_by(f"{holder.__module__}.{holder.__qualname__}"))


def adopt(settings: Settings, platform: str, no_kernel: str | None, stock: Any, layer: Any) -> None:
    """Plan a layer that vLLM has just constructed. One for which there is nothing to do is made one of ``stock``.

    ``no_kernel`` tells why this vLLM cannot have the decode kernel, or is None.
    """
    from vllm_gdn_plugin.run.layer import Gdn, become

    layer.gdn, adopted = Gdn(), False
    with stepping_aside(settings, speaks=process.is_first_rank_of_stage):
        record = ledger.construct(layer)
        record.facts = facts.layer_facts(layer, platform)
        chosen = plan(record.facts, settings.strategy)
        record.no_kernel = no_kernel or plan_decode(settings, layer, record)
        if record.no_kernel and settings.decode_kernel == "1" and settings.strict:
            raise Refused(f"no decode kernel: {record.no_kernel}")
        if chosen.strategy == SERIAL and record.no_kernel:
            raise Refused(f"no decode kernel: {record.no_kernel}" if settings.strategy == SERIAL else chosen.reason)
        hook = layers.after_loading(layer, partial(loaded, settings, stock, record))
        if settings.tune:
            record.sizes = facts.captured_sizes()
        if chosen.strategy == FUSED:
            from vllm_gdn_plugin.run.engine import fuse

            layer.gdn.fused = fuse(layer, record, by_time=settings.strategy == AUTO and not process.has_peers())
        layers.hold_first(layer, hook)
        layer.gdn.strategy = record.strategy = chosen.strategy
        adopted = record.loading = True
    if not adopted:
        become(layer, stock)


def plan_decode(settings: Settings, layer: Any, record: Record) -> str | None:
    """Why the layer has no decode kernel, or None. What fails here does not touch the plan for the projections."""
    assert record.facts is not None
    try:
        record.decode_facts = facts.decode_facts(layer, record.facts)
    except Exception as error:
        return unexpected(error)
    return why_no_kernel(record.decode_facts, settings.decode_kernel, settings.strategy)


def loaded(settings: Settings, stock: Any, record: Record, layer: Any) -> None:
    """Finish a layer whose weights are in place, and with the last one say what was done in this engine, or stage.

    By now vLLM may have given a projection another linear method, and a loader may have replaced a parameter instead of
    writing into it: so the layer is planned anew. A reload comes here again.
    """
    if record.told:  # a reload: strictness stops an engine that starts, never one that serves
        settings = replace(settings, strict=False)
    gdn = layer.gdn
    planned, gdn.strategy, record.loading = record.strategy, SERIAL, False
    with stepping_aside(settings, speaks=process.is_first_rank_of_stage) as say:
        assert record.facts is not None
        record.facts = replace(
            record.facts,
            qkvz=facts.projection_facts(layer.in_proj_qkvz),
            ba=facts.projection_facts(layer.in_proj_ba),
            weights_in_place=gdn.fused is not None and gdn.fused.take_back(layer),
        )
        chosen = plan(record.facts, settings.strategy)
        gdn.strategy = chosen.strategy
        gdn.plain_gemm = record.facts.platform == "cuda" and not record.facts.batch_invariant
        if planned == FUSED != chosen.strategy and record.told:
            say(
                "warning", "the new weights of a GDN layer do not fit; compiled code goes on with the old ones: restart"
            )
            return
        if chosen.strategy != FUSED:
            gdn.fused = None
        if SERIAL == chosen.strategy != planned:
            raise Refused(chosen.reason)
        if chosen.strategy != planned:
            say("warning", f"a GDN layer runs {chosen.strategy} in place of {planned}: {chosen.reason}")
    record.strategy = gdn.strategy
    if not ledger.loading:
        all_loaded(settings, stock, layer)


def all_loaded(settings: Settings, stock: Any, last: Any) -> None:
    """All layers are loaded, ``last`` the last of them: settle what is left to choose, and say what is done."""
    from vllm_gdn_plugin.run.engine import SLOWER, settle_decode, settle_projections

    with stepping_aside(settings, speaks=process.is_first_rank_of_stage) as say:
        news = ledger.news()
        hopeful = [record for record in news if not record.no_kernel]
        phrases = [settle_projections(news, last, by_time=settings.strategy == AUTO)]
        phrases += [settle_decode(stock, news, everywhere=settings.decode_kernel == "1")]
        why_not = next((record.no_kernel for record in news if record.no_kernel), None)
        if why_not and settings.decode_kernel == "1" and settings.strict:
            raise Refused(f"no decode kernel: {why_not}")
        if why_not and settings.decode_kernel != "0":
            phrases += [f"no decode kernel: {why_not}"]
        summary, stage = summarised(news), process.pipeline_stage()
        if summary:
            where = "" if stage is None else f" of pipeline stage {stage}"
            platform = next(record.facts.platform for record in news if record.facts)
            done = f"{summary}{where} (platform {platform}, vLLM {imports.version()})"
            say("info", "; ".join(filter(None, [done, *phrases])), again=True)
        elif any(record.no_kernel == SLOWER for record in hopeful):
            say("info", f"stock vLLM is left untouched: {SLOWER}")
        elif any(record.no_kernel for record in hopeful):  # else it has been said why nothing is done
            raise Refused(f"no decode kernel: {why_not}")


def compile_factors(settings: Settings) -> dict[str, Callable[[], Any]]:
    """What must be part of vLLM's compile-cache keys: the plugin's version, its state and every setting."""
    factors: dict[str, Callable[[], Any]] = {
        variable(name): partial(_constant, value) for name, value in asdict(settings).items()
    }
    factors["VLLM_GDN_PLUGIN"] = lambda: f"{vllm_gdn_plugin.__version__} {ledger.state()}"
    return factors


def _constant(value: Any) -> Any:
    return value
