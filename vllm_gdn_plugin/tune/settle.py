"""The times of a case: those that were kept, and the rest timed now."""

import time
from collections.abc import Callable, Iterable
from typing import Any

import vllm_gdn_plugin
from vllm_gdn_plugin.host.facts import driver, gpu
from vllm_gdn_plugin.host.imports import version
from vllm_gdn_plugin.host.process import tuning_directory
from vllm_gdn_plugin.report import warn_once
from vllm_gdn_plugin.settings import variable
from vllm_gdn_plugin.tune.times import Case, Times, keep, recall

UNTIMED = f"nothing was timed, the rules alone decide; {variable('tune')}=0 starts without timing"


def case_of(section: str, facts: dict[str, Any], ways: Iterable[str], device: str | None = None) -> Case:
    """The case of a section on this process's GPU, or on the ``device`` of that name, with the installed versions."""
    import torch

    return Case(
        section,
        device or gpu(),
        driver(),
        str(torch.__version__),
        version(),
        vllm_gdn_plugin.__version__,
        tuple(sorted(facts.items())),
        tuple(ways),
    )


def kept(case: Case) -> Times:
    """The times that earlier starts have kept for this case."""
    return recall(case, tuning_directory())


def settled(case: Case, sizes: Iterable[int], measure: Callable[[list[int]], Times]) -> tuple[Times, str]:
    """The times of these numbers of tokens, and a phrase that says when they were timed.

    Args:
        measure: times these numbers of tokens, those for which no time was kept; it may leave some out.

    Raises what timing raises.
    """
    sizes, times = list(sizes), kept(case)
    # Not those between: what is chosen, and with it vLLM's compiled code, should not change from start to start.
    missing = [tokens for tokens in sizes if tokens not in times] if max(sizes) > max(times, default=0) else []
    how = "timed at an earlier start"
    if missing:
        began = time.perf_counter()
        times |= measure(missing)
        times |= kept(case)  # by now from another rank of the engine: all should choose alike
        left = len(set(missing) - set(times))
        how = f"timed in {time.perf_counter() - began:.1f} s" + (f", {left} sizes left out" if left else "")
        try:
            keep(case, times, tuning_directory())
        except OSError as error:
            warn_once("the times are not kept for the next start", str(error))
    return {tokens: times[tokens] for tokens in sizes if tokens in times}, how
