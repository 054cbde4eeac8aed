"""The one weight of a layer's two projections, for one GEMM that gives both results, and how it is allocated."""

import weakref
from collections.abc import Collection
from contextlib import suppress
from typing import Any

import torch

from vllm_gdn_plugin.decide.plan import FUSED, rows_by_way
from vllm_gdn_plugin.report import unexpected

SAME = 0.01
"""Two results of the same weights in bf16 differ by less than this share of their norm."""

ROUNDED_TO, ROUNDED_FROM = 2 * 2**20, 10 * 2**20
"""Bytes: PyTorch's CUDA allocator takes more than the second from the GPU by multiples of the first. Of what is over,
no other weight is given a part: vLLM loads with ``max_split_size_mb:20``."""

MAX_LAYERS = 8
"""How many layers' weights are allocated at once, at the most: while a model is loaded, room for those to come is taken
already."""

_latest: "weakref.ref[FusedProjections] | None" = None


def layers_per_allocation(size: int, beyond: int, device: torch.device) -> int:
    """For how many layers to allocate ``size`` bytes each at once, and ``beyond`` after the last, that each lose the
    least to that and to rounding."""

    def lost(layers: int) -> float:
        taken = layers * size + beyond
        return (beyond + (-taken % ROUNDED_TO if taken > ROUNDED_FROM else 0)) / layers

    return min(range(1, MAX_LAYERS + 1), key=lost) if device.type == "cuda" else 1


def release_replaced() -> None:
    """Free the weight whose place the storage of the latest layer has taken. Called just before the next such layer is
    constructed, which takes these very bytes for a weight of the same size; the last one's is freed once it is loaded.

    Freed at once, it would be PyTorch's allocator that has them: another kind of layer gets a part, the rest is lost.
    """
    latest = _latest() if _latest else None
    if latest is not None:
        latest.replaced = None


class Allocation:
    """Weights of one shape for several layers, of which each new layer is given the next.

    Args:
        rows: of one layer's weight.
        reach: rows that a layer's GEMM may read from the first of its own on: those in addition are the next layer's,
            or nobody's.
        like: a weight (out, hidden_size).
    """

    def __init__(self, rows: int, reach: int, like: torch.Tensor, layers: int) -> None:
        self.kind = (rows, reach, like.shape[1], like.dtype, like.device)
        self.rows, self.reach, self.layers = rows, reach, layers
        every = torch.zeros(layers * rows + reach - rows, like.shape[1], dtype=like.dtype, device=like.device)
        self.left = [every[layer * rows :][:reach] for layer in range(layers)]
        self.held_by: weakref.WeakSet[FusedProjections] = weakref.WeakSet()
        self.settled = False
        """No layer is moved any more: one may be at work."""

    def __deepcopy__(self, memo: Any) -> "Allocation":
        return self  # a copy of a layer has weights of its own, and no part of this

    def fits(self, rows: int, reach: int, like: torch.Tensor) -> bool:
        return bool(self.left) and self.kind == (rows, reach, like.shape[1], like.dtype, like.device)

    def settle(self) -> None:
        """Called when loading is done: give back what no layer came for, or a loader has replaced; where there is no
        memory to move the others, this is kept."""
        if self.settled:
            return
        kept = [each for each in self.held_by if each._is_in_place()]
        with suppress(torch.OutOfMemoryError):
            for each in self.held_by.difference(kept):
                each._leave()
            if kept and len(kept) < self.layers:
                exact = Allocation(self.rows, self.reach, kept[0].weight, len(kept))
                for each in kept:
                    each._move(exact)
                exact.settled = True
        self.left, self.settled = [], True


def allocated(rows: int, reach: int, like: torch.Tensor) -> Allocation:
    """One with room for a layer or more: for one where there is no memory for more. Raises OutOfMemoryError."""
    row = like.shape[1] * like.itemsize
    layers = layers_per_allocation(rows * row, (reach - rows) * row, like.device)
    with suppress(torch.OutOfMemoryError):
        return Allocation(rows, reach, like, layers)
    return Allocation(rows, reach, like, 1)


class Views(dict[str, torch.Tensor]):
    """Of weights, which are not copied with a layer: what is copied has weights of its own, and would not use these."""

    def __deepcopy__(self, memo: Any) -> "Views":
        return Views()


