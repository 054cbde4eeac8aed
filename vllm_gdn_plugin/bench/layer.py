"""A decode step of one layer, from its projections' input to ``out_proj``: stock vLLM beside the plugin."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vllm_gdn_plugin.bench.errors import BadInput, WrongResult
from vllm_gdn_plugin.bench.projections import SEED, at_each_size, layer_count, prepare, times_of_a_layer
from vllm_gdn_plugin.bench.results import LAYER, Point, Run
from vllm_gdn_plugin.bench.shapes import Shape
from vllm_gdn_plugin.bench.timing import Timer
from vllm_gdn_plugin.bench.verify import PROJECTIONS, Outputs
from vllm_gdn_plugin.decide.plan import DUAL_STREAM, SERIAL
from vllm_gdn_plugin.report import DECODE_KERNEL

STEPS = 3
"""Of a batch, from the same states in each way; outputs and states are compared after the last."""

ROUNDED = {torch.float32: 1e-3, torch.bfloat16: 2e-2}
"""Difference as a share of the norm that is allowed where the same is rounded otherwise, by the dtype compared."""

OTHER_GEMM = 2e-2
"""The same where another GEMM gave q, k, v and z in bfloat16."""

COMPARED = ("output", "conv state", "recurrent state")

Way = Callable[[Any, torch.Tensor], Outputs]
"""Runs a batch, which is a layer with states: a :class:`vllm_gdn_plugin.run.proof.ScratchLayer` with ``indices``."""


@dataclass(frozen=True)
class Model:
    """How the GDN layers of a model are made, and run."""

    shape: Shape
    precision: str
    strategy: str
    """What the plugin runs the projections with."""
    ways: Mapping[str, Way]
    make: Callable[[], Any]
    """A layer with random weights."""
    batch: Callable[[Any, int], Any]
    """A layer with random states for so many tokens."""


def ways(
    strategy: str, project: Mapping[str, Callable[..., Any]], stock: Any, norm: Callable[..., torch.Tensor]
) -> dict[str, Way]:
    """Stock vLLM, the plugin's projections alone, the same with the decode kernel, and what no way can beat.

    Args:
        strategy: of the projections.
        project: by strategy, (qkvz, ba) of a layer for hidden states.
        stock: vLLM's class of the layer.
        norm: vLLM's gated norm, of (num_tokens, HV, 128) and a gate of that shape.
    """

    def by_vllm(batch: Any, out: torch.Tensor) -> torch.Tensor:
        batch.decode_by_vllm(stock, batch.indices, out, norm=False)
        return norm(out, batch.qkvz[:, batch.qkvz.shape[1] - out[0].numel() :].view_as(out))

    def by_kernel(batch: Any, out: torch.Tensor) -> torch.Tensor:
        batch.decode_by_kernel(batch.indices, out)
        return out

    def way(strategy: str, decode: Callable[[Any, torch.Tensor], torch.Tensor]) -> Way:
        def run(batch: Any, hidden_states: torch.Tensor) -> Outputs:
            batch.qkvz, batch.ba = project[strategy](batch, hidden_states)
            return (decode(batch, batch.empty_output()),)

        return run

    def limit(batch: Any, hidden_states: torch.Tensor) -> Outputs:
        batch.kv_cache[1][: len(hidden_states)].mul_(1)
        return (batch.in_proj_qkvz(hidden_states)[0],)

    found = {LAYER.baseline: way(SERIAL, by_vllm)}
    if strategy != SERIAL:
        found[strategy] = way(strategy, by_vllm)
    return {**found, with_kernel(strategy): way(strategy, by_kernel), LAYER.limit: limit}


def with_kernel(strategy: str) -> str:
    """The way with the decode kernel, as the plugin's log names it."""
    return DECODE_KERNEL if strategy == SERIAL else f"{strategy} + {DECODE_KERNEL}"


def measure(model: Model, tokens: Sequence[int], layers: int | None, timer: Timer, run: Run, progress: Any) -> None:
    """Append every point to ``run`` as it is done; ``progress`` is a tqdm over all of them.

    Args:
        layers: in a graph; None for as many as do not fit the cache.

    Raises:
        WrongResult: at the first point that does not verify; it is not timed.
        BadInput: where it does not fit the GPU.
    """
    torch.manual_seed(SEED)
    with torch.no_grad():
        first = model.make()
        weights = {name: sum(p.nbytes for p in getattr(first, name).parameters()) for name in PROJECTIONS}
        count = layers or layer_count(sum(weights.values()), run.machine.l2_cache_bytes, timer.min_layers)
        try:
            made = [first, *(model.make() for _ in range(count - 1))]
        except torch.OutOfMemoryError as error:
            raise BadInput(f"the memory of the GPU is too small for {count} layers: --layers takes fewer") from error

        def point(tokens: int) -> Point:
            batches = [model.batch(layer, tokens) for layer in made]
            out, states = batches[-1].empty_output(), batches[-1].kv_cache
            hidden_states = torch.randn(tokens, model.shape.hidden, dtype=out.dtype, device=out.device)
            prepared, outputs = prepare(timer, model.ways, batches, hidden_states)
            verify(after_some_steps(prepared, outputs, states), model.strategy)
            read = hidden_states.nbytes + 2 * tokens * states[1][0].nbytes + weights["in_proj_qkvz"]
            moved = dict.fromkeys(prepared, read + out.nbytes + weights["in_proj_ba"])
            moved[LAYER.limit] = read + outputs[LAYER.limit][0].nbytes
            times = times_of_a_layer(timer, prepared, run.rounds, count)
            return Point(model.shape, tokens, count, moved, times)

        at_each_size(run, model.shape, tokens, point, progress)


def after_some_steps(
    prepared: Mapping[str, Callable[[], object]], outputs: Mapping[str, Outputs], states: Sequence[torch.Tensor]
) -> dict[str, Outputs]:
    """By way, for one layer: its output, its conv states and its recurrent states, from the same states on.

    Args:
        prepared: what is timed.
        outputs, states: of that layer; a run overwrites them.
    """
    before = [state.clone() for state in states]
    found = {}
    for way in prepared.keys() - {LAYER.limit}:
        for state, saved in zip(states, before, strict=True):
            state.copy_(saved)
        for _ in range(STEPS):
            prepared[way]()
        found[way] = tuple(tensor.clone() for tensor in (*outputs[way], *states))
    return found


def verify(found: Mapping[str, Outputs], strategy: str) -> None:
    """Hold the strategy against stock vLLM, and the decode kernel against vLLM's own on the same projections.

    dual_stream gives the same bits. Another GEMM rounds otherwise, and so does the kernel, but not in the conv state.

    Raises:
        WrongResult: naming the way and what is wrong in it.
    """
    stock, kernel = LAYER.baseline, with_kernel(strategy)
    pairs: list[tuple[str, str, tuple[float | None, ...]]] = [(kernel, stock, (None, 0.0, None))]
    if strategy != SERIAL:
        most = 0.0 if strategy == DUAL_STREAM else OTHER_GEMM
        pairs = [(strategy, stock, (most, most, most)), (kernel, strategy, (None, 0.0, None))]
    for way, against, limits in pairs:
        for what, one, other, limit in zip(COMPARED, found[way], found[against], limits, strict=True):
            allowed = ROUNDED[one.dtype] if limit is None else limit
            differs = float((one.double() - other.double()).norm() / other.double().norm())
            if not differs <= allowed:  # also where it is no number
                raise WrongResult(
                    f"{way}: its {what} differs from {against}'s by {differs:.1e} of the norm, more than {allowed}"
                )
