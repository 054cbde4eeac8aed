"""The one weight of a layer's two projections, for one GEMM that gives both results.

The two parameters keep their objects, shapes and loaders; their data become row blocks of one weight, so that whatever
is written into them (a loader, a reload, a refit) is what the GEMM reads. The weight is a plain tensor: as a parameter
or buffer it would be saved, copied to host memory by sleep mode, and overwritten by a layerwise reload.
"""

from typing import Any

import torch

ROW_ALIGNMENT = 16
"""Rows are padded to a multiple of this many: the consumers' Triton kernels load vectors only where the row stride of
the result is divisible by 16."""

PADDED_TO = (128, 256, 512)
"""Multiples to which padding may be worth it: cuBLAS chooses its kernel by the shape, and on an NVIDIA H200 a GEMM of
some more rows takes from 0.84 to 1.29 times as long, by shape and number of tokens (benchmarks/NOTES.md)."""

MOST_PADDING = 2 * 2**20
"""Bytes of padding in a layer, at the most."""


class FusedWeight:
    """The weight (rows, hidden_size) of a layer: that of ``in_proj_qkvz``, that of ``in_proj_ba``, padding.

    Args:
        qkvz, ba: vLLM's linear layers, unquantised, with weights (out, hidden_size) of one dtype and device, which
            become parts of this one.
        rows: at least as many as both have, see :func:`rows_to_choose_from`.

    Raises what the allocation raises; then the layers are as they were.
    """

    def __init__(self, qkvz: Any, ba: Any, rows: int) -> None:
        sizes = qkvz.weight.shape[0], ba.weight.shape[0]
        self.sizes = [*sizes, rows - sum(sizes)]
        like = qkvz.weight
        self.weight = torch.zeros(rows, like.shape[1], dtype=like.dtype, device=like.device)
        self.blocks = self.weight.split(self.sizes)[:2]
        for linear, block in zip((qkvz, ba), self.blocks, strict=True):
            block.copy_(linear.weight.data)
            linear.weight.data = block
            if block.is_cpu:
                linear.quant_method.process_weights_after_loading = _leave_unpacked

    def project(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Both projections of ``hidden_states`` (num_tokens, hidden_size), as views of one result."""
        qkvz, ba, _ = torch.nn.functional.linear(hidden_states, self.weight).split(self.sizes, dim=-1)
        return qkvz, ba

    def is_of(self, layer: Any) -> bool:
        """Whether the weights of the layer's projections are parts of this one."""
        # vLLM's parameters are of a subclass: each attribute would go through its __torch_function__, in Python.
        with torch._C.DisableTorchFunctionSubclass():
            return all(map(_holds, _linears(layer), self.blocks))

    def take_back(self, layer: Any) -> bool:
        """Make the weights of the layer's projections parts of this one again where a loader has replaced them.

        Compiled code goes on reading this weight, so it has to get what was loaded. Answers whether it has.
        """
        with torch._C.DisableTorchFunctionSubclass():
            for linear, block in zip(_linears(layer), self.blocks, strict=True):
                weight = linear._parameters.get("weight")
                if not _holds(linear, block) and weight is not None and weight.shape == block.shape:
                    block.copy_(weight.data)
                    weight.data = block
        in_place = self.is_of(layer)
        if not in_place:
            for linear in _linears(layer):
                vars(linear.quant_method).pop("process_weights_after_loading", None)
        return in_place


def _leave_unpacked(linear: Any) -> None:
    """In place of what vLLM does on a CPU once a weight is loaded: it keeps a packed copy, and drops the weight. A
    reload would pack another copy, and nothing of it would reach the one weight."""
    linear.cpu_linear = torch.nn.functional.linear


def _linears(layer: Any) -> tuple[Any, Any]:
    return layer.in_proj_qkvz, layer.in_proj_ba


def _fits(weight: torch.Tensor, block: torch.Tensor) -> bool:
    return (weight.shape, weight.dtype, weight.device) == (block.shape, block.dtype, block.device)


def _holds(linear: Any, block: torch.Tensor) -> bool:
    weight = linear._parameters.get("weight")
    if weight is None or linear._parameters.get("bias") is not None:
        return False
    return _fits(weight, block) and weight.data_ptr() == block.data_ptr() and weight.stride() == block.stride()


def rows_to_choose_from(outputs: int, row_bytes: int) -> list[int]:
    """Numbers of rows that the one weight may have for so many outputs, the fewest first."""
    found = [_padded(outputs, ROW_ALIGNMENT)]
    for multiple in PADDED_TO:
        rows = _padded(outputs, multiple)
        if rows > found[-1] and (rows - outputs) * row_bytes <= MOST_PADDING:
            found.append(rows)
    return found


def _padded(rows: int, multiple: int) -> int:
    """The least multiple from ``rows`` on."""
    return rows + -rows % multiple
