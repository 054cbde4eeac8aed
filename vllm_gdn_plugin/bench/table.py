"""A run as Markdown: one table for each shape, to paste into a pull request, and every number below it."""

from collections.abc import Mapping
from itertools import groupby

from vllm_gdn_plugin.bench.results import QKVZ, Machine, Point, Run
from vllm_gdn_plugin.bench.stats import CONFIDENCE, SPREAD, Ratio, Row, compare
from vllm_gdn_plugin.decide.plan import DUAL_STREAM, FUSED, NARROW_KERNEL, PADDED_TO, SERIAL

NO_DIFFERENCE = "no difference shown"


def markdown(run: Run) -> str:
    """The whole run."""
    parts = [f"# Input projections of a GDN layer, {run.precision}", *_about(run)]
    for shape, group in groupby(run.points, key=lambda point: point.shape):
        points = list(group)
        rows = [compare(point.samples_us) for point in points]
        parts.append(
            f"### {shape.name}, TP {shape.tensor_parallel_size}\n\n"
            f"hidden {shape.hidden}, qkvz {shape.qkvz}, ba {shape.ba} (each rank)"
        )
        parts.append(table(_overview(points, rows)))
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
        f" x of qkvz: against `in_proj_qkvz` alone, the limit of hiding `in_proj_ba`."
        f" gain: the share of serial's time that is saved (negative: lost) with its {CONFIDENCE:.0%} interval;"
        f' "{NO_DIFFERENCE}" where the interval of the ratio includes 1.',
    ]
    if machine.bandwidth_gb_s:
        lines.append(f"- measured bandwidth of a copy, read and written: {machine.bandwidth_gb_s:.0f} GB/s")
    if machine.device == "cpu":
        lines.append("- on a CPU there is no second stream: dual_stream runs serially")
    if run.stopped:
        lines.append(f"- **not complete**: {run.stopped}")
    return ["\n".join(lines)]


def _overview(points: list[Point], rows: list[dict[str, Row]]) -> list[list[str]]:
    strategies = [name for name in (DUAL_STREAM, FUSED, NARROW_KERNEL) if any(name in row for row in rows)]
    heads = [f"{name} us (x of qkvz)" for name in strategies]
    padded = any(fastest_padded(row) for row in rows)
    if padded:
        heads.append("fused us, padded as is fastest (x of qkvz)")
    lines = [["tokens", "serial us", *heads, "qkvz alone us", "gain"]]
    for point, row in zip(points, rows, strict=True):
        cells = [
            f"{row[name].us.median:.2f} ({_times(row[name].to_qkvz)})" if name in row else "" for name in strategies
        ]
        if padded:
            name = fastest_padded(row)
            cells.append(f"{name}: {row[name].us.median:.2f} ({_times(row[name].to_qkvz)})" if name else "")
        gains = "; ".join(f"{name} {_gain(row[name].to_serial)}" for name in strategies if name in row)
        lines.append(
            [str(point.tokens), f"{row[SERIAL].us.median:.2f}", *cells, f"{row[QKVZ].us.median:.2f}", gains],
        )
    return lines


def fastest_padded(row: Mapping[str, Row]) -> str | None:
    """Of the ways in which the one GEMM has more rows, the fastest by the median, if there is any."""
    return min((way for way in PADDED_TO if way in row), key=lambda way: row[way].us.median, default=None)


def _details(run: Run, points: list[Point], rows: list[dict[str, Row]]) -> list[list[str]]:
    spread, interval = f"{SPREAD[0]}th to {SPREAD[1]}th percentile", f"{CONFIDENCE:.0%} interval"
    head = ["tokens", "strategy", "median us", spread, f"x of serial ({interval})", f"x of qkvz ({interval})"]
    lines = [[*head, "MB moved", "share of bandwidth"]]
    for point, row in zip(points, rows, strict=True):
        for name, found in row.items():
            moved, bandwidth = point.bytes_moved[name], run.machine.bandwidth_gb_s
            lines.append(
                [
                    str(point.tokens),
                    name,
                    f"{found.us.median:.2f}",
                    f"{found.us.low:.2f} to {found.us.high:.2f}",
                    "1" if name == SERIAL else _times_with_interval(found.to_serial),
                    "1" if name == QKVZ else _times_with_interval(found.to_qkvz),
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
