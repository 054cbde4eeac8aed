"""What the plugin's entry point costs a process that never builds a Gated Delta Net layer.

    python benchmarks/entry_point.py [--rounds N] [--output DIRECTORY]

Each round is a fresh process that has imported vLLM's engine arguments, as every vLLM process has before it loads
plugins; it then loads and calls the entry point once. Writes entry_point.json and prints the table.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path

from vllm_gdn_plugin.bench.machine import cpu

ONE_ROUND = """
import sys, time
from importlib.metadata import entry_points
import vllm.engine.arg_utils
(point,) = entry_points(group="vllm.general_plugins", name="vllm_gdn_plugin")
start = time.perf_counter()
register = point.load()
loaded = time.perf_counter()
register()
done = time.perf_counter()
assert not any(name.endswith("gdn_linear_attn") for name in sys.modules)
print((loaded - start) * 1e3, (done - loaded) * 1e3)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    rows = []
    for _ in range(options.rounds):
        printed = subprocess.run(
            [sys.executable, "-c", ONE_ROUND], check=True, capture_output=True, text=True, cwd=options.output
        ).stdout
        rows.append([float(word) for word in printed.splitlines()[-1].split()])
    result = {
        "command": f"python benchmarks/entry_point.py --rounds {options.rounds}",
        "hardware": f"{cpu()}, {os.cpu_count()} cores",
        "versions": {name: importlib.metadata.version(name) for name in ("vllm-gdn-plugin", "vllm", "torch")}
        | {"python": platform.python_version()},
        "unit": "ms",
        "import_package": [row[0] for row in rows],
        "register": [row[1] for row in rows],
    }
    result["median"] = round(statistics.median(map(sum, rows)), 1)
    (options.output / "entry_point.json").write_text(json.dumps(result, indent=1) + "\n")
    for name in ("import_package", "register"):
        samples = sorted(result[name])
        print(f"{name:<15} median {statistics.median(samples):.1f} ms, {samples[0]:.1f} to {samples[-1]:.1f}")


if __name__ == "__main__":
    main()
