"""`vllm-gdn-plugin bench compile` on vLLM's CPU engine with a tiny model.

    python benchmarks/cpu_compile.py [--rounds N] [--layers N,...] [--output DIRECTORY]

First cold and warm starts of the engine as it is, then the number of compiled graphs over the number of layers, with
the engine made to compile piecewise (piecewise_on_cpu.py). Writes DIRECTORY/cpu/compile.* and
DIRECTORY/cpu-piecewise/compile.*.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from serving import engine_env
from tiny_model import make_model

HERE = Path(__file__).resolve().parent
ENGINE = ["--mamba-ssm-cache-dtype", "float32", "--max-model-len", "256", "--max-num-seqs", "4"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", default="5")
    parser.add_argument("--layers", default="8,16")
    parser.add_argument("--output", type=Path, default=HERE / "results")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="gdn-", ignore_cleanup_errors=True) as directory:
        scratch = Path(directory)
        make_model("qwen3_5", scratch / "qwen3_5")
        bench(scratch, "cpu", ["--rounds", options.rounds], options.output)
        path = os.pathsep.join(filter(None, [str(install_plugin(scratch)), os.environ.get("PYTHONPATH")]))
        rounds = ["--rounds", "1", "--layers", options.layers]
        bench(scratch, "cpu-piecewise", rounds, options.output, PYTHONPATH=path)


def bench(scratch: Path, name: str, options: list[str], output: Path, **settings: str) -> None:
    command = [sys.executable, "-m", "vllm_gdn_plugin", "bench", "compile", "--model", "qwen3_5", "--device", "cpu"]
    command += ["--strategy", "dual_stream", "--output", name, *options, "--", *ENGINE]
    subprocess.run(command, cwd=scratch, env=engine_env(scratch, **settings), check=True)
    shutil.copytree(scratch / name, output / name, dirs_exist_ok=True)


def install_plugin(scratch: Path) -> Path:
    site = scratch / "site"
    information = site / "piecewise_on_cpu-0.dist-info"
    information.mkdir(parents=True)
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: piecewise_on_cpu\nVersion: 0\n")
    entry_point = "[vllm.general_plugins]\npiecewise_on_cpu = piecewise_on_cpu:register\n"
    (information / "entry_points.txt").write_text(entry_point)
    shutil.copy(HERE / "piecewise_on_cpu.py", site)
    return site


if __name__ == "__main__":
    main()
