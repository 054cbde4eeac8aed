"""CUDA streams, cuBLAS's workspaces and captures, as vLLM uses them."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def unchanged_stream() -> Iterator[None]:
    """Leave the current stream, and what vLLM knows of it, as they were: an engine whose stream nobody has set takes
    one of its own when vLLM first asks for it."""
    import torch
    from vllm.utils.torch_utils import _current_stream_tls

    stream, known = torch.cuda.current_stream(), getattr(_current_stream_tls, "value", None)
    try:
        yield
    finally:
        torch.cuda.set_stream(stream)
        _current_stream_tls.value = known


def prepare_aux_stream() -> bool:
    """Have this thread's cuBLAS allocate its workspace for the auxiliary stream. Answers whether it could.

    Not within a capture: what is allocated there belongs to the graph's memory. cuBLAS would go on using it when the
    graph is gone, and the GPU reads what is no longer there.
    """
    import torch
    from vllm.utils.torch_utils import aux_stream

    if not torch.cuda.is_initialized() or torch.version.hip or torch.cuda.is_current_stream_capturing():
        return False
    with unchanged_stream(), torch.cuda.stream(aux_stream()):
        torch.cuda.current_blas_handle()
    return True


times_released = 0
"""How often :func:`release_workspaces` has given them back: then each thread needs its own anew."""


def cuda_graphs_exist() -> bool:
    """Whether there is memory of a CUDA graph in this process."""
    import torch

    try:
        return any(segment["segment_pool_id"] != (0, 0) for segment in torch.cuda.memory_snapshot())
    except Exception:  # an allocator that cannot tell, such as cudaMallocAsync
        return True


def release_workspaces() -> None:
    """Give back the workspaces that cuBLAS has by now, one for each stream that it was used on, and all else that
    PyTorch keeps for later. cuBLAS gets new ones where it needs them. Does not touch the workspaces while there are
    CUDA graphs, which go on using those that they were captured with."""
    import torch

    torch.cuda.synchronize()
    torch.cuda.empty_cache()  # first, for graphs that are gone leave their memory in it
    if cuda_graphs_exist():
        return
    global times_released
    times_released += 1
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()


def is_captured(tensor: Any) -> bool:
    """Whether what is done now with this tensor goes into a CUDA graph."""
    import torch

    return tensor.is_cuda and torch.version.hip is None and torch.cuda.is_current_stream_capturing()


def breakable_capture() -> bool:
    """Whether a breakable CUDA-graph capture is active (vLLM 0.22 and later have them)."""
    breakable = sys.modules.get("vllm.compilation.breakable_cudagraph")
    return breakable is not None and bool(breakable.BreakableCUDAGraphCapture.is_active())
