"""Some tests once more, under compute-sanitizer.

Memcheck sees accesses outside of what PyTorch has from CUDA. Blocks inside of PyTorch's own pools it cannot tell apart,
and without the pools no CUDA graph can be captured: a wrong neighbour in there is what the comparisons of bits are for.
Racecheck sees threads of a program that meet in shared memory.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
SANITIZER = shutil.which("compute-sanitizer", path=f"{os.environ.get('PATH', '')}{os.pathsep}/usr/local/cuda/bin")


@pytest.mark.skipif(SANITIZER is None, reason="compute-sanitizer is not installed")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
@pytest.mark.parametrize(
    "test",
    [
        "gpu/test_dual_stream.py::test_bit_equal_to_serial_eager_and_captured[35B-A3B-4-bfloat16]",
        "gpu/test_fused.py::test_as_exact_as_serial[35B-A3B-4]",
        "kernel/test_decode_kernel.py::test_outputs_and_states_of_a_batch[(2, 6)-few-float32]",
        "kernel/test_decode_kernel.py::test_outputs_and_states_of_a_batch[(2, 6)-many-float32]",
    ],
)
def test_nothing_is_accessed_out_of_bounds_or_in_a_race(test: str, tool: str) -> None:
    if tool == "racecheck" and test.startswith("gpu"):
        pytest.skip("the kernels there are cuBLAS's")
    command = [str(SANITIZER), "--tool", tool, "--error-exitcode", "99"]
    command += ["--report-api-errors", "no"] if tool == "memcheck" else []
    command += [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", str(TESTS / test)]
    done = subprocess.run(command, cwd=TESTS.parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout[-6000:]
    assert "1 passed" in done.stdout
    assert re.search(r"ERROR SUMMARY: 0 errors|RACECHECK SUMMARY: 0 hazards", done.stdout)
