"""Keep what a bench found in benchmarks/results, in a form that is small enough for the tree.

    python tools/keep.py FILE.json ... NAME

FILE.json is what a bench or in_process.py wrote; several are of one bench, for other models or ranks. Writes
benchmarks/results/NAME.md, its report, and NAME.json: medians, intervals and counts, versions and the command, and the
samples themselves where they take less than SAMPLES_KB. The README and docs quote these files alone.
"""

import json
import math
import sys
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

from vllm_gdn_plugin.bench import table
from vllm_gdn_plugin.bench.engine import table as engine_table
from vllm_gdn_plugin.bench.engine.results import METRICS, EngineRun
from vllm_gdn_plugin.bench.engine.variants import OFF
from vllm_gdn_plugin.bench.report import load
from vllm_gdn_plugin.bench.results import Run, rounded, write
from vllm_gdn_plugin.bench.stats import compare, summary

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"
SAMPLES_KB = 100


def of_section(run: Run) -> dict[str, Any]:
    """By shape, number of tokens and way: microseconds (median, 5th and 95th percentile), and the ratio to the baseline
    with its 95 % interval."""
    found: dict[str, Any] = {}
    for shape, points in groupby(run.points, key=lambda point: point.shape):
        found[f"{shape.name}, TP {shape.tensor_parallel_size}"] = {
            str(point.tokens): {
                way: {"us": rounded(asdict(row.us).values()), "ratio": rounded(asdict(row.to_baseline).values())}
                for way, row in compare(point.samples_us, run.section).items()
            }
            for point in points
        }
    return found


def of_engines(run: EngineRun) -> dict[str, Any]:
    """By metric, case and variant: median, lowest, highest, number of samples; and the change against stock in percent,
    with its interval."""
    found: dict[str, Any] = {}
    for metric in METRICS:
        for case in run.cases(metric):
            for kind in engine_table.kinds(run):
                values = engine_table.samples(run, metric, case, kind)
                if not values:
                    continue
                cell: dict[str, Any] = {"median": summary(values).median, "low": min(values), "high": max(values)}
                cell = {name: rounded([value])[0] for name, value in cell.items()} | {"samples": len(values)}
                change = engine_table.changes(run, metric, case, kind) if kind != OFF else None
                if change and not math.isinf(change.low):
                    cell["change"] = rounded((change.percent, change.low, change.high))
                found.setdefault(metric, {}).setdefault(case, {})[kind] = cell
            if (apart := engine_table.between_starts(run, metric, case)) is not None:
                found[metric][case]["two starts of off"] = rounded([apart])[0]
    return found


def same(run: Run) -> tuple[object, ...]:
    """What the runs of one table have in common. The bandwidth is measured anew in each: the first one's counts."""
    machine = asdict(run.machine) | {"bandwidth_gb_s": None}
    return machine, run.section, run.precision, run.rounds


def together(first: Path, *others: Path) -> tuple[Run | EngineRun, dict[str, Any]]:
    """The run of all files, and its JSON. Raises ValueError where they are not of one bench."""
    run, data = load(first), json.loads(first.read_text(encoding="utf-8"))
    dates = {run.date}
    for path in others:
        other = load(path)
        if not isinstance(run, Run) or not isinstance(other, Run) or same(other) != same(run):
            raise ValueError(f"{path} does not go with {first}")
        if {point.shape for point in other.points} & {point.shape for point in run.points}:
            raise ValueError(f"{path} has a shape that another file has")
        run.points += other.points
        run.command += f"; {other.command}"
        dates.add(other.date)
        data["points"] += json.loads(path.read_text(encoding="utf-8"))["points"]
    run.date = " to ".join(sorted({min(dates), max(dates)}))
    return run, data | {"command": run.command, "date": run.date}


def keep(paths: list[Path], name: str) -> None:
    run, data = together(*paths)
    is_section = isinstance(run, Run)
    text = table.markdown(run) if is_section else engine_table.markdown(run)
    (RESULTS / f"{name}.md").write_text(text, encoding="utf-8")
    many = "points" if is_section else "samples"
    samples = data.pop(many)
    data["summary"] = of_section(run) if is_section else of_engines(run)
    if len(json.dumps(samples)) < SAMPLES_KB << 10:
        data[many] = samples
    write(RESULTS / f"{name}.json", data)


if __name__ == "__main__":
    *sources, result = sys.argv[1:]
    keep([Path(source) for source in sources], result)
