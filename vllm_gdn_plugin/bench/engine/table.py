"""A run as Markdown: one table for each thing measured, to paste into a pull request."""

import math
import shlex
import statistics

from vllm_gdn_plugin.bench.engine.results import COMPILE, METRICS, SERVE, EngineRun
from vllm_gdn_plugin.bench.engine.variants import OFF
from vllm_gdn_plugin.bench.stats import CONFIDENCE, MANY, Change, paired_change
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


def changes(run: EngineRun, metric: str, case: str, variant: str, baseline: str = OFF) -> Change | None:
    """How a variant compares with another, the stock engine if none is named, in the rounds that have both; None where
    no round has, or where a zero makes percent meaningless."""
    base, found = (run.values(metric, case, name) for name in (baseline, variant))
    rounds = sorted(base.keys() & found.keys())
    if not rounds or not all(values[n] > 0 for values in (base, found) for n in rounds):
        return None
    return paired_change([found[n] for n in rounds], [base[n] for n in rounds])


def _about(run: EngineRun) -> list[str]:
    begun = len({sample.round for sample in run.samples})
    rounds = f"{run.rounds} rounds" if begun == run.rounds else f"{begun} of {run.rounds} rounds"
    lines = [
        f"- {about_machine(run.machine)}; {run.date}",
        f"- `{run.command}`",
        f"- {OFF}: stock vLLM, every other plugin loaded; the engines take turns, {rounds}",
        f"- median (lowest to highest); change: against {OFF} in the same round, median, or of fewer than {MANY} rounds"
        f' geometric mean, with its {CONFIDENCE:.0%} interval; "{NO_DIFFERENCE}" where the interval includes 0',
    ]
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
    others = [name for name in run.variants if name != OFF and any(run.values(metric, case, name) for case in cases)]
    lines = [["", OFF, *(text for name in others for text in (name, f"change by {name}"))]]
    for case in cases:
        line = [case, _spread(run.values(metric, case, OFF))]
        for name in others:
            line += [_spread(run.values(metric, case, name)), shown(changes(run, metric, case, name))]
        lines.append(line)
    return lines


def _spread(values: dict[int, float]) -> str:
    if not values:
        return ""
    middle, low, high = (_number(f(values.values())) for f in (statistics.median, min, max))
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
