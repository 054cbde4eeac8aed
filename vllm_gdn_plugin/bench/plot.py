"""A run as a picture: each way's time against the baseline's, over the number of tokens."""

from itertools import groupby
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from vllm_gdn_plugin.bench.results import Point, Run, Section
from vllm_gdn_plugin.bench.stats import ratios, summary

COLORS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple")
COLUMNS = 4
MARGIN = 0.05
"""The lines fit the panels with this much room; a band may be cut off, so that one outlier does not flatten all."""


def plot(run: Run, path: Path) -> None:
    """Write a PNG: a panel for each shape; lines are medians, bands go from the 5th to the 95th percentile."""
    panels = [(shape, list(points)) for shape, points in groupby(run.points, key=lambda point: point.shape)]
    columns = min(COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    size = (3.4 * columns + 0.6, 2.8 * rows + 0.8)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, sharey=True, layout="constrained")
    middles = [1.0]
    for axis, (shape, points) in zip(axes.flat, panels, strict=False):
        middles += _panel(axis, points, run.section)
        name = shape.name.replace(" and ", "\nand ")
        axis.set_title(f"{name}, TP {shape.tensor_parallel_size}", fontsize=8)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    axes.flat[0].set_ylim(min(middles) - MARGIN, max(middles) + MARGIN)
    figure.supylabel(f"time, {run.section.baseline} = 1", fontsize=9)
    figure.suptitle(f"{run.machine.hardware}, {run.precision}", fontsize=10)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _panel(axis: "plt.Axes", points: list[Point], section: Section) -> list[float]:
    """Draw one shape; returns the medians."""
    middles = []
    axis.axhline(1.0, color="black", linewidth=0.8, label=section.baseline)
    ways = dict.fromkeys(way for point in points for way in point.samples_us)
    styles = dict(zip((way for way in ways if way not in (section.baseline, section.limit)), COLORS, strict=False))
    for way, color in {**styles, section.limit: "tab:gray"}.items():
        timed = [point for point in points if way in point.samples_us]
        tokens = [point.tokens for point in timed]
        found = [summary(ratios(point.samples_us[way], point.samples_us[section.baseline])) for point in timed]
        middles += [f.median for f in found]
        line, label = ("--", f"{way} alone") if way == section.limit else ("-", way)
        axis.plot(tokens, [f.median for f in found], line, color=color, marker=".", label=label)
        axis.fill_between(tokens, [f.low for f in found], [f.high for f in found], color=color, alpha=0.25, lw=0)
    axis.set_xscale("log", base=2)
    axis.set_xlabel("tokens", fontsize=8)
    axis.tick_params(labelsize=7)
    axis.grid(alpha=0.3)
    return middles
