"""A run as Markdown: one table for each thing measured, to paste into a pull request."""

import math
import shlex
import statistics
from collections.abc import Sequence
from itertools import product

from vllm_gdn_plugin.bench.engine.results import COMPILE, METRICS, SERVE, EngineRun
from vllm_gdn_plugin.bench.engine.variants import OFF, kind_of, starts_of
from vllm_gdn_plugin.bench.stats import CONFIDENCE, MANY, Change, over_pairs, paired_change
from vllm_gdn_plugin.bench.table import NO_DIFFERENCE, about_machine, table

WIDE = 999
"""Percent. Where an interval reaches further, the rounds were too few to say anything."""

TITLES = {SERVE: "Serving with and without vllm-gdn-plugin", COMPILE: "Start-up and compilation with and without it"}


def markdown(run: EngineRun) -> str:
    """The whole run."""
    parts = [f"# {TITLES[run.kind]}", "\n".join(_about(run))]
    for metric, title in METRICS.items():
        cases = run.cases(metric)
        if cases:
            parts.append(f"### {title[0].upper()}{title[1:]}")
            parts.append(table(_lines(run, metric, cases)))
    return "\n\n".join(parts) + "\n"


def changes(run: EngineRun, metric: str, case: str, kind: str, baseline: str = OFF) -> Change | None:
    """How a variant compares with another, the stock engine if none is named, over all pairs that took turns."""
    pairs = product(starts_of(run.variants, baseline), starts_of(run.variants, kind))
    found = [change for pair in pairs if (change := pair_change(run, metric, case, *pair))]
    return over_pairs(found) if found else None


def pair_change(run: EngineRun, metric: str, case: str, baseline: str, variant: str) -> Change | None:
    """How one engine compares with another in the rounds that have both; None where no round has, or where a zero makes
    percent meaningless."""
    base, found = (run.values(metric, case, name) for name in (baseline, variant))
    rounds = sorted(base.keys() & found.keys())
    if not rounds or not all(values[n] > 0 for values in (base, found) for n in rounds):
        return None
    return paired_change([found[n] for n in rounds], [base[n] for n in rounds])


def between_starts(run: EngineRun, metric: str, case: str) -> float | None:
    """By how many percent the median of a start of the stock engine lies above another's, at the most; None where there
    is but one."""
    values = [run.values(metric, case, name).values() for name in starts_of(run.variants, OFF)]
    medians = [statistics.median(found) for found in values if found]
    return 100 * (max(medians) / min(medians) - 1) if len(medians) > 1 and min(medians) > 0 else None


def kinds(run: EngineRun) -> list[str]:
    """The variants, each once however often it was started."""
    return list(dict.fromkeys(map(kind_of, run.variants)))


def samples(run: EngineRun, metric: str, case: str, kind: str) -> list[float]:
    """All samples of a variant, whatever the start."""
    return [value for name in starts_of(run.variants, kind) for value in run.values(metric, case, name).values()]


def _about(run: EngineRun) -> list[str]:
    begun = len({sample.round for sample in run.samples})
    rounds = f"{begun} of {run.rounds} rounds" if begun < run.rounds else f"{begun} rounds"
    lines = [
        f"- {about_machine(run.machine)}; {run.date}",
        f"- `{run.command}`",
        f"- {OFF}: stock vLLM, every other plugin loaded; the engines take turns, {rounds}",
        f"- median (lowest to highest); change: against {OFF} in the same round, median, or of fewer than {MANY} rounds"
        f' geometric mean, with its {CONFIDENCE:.0%} interval; "{NO_DIFFERENCE}" where the interval includes 0',
    ]
    if len(kinds(run)) < len(run.variants):
        lines.append(
            "- several starts of each engine: the change is the mean over the pairs that took turns, from the lowest to"
            " the highest bound of their intervals, so what two starts differ by is a part of it; the last column is by"
            f" how much the median of a start of {OFF} lies above another's"
        )
    if run.vllm_arguments:
        lines.append(f"- `vllm serve {shlex.join(run.vllm_arguments)}`")
    if run.load:
        lines.append(f"- {run.load}")
    lines += [f"- one greedy answer of {variant} against {OFF}'s: {how}" for variant, how in run.verified.items()]
    lines += [f"- {variant} logged: {line}" for variant, line in run.said.items()]
    if run.stopped:
        lines.append(f"- **not complete**: {run.stopped}")
    return lines


def _lines(run: EngineRun, metric: str, cases: list[str]) -> list[list[str]]:
    others = [kind for kind in kinds(run) if kind != OFF and any(samples(run, metric, case, kind) for case in cases)]
    lines = [["", OFF, *(text for kind in others for text in (kind, f"change by {kind}"))]]
    apart = [between_starts(run, metric, case) for case in cases]
    for case, most in zip(cases, apart, strict=True):
        line = [case, _spread(samples(run, metric, case, OFF))]
        for kind in others:
            line += [_spread(samples(run, metric, case, kind)), shown(changes(run, metric, case, kind))]
        lines.append([*line, "" if most is None else _percent(most)])
    if any(most is not None for most in apart):
        lines[0].append(f"two starts of {OFF}")
    else:
        lines[1:] = [line[:-1] for line in lines[1:]]
    return lines


def _spread(values: Sequence[float]) -> str:
    if not values:
        return ""
    middle, low, high = (_number(f(values)) for f in (statistics.median, min, max))
    return middle if low == high else f"{middle} ({low} to {high})"


def _number(value: float) -> str:
    """Four digits, and no more."""
    return f"{value:.0f}" if value >= 1000 or value == int(value) else f"{value:.4g}"


def shown(change: Change | None) -> str:
    """A change and its interval, for a cell of a table."""
    if change is None:
        return ""
    if math.isinf(change.low):
        return f"{_percent(change.percent)} (one round, no interval)"
    interval = f"({_percent(change.low)} to {_percent(change.high)})"
    return f"{_percent(change.percent)} {interval}" if change.shows_difference else f"{NO_DIFFERENCE} {interval}"


def _percent(value: float) -> str:
    return f"{value + 0.0:+.1f} %" if value < WIDE else f"over +{WIDE} %"
