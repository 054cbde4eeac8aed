"""One storage behind both projections' weights, so that one GEMM gives both results."""

import weakref
from typing import Any

import torch

from vllm_gdn_plugin.report import unexpected

ROW_ALIGNMENT = 16
"""Output rows are padded to a multiple of this many elements: the consumers' Triton kernels load vectors only where
the row stride is divisible by 16."""


SAME = 0.01
"""Two results of the same weights in bf16 differ by less than this share of their norm."""

_latest: "weakref.ref[FusedProjections] | None" = None


def release_replaced() -> None:
    """Free the weight whose place the storage of the latest layer has taken. Called just before the next such layer is
    constructed, which takes these very bytes for a weight of the same size; the last one's is freed once it is loaded.

    Freed at once, it would be PyTorch's allocator that has them: another kind of layer gets a part, the rest is lost.
    """
    latest = _latest() if _latest else None
    if latest is not None:
        latest.replaced = None


class FusedProjections:
    """Stands in for one linear layer whose weight holds ``in_proj_qkvz`` above ``in_proj_ba``.

    Both parameters keep their objects, shapes and loaders; their data become row blocks of one storage, so that
    whatever is written into them (a loader, a reload, a refit) is what the one GEMM reads.

    Args:
        qkvz, ba: vLLM's linear layers, unquantised, with weights (out, in) of one dtype and device.
    """

    def __init__(self, qkvz: Any, ba: Any) -> None:
        self.qkvz, self.ba = qkvz, ba
        self.sizes = (qkvz.weight.shape[0], ba.weight.shape[0])
        rows = -sum(self.sizes) % ROW_ALIGNMENT + sum(self.sizes)
        self.padding = rows - sum(self.sizes)
        weight = qkvz.weight
        storage = torch.zeros((rows, weight.shape[1]), dtype=weight.dtype, device=weight.device)
        blocks = storage.split([*self.sizes, self.padding])
        for linear, block in zip((qkvz, ba), blocks, strict=False):
            block.copy_(linear.weight.data)
        self.weight = torch.nn.Parameter(storage, requires_grad=False)
        self._where = tuple(_whereabouts(block) for block in blocks[:2])
        self._packed: tuple[Any, Any] | None = None
        self._loaded = False
        self.broken = False
        self.replaced: torch.Tensor | None = weight.data
        qkvz.weight.data, ba.weight.data = blocks[:2]  # last: where a step before fails, the layer is as it was
        release_replaced()  # at most one is kept
        global _latest
        _latest = weakref.ref(self)

    def __getattr__(self, name: str) -> Any:
        if name == "qkvz":  # not yet there, as in a copy that is being made
            raise AttributeError(name)
        return getattr(self.qkvz, name)

    def is_loaded(self) -> bool:
        """Called when the loader is done: let the linear method do to the one weight what it does to every weight
        (the CPU packs it), or answer False where the loader did not write into it. A reload comes here again."""
        self.replaced = None
        if self._loaded:
            return True
        if not self._is_in_place():
            return False
        self.qkvz.quant_method.process_weights_after_loading(self)
        self._loaded = True
        return True

    def why_broken(self, layer: Any, hidden_states: torch.Tensor) -> str | None:
        """Why the one weight no longer stands for the layer's projections, or None.

        Asked before every GEMM; launches no kernel once the first was asked. Where asking fails, that is the reason;
        what the projections themselves raise passes through.
        """
        try:
            if layer.in_proj_qkvz is not self.qkvz or layer.in_proj_ba is not self.ba:
                return "in_proj_qkvz or in_proj_ba was replaced after loading"
            if self.qkvz._parameters["bias"] is not None or self.ba._parameters["bias"] is not None:
                return "in_proj_qkvz or in_proj_ba was given a bias after loading"
            if self._is_in_place():
                return None
            packed = self._packed_weights()
        except Exception as error:
            return unexpected(error)
        if packed is not None and self._is_as_packed(packed, layer, hidden_states):
            return None
        return "the weight of in_proj_qkvz or in_proj_ba was replaced or moved after loading"

    def apply(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Both projections of ``hidden_states`` (num_tokens, hidden_size): (num_tokens, qkvz + ba + padding)."""
        return self.qkvz.quant_method.apply(self, hidden_states)

    def result_for(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What :meth:`apply` gives, yet to be computed, and its blocks for ``in_proj_qkvz`` and ``in_proj_ba``."""
        both = hidden_states.new_empty((hidden_states.shape[0], sum(self.sizes) + self.padding))
        qkvz, ba, _ = both.split([*self.sizes, self.padding], dim=-1)
        return both, qkvz, ba

    def apply_serially(self, layer: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        """What :meth:`apply` gives, from the layer's projections as they are now: always right, never fast."""
        qkvz, ba = layer.in_proj_qkvz(hidden_states)[0], layer.in_proj_ba(hidden_states)[0]
        return torch.cat([qkvz, ba, ba.new_zeros((ba.shape[0], self.padding))], dim=-1)

    def _is_in_place(self) -> bool:
        # Both from where nn.Module keeps them: its __getattr__ would be a large part of what a call costs.
        qkvz, ba = self.qkvz._parameters["weight"], self.ba._parameters["weight"]
        if qkvz is None or ba is None:
            return False
        # vLLM's parameters are of a subclass: each attribute would go through its __torch_function__, in Python.
        with torch._C.DisableTorchFunctionSubclass():
            return _whereabouts(qkvz) == self._where[0] and _whereabouts(ba) == self._where[1]

    def _packed_weights(self) -> tuple[Any, Any] | None:
        """vLLM's ``cpu_linear`` of both, where they hold packed weights instead of weights."""
        now = (getattr(self.qkvz, "cpu_linear", None), getattr(self.ba, "cpu_linear", None))
        if None in now or any(linear.weight is None or linear.weight.numel() for linear in (self.qkvz, self.ba)):
            return None
        return now

    def _is_as_packed(self, now: tuple[Any, Any], layer: Any, hidden_states: torch.Tensor) -> bool:
        """Whether both hold the packed weights that they had at the first call.

        Packing drops the weights, so the first call compares the results; from then on the objects count.
        """
        if self._packed is None:
            sizes = [*self.sizes, self.padding]
            both, one_by_one = self.apply(hidden_states), self.apply_serially(layer, hidden_states)
            pairs = zip(both.double().split(sizes, -1), one_by_one.double().split(sizes, -1), strict=True)
            same = all((one - other).norm() <= SAME * other.norm() for one, other in pairs)
            self._packed = now if same else (None, None)
        return all(one is other for one, other in zip(now, self._packed, strict=True))


def _whereabouts(weight: torch.Tensor) -> tuple[object, ...]:
    return weight.data_ptr(), weight.shape, weight.stride(), weight.dtype
