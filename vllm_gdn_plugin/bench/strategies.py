"""One layer's projections with random weights, and the ways to run them."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F

from vllm_gdn_plugin.bench.results import QKVZ
from vllm_gdn_plugin.bench.shapes import Shape
from vllm_gdn_plugin.bench.verify import Outputs
from vllm_gdn_plugin.decide.plan import DUAL_STREAM, NARROW_KERNEL, PADDED_TO, SERIAL, choices_at
from vllm_gdn_plugin.run.fused import FusedProjections

Linear = Callable[[torch.Tensor], torch.Tensor]
Step = Callable[["Projections", torch.Tensor], Outputs]


@dataclass(frozen=True)
class Projections:
    """The projections of one layer; both map (num_tokens, hidden) to (num_tokens, out)."""

    qkvz: Linear
    ba: Linear
    weight_bytes: dict[str, int]
    """By strategy: the weights that it reads."""
    fused: FusedProjections | None = None
    """Where one GEMM can serve both."""
    ba_weight: torch.Tensor | None = None
    """(ba, hidden), where one GEMM cannot serve both and ``in_proj_ba`` may have a kernel of its own."""

    def reference(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor | None, ...] | None:
        """The outputs in float64 that a strategy may round differently from serial."""
        if self.ba_weight is not None:
            return None, F.linear(hidden_states.double(), self.ba_weight.double())
        if self.fused is None:
            return None
        both = F.linear(hidden_states.double(), self.fused.weight.double())
        return both[:, : self.fused.sizes[0]], both[:, self.fused.sizes[0] : sum(self.fused.sizes)]


def random_weight(rows: int, hidden: int, dtype: torch.dtype, device: str) -> torch.nn.Parameter:
    """(rows, hidden), scaled so that an input of unit variance gives an output of unit variance."""
    weight = torch.randn(rows, hidden, dtype=dtype, device=device) * hidden**-0.5
    return torch.nn.Parameter(weight, requires_grad=False)


def unquantized(shape: Shape, dtype: torch.dtype, device: str) -> Projections:
    """Both projections on weights of one dtype, in the plugin's own storage: row blocks of the fused weight. On a GPU
    the one GEMM has the ways that ``auto`` may choose from."""
    method = SimpleNamespace(apply=lambda layer, x: F.linear(x, layer.weight))
    qkvz, ba = (
        SimpleNamespace(weight=random_weight(n, shape.hidden, dtype, device), quant_method=method)
        for n in (shape.qkvz, shape.ba)
    )
    one = FusedProjections(qkvz, ba, PADDED_TO if device == "cuda" else ())
    first, second = qkvz.weight, ba.weight
    row = shape.hidden * dtype.itemsize
    return Projections(
        lambda x: F.linear(x, first),
        lambda x: F.linear(x, second),
        {
            SERIAL: first.nbytes + second.nbytes,
            DUAL_STREAM: first.nbytes + second.nbytes,
            QKVZ: first.nbytes,
            **{way: rows * row for way, rows in one.rows.items()},
        },
        one,
    )


def serial(layer: Projections, hidden_states: torch.Tensor) -> Outputs:
    """One after the other, as vLLM does."""
    return layer.qkvz(hidden_states), layer.ba(hidden_states)


def fused(way: str, layer: Projections, hidden_states: torch.Tensor) -> Outputs:
    """One GEMM, with the rows of this way; the outputs are views of its result."""
    assert layer.fused is not None
    both = layer.fused.apply(hidden_states, way)
    qkvz, ba, _ = both.split([*layer.fused.sizes, layer.fused.padding], dim=-1)
    return qkvz, ba


def qkvz_alone(layer: Projections, hidden_states: torch.Tensor) -> Outputs:
    """What would be left if ``in_proj_ba`` cost nothing."""
    return (layer.qkvz(hidden_states),)


def dual_stream(aux_stream: Any | None, ba_first: bool = False) -> Step:
    """Side by side, as the plugin does: in_proj_qkvz on the current stream and enqueued first, in_proj_ba on
    ``aux_stream``; serially where there is none. With ``ba_first``, in_proj_ba is enqueued first."""
    if aux_stream is None:
        return serial

    def step(layer: Projections, hidden_states: torch.Tensor) -> Outputs:
        fork, join = torch.cuda.Event(), torch.cuda.Event()
        fork.record()
        if not ba_first:
            qkvz = layer.qkvz(hidden_states)
        with torch.cuda.stream(aux_stream):
            fork.wait()
            ba = layer.ba(hidden_states)
            join.record()
        if ba_first:
            qkvz = layer.qkvz(hidden_states)
        join.wait()
        return qkvz, ba

    return step


def narrow_kernel(aux_stream: Any | None) -> Step:
    """Side by side, in_proj_ba with the plugin's own kernel."""
    from vllm_gdn_plugin.run import narrow

    step = dual_stream(aux_stream)
    return lambda layer, x: step(replace(layer, ba=lambda x: narrow.linear(x, layer.ba_weight)), x)


def steps(layer: Projections, aux_stream: Any | None, num_tokens: int) -> dict[str, Step]:
    """The ways in which ``layer`` can be run with so many tokens."""
    ways: dict[str, Step] = {SERIAL: serial, DUAL_STREAM: dual_stream(aux_stream), QKVZ: qkvz_alone}
    if layer.fused is not None:
        ways |= {way: partial(fused, way) for way in layer.fused.rows}
    if layer.ba_weight is not None and NARROW_KERNEL in choices_at((NARROW_KERNEL,), num_tokens):
        ways[NARROW_KERNEL] = narrow_kernel(aux_stream)
    return ways


def bytes_moved(layer: Projections, strategy: str, hidden_states: torch.Tensor, outputs: Outputs) -> int:
    """Per layer: weights, activations in and outputs out, each once (serial reads the activations a second time,
    from the cache)."""
    return layer.weight_bytes[strategy] + sum(int(tensor.nbytes) for tensor in (hidden_states, *outputs))
