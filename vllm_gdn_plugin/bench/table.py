"""A run as Markdown: one table for each shape, to paste into a pull request, and every number below it."""

from itertools import groupby

from vllm_gdn_plugin.bench.results import Machine, Point, Run
from vllm_gdn_plugin.bench.stats import CONFIDENCE, SPREAD, Ratio, Row, compare

NO_DIFFERENCE = "no difference shown"


def markdown(run: Run) -> str:
    """The whole run."""
    parts = [f"# {run.section.title}, {run.precision}", *_about(run)]
    for shape, group in groupby(run.points, key=lambda point: point.shape):
        points = list(group)
        rows = [compare(point.samples_us, run.section) for point in points]
        parts.append(
            f"### {shape.name}, TP {shape.tensor_parallel_size}\n\n"
            f"hidden {shape.hidden}, qkvz {shape.qkvz}, ba {shape.ba} (each rank)"
        )
        parts.append(table(_overview(run, points, rows)))
        parts.append("<details><summary>Every number</summary>")
        parts.append(table(_details(run, points, rows)))
        parts.append("</details>")
    return "\n\n".join(parts) + "\n"


def about_machine(machine: Machine) -> str:
    """Hardware and versions in one line."""
    versions = [
        f"vllm-gdn-plugin {machine.vllm_gdn_plugin}",
        f"torch {machine.torch}",
        machine.vllm and f"vLLM {machine.vllm}",
        machine.cuda and f"CUDA {machine.cuda}",
        machine.driver and f"driver {machine.driver}",
        f"Python {machine.python}",
    ]
    return f"{machine.hardware}; {', '.join(version for version in versions if version)}"


def _about(run: Run) -> list[str]:
    machine = run.machine
    lines = [
        f"- {about_machine(machine)}; {run.date}",
        f"- `{run.command}`",
        f"- us: microseconds per layer, median of {run.rounds} rounds."
        f" x of {run.section.limit}: against {run.section.limit} alone, which no way can beat."
        f" gain: the share of {run.section.baseline}'s time that is saved (negative: lost) with its {CONFIDENCE:.0%}"
        f' interval; "{NO_DIFFERENCE}" where the interval of the ratio includes 1.',
    ]
    if machine.bandwidth_gb_s:
        lines.append(f"- measured bandwidth of a copy, read and written: {machine.bandwidth_gb_s:.0f} GB/s")
    if machine.device == "cpu":
        lines.append("- on a CPU there is no second stream: dual_stream runs serially")
    if run.stopped:
        lines.append(f"- **not complete**: {run.stopped}")
    return ["\n".join(lines)]


def _overview(run: Run, points: list[Point], rows: list[dict[str, Row]]) -> list[list[str]]:
    baseline, limit = run.section.baseline, run.section.limit
    ways = [way for way in dict.fromkeys(way for row in rows for way in row) if way not in (baseline, limit)]
    heads = [f"{way} us (x of {limit})" for way in ways]
    lines = [["tokens", f"{baseline} us", *heads, f"{limit} alone us", "gain"]]
    for point, row in zip(points, rows, strict=True):
        cells = [f"{row[way].us.median:.2f} ({_times(row[way].to_limit)})" if way in row else "" for way in ways]
        gains = "; ".join(f"{way} {_gain(row[way].to_baseline)}" for way in ways if way in row)
        medians = [f"{row[way].us.median:.2f}" for way in (baseline, limit)]
        lines.append([str(point.tokens), medians[0], *cells, medians[1], gains])
    return lines


def _details(run: Run, points: list[Point], rows: list[dict[str, Row]]) -> list[list[str]]:
    baseline, limit = run.section.baseline, run.section.limit
    spread, interval = f"{SPREAD[0]}th to {SPREAD[1]}th percentile", f"{CONFIDENCE:.0%} interval"
    head = ["tokens", "way", "median us", spread, f"x of {baseline} ({interval})", f"x of {limit} ({interval})"]
    lines = [[*head, "MB moved", "share of bandwidth"]]
    for point, row in zip(points, rows, strict=True):
        for way, found in row.items():
            moved, bandwidth = point.bytes_moved[way], run.machine.bandwidth_gb_s
            lines.append(
                [
                    str(point.tokens),
                    way,
                    f"{found.us.median:.2f}",
                    f"{found.us.low:.2f} to {found.us.high:.2f}",
                    "1" if way == baseline else _times_with_interval(found.to_baseline),
                    "1" if way == limit else _times_with_interval(found.to_limit),
                    f"{moved / 1e6:.2f}",
                    f"{moved / (found.us.median * 1e-6) / 1e9 / bandwidth:.0%}" if bandwidth else "not measured",
                ]
            )
    return lines


def _times(ratio: Ratio) -> str:
    return f"{ratio.median:.3f}x" if ratio.shows_difference else NO_DIFFERENCE


def _times_with_interval(ratio: Ratio) -> str:
    return f"{_times(ratio)} ({ratio.low:.3f} to {ratio.high:.3f})"


def _gain(ratio: Ratio) -> str:
    """The interval's ends change places: a low ratio is a high gain."""
    if not ratio.shows_difference:
        return NO_DIFFERENCE
    gain, low, high = (f"{100 * (1 - value):+.1f}" for value in (ratio.median, ratio.high, ratio.low))
    return f"{gain} % ({low} to {high})"


def table(lines: list[list[str]]) -> str:
    """Markdown; the first line is the head."""
    head, *body = lines
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---:"] * len(head), *body])
