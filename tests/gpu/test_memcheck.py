"""The tests of the projections once more, under compute-sanitizer's memcheck.

It sees accesses outside of what PyTorch has from CUDA. Blocks inside of PyTorch's own pools it cannot tell apart, and
without the pools no CUDA graph can be captured: a wrong neighbour in there is what the comparisons of bits are for.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SANITIZER = shutil.which("compute-sanitizer", path=f"{os.environ.get('PATH', '')}{os.pathsep}/usr/local/cuda/bin")


@pytest.mark.skipif(SANITIZER is None, reason="compute-sanitizer is not installed")
@pytest.mark.parametrize(
    "test",
    [
        "test_dual_stream.py::test_bit_equal_to_serial_eager_and_captured[35B-A3B-4-bfloat16]",
        "test_fused.py::test_as_exact_as_serial[35B-A3B-4]",
    ],
)
def test_nothing_is_accessed_out_of_bounds(test: str) -> None:
    command = [str(SANITIZER), "--tool", "memcheck", "--report-api-errors", "no", "--error-exitcode", "99"]
    command += [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", str(HERE / test)]
    done = subprocess.run(command, cwd=HERE.parents[1], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout[-6000:]
    assert "1 passed" in done.stdout
    assert "ERROR SUMMARY: 0 errors" in done.stdout
