"""A run as a picture: by how much each variant differs from the stock engine, and how many graphs were compiled."""

import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from vllm_gdn_plugin.bench.engine.results import COMPILE, SERVE, EngineRun
from vllm_gdn_plugin.bench.engine.table import TITLES, changes, kinds, samples
from vllm_gdn_plugin.bench.engine.variants import OFF

PANELS = {
    SERVE: {
        "output_tokens_per_s": "output tokens/s",
        "tpot_ms": "TPOT",
        "ttft_ms": "TTFT",
        "startup_s": "start-up",
        "host_memory_mib": "host memory",
    },
    COMPILE: {"startup_s": "start-up, s", "artifacts": "compiled graphs"},
}
COLORS = ("tab:gray", "tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple")


def plot(run: EngineRun, path: Path) -> None:
    """Write a PNG: a panel for each thing measured; bars are 95 % intervals, or the lowest and the highest sample.

    Where the run has nothing that is drawn, nothing is written.
    """
    panels = {metric: title for metric, title in PANELS[run.kind].items() if run.cases(metric)}
    if not panels:
        return
    size = (3.4 * len(panels) + 0.6, 3.4)
    figure, axes = plt.subplots(1, len(panels), figsize=size, squeeze=False, layout="constrained")
    draw = _changes if run.kind == SERVE else _values
    for axis, (metric, title) in zip(axes.flat, panels.items(), strict=True):
        draw(axis, run, metric)
        axis.set_title(title, fontsize=9)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.3)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=8)
    figure.suptitle(f"{TITLES[run.kind]}: {run.machine.hardware}", fontsize=10)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _changes(axis: "plt.Axes", run: EngineRun, metric: str) -> None:
    cases = run.cases(metric)
    axis.axhline(0.0, color="black", linewidth=0.8)
    for n, name in enumerate(kinds(run)):
        found = {i: changes(run, metric, case, name) for i, case in enumerate(cases)} if name != OFF else {}
        shown = {i: change for i, change in found.items() if change and not math.isinf(change.low)}
        if shown:
            middles = [c.percent for c in shown.values()]
            reach = [[c.percent - c.low for c in shown.values()], [c.high - c.percent for c in shown.values()]]
            where = [i + 0.12 * (n - 1) for i in shown]
            axis.errorbar(where, middles, yerr=reach, fmt=".", capsize=3, color=COLORS[n % len(COLORS)], label=name)
    axis.set_ylabel(f"change against {OFF}, %", fontsize=8)
    _name_cases(axis, cases)


def _values(axis: "plt.Axes", run: EngineRun, metric: str) -> None:
    cases = run.cases(metric)
    for n, name in enumerate(kinds(run)):
        for i, case in enumerate(cases):
            values = samples(run, metric, case, name)
            where = i + 0.12 * (n - 1)
            axis.plot([where] * len(values), values, ".", color=COLORS[n % len(COLORS)], label=name if i == 0 else None)
    axis.set_ylim(bottom=0)
    _name_cases(axis, cases)


def _name_cases(axis: "plt.Axes", cases: list[str]) -> None:
    axis.set_xticks(range(len(cases)), [case.replace("concurrency ", "") for case in cases], rotation=30)
    if any("concurrency" in case for case in cases):
        axis.set_xlabel("concurrency", fontsize=8)
