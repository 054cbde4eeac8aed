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
from vllm_gdn_plugin.decide.plan import AUTO, DUAL_STREAM, FUSED, SERIAL, LayerFacts, plan
from vllm_gdn_plugin.host import facts, imports, layers, process, streams
from vllm_gdn_plugin.report import Record, Refused, ledger, stepping_aside, unexpected, warn_once
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
        decision = decide(settings, imports.version(), contract, lambda: platform)
        unwanted = decision.status == "serial" and settings.strategy != SERIAL
        if decision.status == "refused" or (unwanted and settings.strict):
            raise Refused(decision.reason)
        if decision.status == "serial":
            say("info", f"stock vLLM is left untouched: {decision.reason}")
            return True
        from vllm_gdn_plugin.run.layer import make_layer_class

        ours = make_layer_class(stock, partial(adopt, settings, platform, stock))
        layers.build_in_place_of(stock, ours, partial(taken, settings))
    return True


def taken(settings: Settings, holder: Any) -> None:
    """A layer is being built, and another plugin has registered its class ``holder`` for it, which keeps it."""
    with stepping_aside(settings, speaks=process.is_first_rank_of_stage):
        raise Refused(held_by(f"{holder.__module__}.{holder.__qualname__}"))


def adopt(settings: Settings, platform: str, stock: Any, layer: Any) -> None:
    """Plan a layer that vLLM has just constructed. One for which there is nothing to do is made one of ``stock``."""
    from vllm_gdn_plugin.run.layer import Gdn, become

    layer.gdn = Gdn()
    with stepping_aside(settings, speaks=process.is_first_rank_of_stage):
        record = ledger.construct(layer)
        record.facts = facts.layer_facts(layer, platform)
        chosen = plan(record.facts, settings.strategy)
        if chosen.strategy == SERIAL:
            raise Refused(chosen.reason)
        hook = layers.after_loading(layer, partial(loaded, settings))
        if settings.tune and settings.strategy == AUTO:
            record.sizes = facts.captured_sizes()
        if chosen.strategy == FUSED:
            layer.gdn.fused = fuse(layer, record)
        layers.hold_first(layer, hook)
        layer.gdn.strategy = record.strategy = chosen.strategy
        record.loading = True
    if layer.gdn.strategy == SERIAL:
        become(layer, stock)


def fuse(layer: Any, record: Record) -> Any:
    """The one weight of a layer. Where its rows cannot be timed, they are as few as possible, and a line says why."""
    from vllm_gdn_plugin.run.fused import FusedWeight
    from vllm_gdn_plugin.run.timing import rows_of

    qkvz, ba = layer.in_proj_qkvz, layer.in_proj_ba
    outputs = qkvz.weight.shape[0] + ba.weight.shape[0]
    record.rows = or_by_rule(lambda sizes: rows_of(qkvz.weight.data, outputs, sizes), record.sizes)
    return FusedWeight(qkvz, ba, record.rows)


def loaded(settings: Settings, layer: Any) -> None:
    """Finish a layer whose weights are in place, and with the last one say what was done in this engine, or stage.

    By now vLLM may have given a projection another linear method, and a loader may have replaced a parameter instead of
    writing into it: so the layer is planned anew. A reload comes here again.
    """
    gdn, record = layer.gdn, ledger.records[layer.prefix]
    speaks = process.is_first_rank_of_stage
    planned, gdn.strategy, record.loading = record.strategy, SERIAL, False
    with stepping_aside(settings, speaks) as say:
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
        if chosen.strategy == SERIAL:
            raise Refused(chosen.reason)
        if chosen.strategy != planned:
            say("warning", f"a GDN layer runs {chosen.strategy} in place of {planned}: {chosen.reason}")
    record.strategy = gdn.strategy
    with stepping_aside(settings, speaks) as say:
        timed = "" if ledger.loading else settle(layer)
        summary = ledger.summary()
        if summary:
            stage = process.pipeline_stage()
            where = "" if stage is None else f" of pipeline stage {stage}"
            how = f"; in CUDA graphs {timed}" if timed else ""
            platform = record.facts.platform if record.facts else "unknown"
            say("info", f"{summary}{where} (platform {platform}, vLLM {imports.version()}){how}", again=True)


def settle(last: Any) -> str:
    """Give the layers that run dual_stream their ways by number of tokens, and say in a phrase what they are.

    ``last`` is the layer whose loading is about to end: vLLM comes to a layer before its projections, so only the
    others' weights are as they will be used.
    """
    from vllm_gdn_plugin.run.timing import ways_of

    alike: dict[tuple[LayerFacts, tuple[int, ...]], list[Any]] = {}
    for record in ledger.records.values():
        layer = record.layer()
        if record.strategy == DUAL_STREAM and record.facts is not None and not record.told and layer is not None:
            alike.setdefault((record.facts, record.sizes), []).append(layer)
    phrases = []
    for (layer_facts, sizes), group in alike.items():
        ready = [layer for layer in group if layer is not last]
        ways, phrase = or_by_rule(partial(ways_of, group, ready, layer_facts), sizes)
        for layer in group:
            layer.gdn.ways = ways
        phrases += [phrase] if phrase else []
    if any(layer_facts.platform == "cuda" for layer_facts, _ in alike):
        streams.prepare_aux_stream()  # after all timing, which gives back what was prepared before
    return "; ".join(phrases)


def or_by_rule(choose: Callable[[tuple[int, ...]], Any], sizes: tuple[int, ...]) -> Any:
    """What is chosen by the times of these sizes; where timing fails a line says why, and the rules choose."""
    from vllm_gdn_plugin.tune.settle import UNTIMED

    if sizes:
        try:
            return choose(sizes)
        except Exception as error:
            warn_once(UNTIMED, unexpected(error))
    return choose(())


def compile_factors(settings: Settings) -> dict[str, Callable[[], Any]]:
    """What must be part of vLLM's compile-cache keys: the plugin's version, its state and every setting."""
    factors: dict[str, Callable[[], Any]] = {
        variable(name): partial(_constant, value) for name, value in asdict(settings).items()
    }
    factors["VLLM_GDN_PLUGIN"] = lambda: f"{vllm_gdn_plugin.__version__} {ledger.state()}"
    return factors


def _constant(value: Any) -> Any:
    return value
