"""The custom ops that project the input of a GDN layer: ``gdn_in_proj`` and ``gdn_fused_in_proj``.

Importing this module registers them. They lie in a library of our own: vLLM may one day have ops of these names.
Both take the layer's key in the forward context. As a ``LayerName`` it is an input of the compiled graph, so that
all layers share one artifact; as a string it would make one artifact per layer (the reason for which vLLM undid its
first such op: vLLM #38152).
"""

from collections.abc import Callable
from typing import Any

import torch
from vllm.utils.multi_stream_utils import maybe_execute_in_parallel
from vllm.utils.torch_utils import LayerNameType, aux_stream, direct_register_custom_op

from vllm_gdn_plugin import host
from vllm_gdn_plugin.overlap import StaysSerial, stays_serial
from vllm_gdn_plugin.plan import FUSED, NARROW_KERNEL, SERIAL
from vllm_gdn_plugin.report import unexpected, warn_once

_library = torch.library.Library("vllm_gdn_plugin", "FRAGMENT")

Overlap = tuple[torch.cuda.Event, torch.cuda.Event, torch.cuda.Stream] | tuple[None, None, None]
"""The last arguments of ``maybe_execute_in_parallel``: two events and a stream, or none, to run serially."""
SERIALLY = (None, None, None)


def gdn_in_proj(
    hidden_states: torch.Tensor,
    qkvz_size: int,
    ba_size: int,
    layer_name: LayerNameType,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Project ``hidden_states`` with the layer's ``in_proj_qkvz`` and ``in_proj_ba``, side by side where it pays, and
    ``in_proj_ba`` with the plugin's own kernel where that was timed as faster.

    Args:
        hidden_states: (num_tokens, hidden_size), in the model's dtype.
        qkvz_size: ``in_proj_qkvz.output_size_per_partition``.
        ba_size: ``in_proj_ba.output_size_per_partition``.
        layer_name: the layer's key in the forward context.

    Returns:
        (num_tokens, qkvz_size) and (num_tokens, ba_size), contiguous, in the dtype of ``hidden_states``.

    What a projection raises, an out-of-memory say, passes through; so does a failure to find the layer, which vLLM's
    own GDN op looks up in the same way. Should the overlap or the plugin's kernel fail, the call does without it, and a
    line says why once.
    """
    layer = host.layer_by_name(layer_name)
    overlap = fork_and_join(layer, hidden_states)
    if overlap is not SERIALLY and layer.gdn_tuned.get(hidden_states.size(0)) == NARROW_KERNEL:
        return project_narrow(layer, hidden_states, overlap)
    return project_apart(layer, hidden_states, overlap)


def project_apart(layer: Any, hidden_states: torch.Tensor, overlap: Overlap) -> tuple[torch.Tensor, torch.Tensor]:
    """Both projections as the layer has them, side by side where ``overlap`` holds a stream."""
    return maybe_execute_in_parallel(  # type: ignore[no-any-return]
        lambda: layer.in_proj_qkvz(hidden_states)[0], lambda: layer.in_proj_ba(hidden_states)[0], *overlap
    )


def project_ba_narrow(layer: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    """``in_proj_ba`` with the plugin's kernel."""
    from vllm_gdn_plugin import narrow  # needs Triton, which vLLM has where there is a GPU

    return narrow.linear(hidden_states, layer.in_proj_ba.weight)


def project_ba_narrow_or_not(layer: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    """``in_proj_ba`` with the plugin's kernel; as the layer has it where that fails."""
    try:
        return project_ba_narrow(layer, hidden_states)
    except Exception as error:
        warn_once(f"{NARROW_KERNEL} failed and is left out", unexpected(error))
        return layer.in_proj_ba(hidden_states)[0]


def project_narrow(
    layer: Any,
    hidden_states: torch.Tensor,
    overlap: Overlap,
    project_ba: Callable[[Any, torch.Tensor], torch.Tensor] = project_ba_narrow_or_not,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As :func:`project_apart`, with ``project_ba`` for ``in_proj_ba``, which is enqueued first: by the median over the
    shapes on an NVIDIA H200 the plugin's kernel is 3 % faster so at 1 token (benchmarks/NOTES.md)."""
    fork, join, stream = overlap
    if fork is None or join is None:
        return layer.in_proj_qkvz(hidden_states)[0], project_ba(layer, hidden_states)
    fork.record()
    with torch.cuda.stream(stream):
        fork.wait()
        ba = project_ba(layer, hidden_states)
        join.record()
    qkvz = layer.in_proj_qkvz(hidden_states)[0]
    join.wait()
    return qkvz, ba


def fork_and_join(layer: Any, hidden_states: torch.Tensor) -> Overlap:
    """The two events and the stream of a call that overlaps; none for one that runs serially, also where this fails."""
    try:
        reason = why_serial(layer, hidden_states)
        if reason is StaysSerial.NOT_CAPTURING:
            host.prepare_aux_stream()
        if reason is not None:
            return SERIALLY
        # Only reached while a graph is captured: events made here cost nothing at replay and are shared with nobody.
        return torch.cuda.Event(), torch.cuda.Event(), aux_stream()
    except Exception as error:
        warn_once("dual_stream failed and runs serially", unexpected(error))
        return SERIALLY


def why_serial(layer: Any, hidden_states: torch.Tensor) -> StaysSerial | None:
    """Why this call of the op runs serially, or None when it overlaps."""
    on_cuda = hidden_states.is_cuda and torch.version.hip is None
    return stays_serial(
        aux_stream=on_cuda,
        safe_pair=layer.gdn_safe_pair,
        capturing=on_cuda and torch.cuda.is_current_stream_capturing(),
        breakable_capture=on_cuda and host.breakable_capture(),
        num_tokens=hidden_states.size(0),
        max_tokens=layer.gdn_max_tokens,
        timed_slower=layer.gdn_tuned.get(hidden_states.size(0)) == SERIAL,
    )


def _fake(
    hidden_states: torch.Tensor,
    qkvz_size: int,
    ba_size: int,
    layer_name: LayerNameType,
) -> tuple[torch.Tensor, torch.Tensor]:
    num_tokens = hidden_states.size(0)
    return hidden_states.new_empty((num_tokens, qkvz_size)), hidden_states.new_empty((num_tokens, ba_size))


def gdn_fused_in_proj(hidden_states: torch.Tensor, size: int, layer_name: LayerNameType) -> torch.Tensor:
    """Project ``hidden_states`` with both weights of the layer in one GEMM, or in two where these were timed as faster.

    vLLM drops the guards of its compiled graphs, so what must hold at every call is asked here: should a weight have
    been replaced or moved, the two projections are computed as stock vLLM would, and the reason is logged once.
    What is raised in it is as in :func:`gdn_in_proj`.

    Args:
        hidden_states: (num_tokens, hidden_size), in the model's dtype.
        size: outputs of ``in_proj_qkvz`` and ``in_proj_ba``, and the padding.
        layer_name: the layer's key in the forward context.

    Returns:
        (num_tokens, size), contiguous, in the dtype of ``hidden_states``: qkvz, ba, padding.
    """
    layer = host.layer_by_name(layer_name)
    fused = layer.gdn_fused
    if not fused.broken:
        reason = fused.why_broken(layer, hidden_states)
        if reason is None:
            way = way_to_fuse(layer, hidden_states)
            if way in fused.rows:
                return fused.apply(hidden_states, way)
            return project_fused_apart(layer, hidden_states, fork_and_join(layer, hidden_states))
        fused.broken = True
        warn_once("a GDN layer goes back to serial, restart to fuse again", reason)
    return fused.apply_serially(layer, hidden_states)


def way_to_fuse(layer: Any, hidden_states: torch.Tensor) -> str:
    """fused, or where this call is captured in a CUDA graph, what was timed to be faster in such a graph."""
    way: str = layer.gdn_tuned.get(hidden_states.size(0), FUSED)
    return way if way != FUSED and torch.cuda.is_current_stream_capturing() else FUSED


def project_fused_apart(layer: Any, hidden_states: torch.Tensor, overlap: Overlap) -> torch.Tensor:
    """What one GEMM of a fused layer gives, by two into one result, side by side where ``overlap`` holds a stream."""
    fused = layer.gdn_fused
    both, qkvz, ba = fused.result_for(hidden_states)
    maybe_execute_in_parallel(
        lambda: torch.mm(hidden_states, fused.qkvz.weight.t(), out=qkvz),
        lambda: torch.mm(hidden_states, fused.ba.weight.t(), out=ba),
        *overlap,
    )
    return both


def _fake_fused(hidden_states: torch.Tensor, size: int, layer_name: LayerNameType) -> torch.Tensor:
    return hidden_states.new_empty((hidden_states.size(0), size))


direct_register_custom_op("gdn_in_proj", gdn_in_proj, fake_impl=_fake, target_lib=_library)
direct_register_custom_op("gdn_fused_in_proj", gdn_fused_in_proj, fake_impl=_fake_fused, target_lib=_library)
