"""One layer's projections with random weights, and the ways to run them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from vllm_gdn_plugin.bench.results import QKVZ
from vllm_gdn_plugin.bench.shapes import Shape
from vllm_gdn_plugin.bench.verify import Outputs
from vllm_gdn_plugin.decide.plan import DUAL_STREAM, FUSED, SERIAL
from vllm_gdn_plugin.run.fused import rows_to_choose_from

Linear = Callable[[torch.Tensor], torch.Tensor]
Way = Callable[["Projections", torch.Tensor], Outputs]


@dataclass(frozen=True)
class Projections:
    """The projections of one layer; both map (num_tokens, hidden) to (num_tokens, out)."""

    qkvz: Linear
    ba: Linear
    weight_bytes: dict[str, int]
    """By way: the weights that it reads."""
    fused: dict[str, torch.Tensor] = field(default_factory=dict)
    """By way: the one weight (rows, hidden) for both; empty where one GEMM cannot serve both."""
    sizes: tuple[int, int] = (0, 0)
    """The outputs of both, where there is one weight."""

    def reference(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The outputs in float64, where there is one weight: it may round differently from serial."""
        if not self.fused:
            return ()
        both = F.linear(hidden_states.double(), self.fused[FUSED][: sum(self.sizes)].double())
        qkvz, ba = both.split(self.sizes, dim=-1)
        return qkvz, ba


def random_weight(rows: int, hidden: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    """(rows, hidden), scaled so that an input of unit variance gives an output of unit variance."""
    return torch.randn(rows, hidden, dtype=dtype, device=device) * hidden**-0.5


def unquantized(shape: Shape, dtype: torch.dtype, device: str) -> Projections:
    """Both projections on row blocks of one weight, as the plugin lays them. The one GEMM is `fused` with the fewest
    rows that the plugin may give it; with more, the way says how many."""
    first, *more = rows_to_choose_from(shape.qkvz + shape.ba, shape.hidden * dtype.itemsize)
    weight = random_weight(max([first, *more]), shape.hidden, dtype, device)
    qkvz, ba = weight[: shape.qkvz], weight[shape.qkvz : shape.qkvz + shape.ba]
    fused = {FUSED: weight[:first], **{f"{FUSED} to {rows} rows": weight[:rows] for rows in more}}
    both = qkvz.nbytes + ba.nbytes
    return Projections(
        lambda x: F.linear(x, qkvz),
        lambda x: F.linear(x, ba),
        {SERIAL: both, DUAL_STREAM: both, QKVZ: qkvz.nbytes, **{way: one.nbytes for way, one in fused.items()}},
        fused,
        (shape.qkvz, shape.ba),
    )


def serial(layer: Projections, hidden_states: torch.Tensor) -> Outputs:
    """One after the other, as vLLM does."""
    return layer.qkvz(hidden_states), layer.ba(hidden_states)


def fused(way: str, layer: Projections, hidden_states: torch.Tensor) -> Outputs:
    """One GEMM; the outputs are views of its result."""
    both = F.linear(hidden_states, layer.fused[way])
    return both[:, : layer.sizes[0]], both[:, layer.sizes[0] : sum(layer.sizes)]


def qkvz_alone(layer: Projections, hidden_states: torch.Tensor) -> Outputs:
    """What would be left if ``in_proj_ba`` cost nothing."""
    return (layer.qkvz(hidden_states),)


def dual_stream(aux_stream: Any | None) -> Way:
    """Side by side, as the plugin does: in_proj_qkvz on the current stream and enqueued first, in_proj_ba on
    ``aux_stream``; serially where there is none."""
    if aux_stream is None:
        return serial

    def way(layer: Projections, hidden_states: torch.Tensor) -> Outputs:
        fork, join = torch.cuda.Event(), torch.cuda.Event()
        fork.record()
        qkvz = layer.qkvz(hidden_states)
        with torch.cuda.stream(aux_stream):
            fork.wait()
            ba = layer.ba(hidden_states)
            join.record()
        join.wait()
        return qkvz, ba

    return way


def ways(layer: Projections, aux_stream: Any | None) -> dict[str, Way]:
    """The ways in which ``layer`` can be run."""
    found: dict[str, Way] = {SERIAL: serial, DUAL_STREAM: dual_stream(aux_stream), QKVZ: qkvz_alone}
    return found | {way: partial(fused, way) for way in layer.fused}


def bytes_moved(layer: Projections, way: str, hidden_states: torch.Tensor, outputs: Outputs) -> int:
    """Per layer: weights, activations in and outputs out, each once (serial reads the activations a second time,
    from the cache)."""
    return layer.weight_bytes[way] + sum(int(tensor.nbytes) for tensor in (hidden_states, *outputs))