class FusedProjections:
    """Stands in for one linear layer whose weight holds ``in_proj_qkvz`` above ``in_proj_ba``.

    Both parameters keep their objects, shapes and loaders; their data become row blocks of one weight, so that
    whatever is written into them (a loader, a reload, a refit) is what the one GEMM reads.

    Args:
        qkvz, ba: vLLM's linear layers, unquantised, with weights (out, in) of one dtype and device.
        ways: in which the layer may be run. With those in which the one GEMM has more rows, so has every result.
    """

    def __init__(self, qkvz: Any, ba: Any, ways: Collection[str] = ()) -> None:
        self.qkvz, self.ba = qkvz, ba
        self.sizes = (qkvz.weight.shape[0], ba.weight.shape[0])
        self.rows = {way: n for way, n in rows_by_way(sum(self.sizes)).items() if way == FUSED or way in ways}
        self.is_padded = len(self.rows) > 1
        self.padding = max(self.rows.values()) - sum(self.sizes)
        self._packed: tuple[Any, Any] | None = None
        self._loaded = False
        self.broken = False
        replaced, sizes = qkvz.weight.data, (self.rows[FUSED], max(self.rows.values()))
        global _latest
        latest = _latest() if _latest else None
        joined = latest.allocation if latest is not None and latest.allocation.fits(*sizes, replaced) else None
        self._move(joined or allocated(*sizes, replaced))
        release_replaced()  # at most one is kept
        self.replaced: torch.Tensor | None = replaced
        _latest = weakref.ref(self)

    def _move(self, allocation: Allocation) -> None:
        """Take the next weight of ``allocation``, with the content of the projections' own."""
        reached = allocation.left[-1]
        weight = reached[: allocation.rows]
        blocks = weight.split([*self.sizes, allocation.rows - sum(self.sizes)])
        for linear, block in zip((self.qkvz, self.ba), blocks, strict=False):
            block.copy_(linear.weight.data)
        parameter = torch.nn.Parameter(weight, requires_grad=False)
        where = tuple(_whereabouts(block) for block in blocks[:2])
        allocation.left.pop()  # where a step before fails, everything is as it was
        allocation.held_by.add(self)
        self.allocation, self.weight, self._where = allocation, parameter, where
        rows = self.rows if self.is_padded else {}  # vLLM's own linear method needs none, and may drop the weight
        self._read_by = Views({way: reached[:n].t() for way, n in rows.items()})
        self.qkvz.weight.data, self.ba.weight.data = blocks[:2]

    def _leave(self) -> None:
        """Give the projection that a loader has not replaced a weight of its own again."""
        storage = self.weight.untyped_storage().data_ptr()
        for linear in (self.qkvz, self.ba):
            weight = linear._parameters.get("weight")
            if weight is not None and weight.untyped_storage().data_ptr() == storage:
                weight.data = weight.data.clone()

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
        self.allocation.settle()
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
                self.allocation.settled = True  # for a loader that does not call is_loaded
                return None
            packed = self._packed_weights()
        except Exception as error:
            return unexpected(error)
        if packed is not None and self._is_as_packed(packed, layer, hidden_states):
            return None
        return "the weight of in_proj_qkvz or in_proj_ba was replaced or moved after loading"

    def apply(self, hidden_states: torch.Tensor, way: str = FUSED) -> torch.Tensor:
        """Both projections of ``hidden_states`` (num_tokens, hidden_size): (num_tokens, qkvz + ba + padding)."""
        if not self.is_padded:
            return self.qkvz.quant_method.apply(self, hidden_states)
        both = hidden_states.new_empty((hidden_states.shape[0], sum(self.sizes) + self.padding))
        torch.mm(hidden_states, self._read_by[way], out=both[:, : self.rows[way]])
        return both

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
        qkvz, ba = self.qkvz._parameters.get("weight"), self.ba._parameters.get("weight")
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
            pairs = list(zip(both.double().split(sizes, -1), one_by_one.double().split(sizes, -1), strict=True))[:2]
            same = all((one - other).norm() <= SAME * other.norm() for one, other in pairs)
            self._packed = now if same else (None, None)
        return all(one is other for one, other in zip(now, self._packed, strict=True))


def _whereabouts(weight: torch.Tensor) -> tuple[object, ...]:
    return weight.data_ptr(), weight.shape, weight.stride(), weight.dtype
