"""The custom ops that project the input of a GDN layer: ``gdn_in_proj_fork`` and ``gdn_in_proj_join`` around vLLM's own
``in_proj_qkvz``, and ``gdn_fused_in_proj``.

Importing this module registers them. They lie in a library of our own: vLLM may one day have ops of these names.
All take the layer's key in the forward context. As a ``LayerName`` it is an input of the compiled graph, so that
all layers share one artifact; as a string it would make one artifact per layer (the reason for which vLLM undid its
first such op: vLLM #38152).
"""

import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from vllm.utils.torch_utils import LayerNameType, aux_stream, direct_register_custom_op

from vllm_gdn_plugin import host
from vllm_gdn_plugin.decide.plan import FUSED, NARROW_KERNEL, SERIAL
from vllm_gdn_plugin.decide.scratch import StaysSerial, stays_serial
from vllm_gdn_plugin.report import unexpected, warn_once

_library = torch.library.Library("vllm_gdn_plugin", "FRAGMENT")


class Fork(NamedTuple):
    """A point of the current stream after which the auxiliary stream may compute ``in_proj_ba``."""

    layer_name: str
    address: int
    """Of ``hidden_states``, which is there by then."""
    stream: torch.cuda.Stream
    reached: torch.cuda.Event
    done: torch.cuda.Event
    """Recorded behind ``in_proj_ba``."""


class _Open(threading.local):
    fork: Fork | None = None


_open = _Open()
"""The fork of this thread that has not been joined yet."""


def gdn_in_proj_fork(hidden_states: torch.Tensor, layer_name: LayerNameType) -> None:
    """Where the layer's two projections are to run side by side, mark that ``hidden_states`` is there.

    ``in_proj_qkvz`` follows, as vLLM runs it, then :func:`gdn_in_proj_join`. The schema says that ``hidden_states`` is
    changed, which it is not: so nothing is computed from it before, and the join is given this very buffer.

    Args:
        hidden_states: (num_tokens, hidden_size), in the model's dtype.
        layer_name: the layer's key in the forward context.

    A failure to find the layer passes through, as in vLLM's own GDN op, which looks it up in the same way. Should
    anything else fail, the projections run serially, and a line says why once.
    """
    layer = host.layer_by_name(layer_name)
    _open.fork = fork(layer, hidden_states)


def gdn_in_proj_join(
    hidden_states: torch.Tensor, qkvz: torch.Tensor, ba_size: int, layer_name: LayerNameType
) -> torch.Tensor:
    """Project ``hidden_states`` with the layer's ``in_proj_ba``, beside what has been enqueued since the fork; with the
    plugin's own kernel where that was timed as faster.

    Args:
        hidden_states: (num_tokens, hidden_size), in the model's dtype, what the fork was given.
        qkvz: what ``in_proj_qkvz`` gave. It is not read: it has to be enqueued before.
        ba_size: ``in_proj_ba.output_size_per_partition``.
        layer_name: the layer's key in the forward context.

    Returns:
        (num_tokens, ba_size), contiguous, in the dtype of ``hidden_states``.

    What the projection raises, an out-of-memory say, passes through; so does a failure to find the layer. Should the
    auxiliary stream not get to the fork, the fork be of another tensor, or the plugin's kernel fail, the call does
    without, and a line says why once.
    """
    layer = host.layer_by_name(layer_name)
    forked, _open.fork = _open.fork, None
    if forked is not None and (forked.layer_name, forked.address) != (layer.prefix, hidden_states.data_ptr()):
        warn_once("dual_stream runs serially in a CUDA graph", "the compiler gave a join not what its fork was given")
        forked = None
    narrow = forked is not None and layer.gdn_tuned.get(hidden_states.size(0)) == NARROW_KERNEL
    project = project_ba_narrow_or_not if narrow else project_ba
    return join(forked, lambda: project(layer, hidden_states))


def project_ba(layer: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    """``in_proj_ba`` as the layer has it."""
    return layer.in_proj_ba(hidden_states)[0]


def project_ba_narrow(layer: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    """``in_proj_ba`` with the plugin's kernel."""
    from vllm_gdn_plugin.run import narrow  # needs Triton, which vLLM has where there is a GPU

    return narrow.linear(hidden_states, layer.in_proj_ba.weight)


def project_ba_narrow_or_not(layer: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    """``in_proj_ba`` with the plugin's kernel; as the layer has it where that fails."""
    try:
        return project_ba_narrow(layer, hidden_states)
    except Exception as error:
        warn_once(f"{NARROW_KERNEL} failed and is left out", unexpected(error))
        return project_ba(layer, hidden_states)


def fork(layer: Any, hidden_states: torch.Tensor) -> Fork | None:
    """The fork of a call that overlaps; none for one that runs serially, also where this fails."""
    try:
        reason = why_serial(layer, hidden_states)
        if reason is StaysSerial.NOT_CAPTURING:
            host.prepare_aux_stream()
        if reason is not None:
            return None
        # Only reached while a graph is captured: events made here cost nothing at replay and are shared with nobody.
        forked = Fork(layer.prefix, hidden_states.data_ptr(), aux_stream(), torch.cuda.Event(), torch.cuda.Event())
        forked.reached.record()
        return forked
    except Exception as error:
        warn_once("dual_stream failed and runs serially", unexpected(error))
        return None


def join(forked: Fork | None, work: Callable[[], torch.Tensor]) -> torch.Tensor:
    """What ``work`` gives, computed on the auxiliary stream from the fork on; on the current one where there is none,
    or none that can be waited for."""
    if forked is None:
        return work()
    try:
        with torch.cuda.stream(forked.stream):
            forked.reached.wait()
            if not torch.cuda.is_current_stream_capturing():
                raise RuntimeError("the fork is not in the CUDA graph that is being captured")
    except Exception as error:
        warn_once("dual_stream failed and runs serially", unexpected(error))
        return work()
    with torch.cuda.stream(forked.stream):
        result = work()
        forked.done.record()
    forked.done.wait()
    return result


def project_apart(
    layer: Any,
    hidden_states: torch.Tensor,
    forked: Fork | None,
    project_ba: Callable[[Any, torch.Tensor], torch.Tensor] = project_ba,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both projections, ``in_proj_ba`` beside ``in_proj_qkvz`` where there is a fork: what fork and join do."""
    qkvz = layer.in_proj_qkvz(hidden_states)[0]
    return qkvz, join(forked, lambda: project_ba(layer, hidden_states))


def why_serial(layer: Any, hidden_states: torch.Tensor) -> StaysSerial | None:
    """Why this call runs the two projections serially, or None when it overlaps them."""
    on_cuda = hidden_states.is_cuda and torch.version.hip is None
    capturing = on_cuda and torch.cuda.is_current_stream_capturing()
    return stays_serial(
        aux_stream=on_cuda,
        safe_pair=layer.gdn_safe_pair,
        capturing=capturing,
        breakable_capture=capturing and host.breakable_capture(),
        num_tokens=hidden_states.size(0),
        max_tokens=layer.gdn_max_tokens,
        timed_slower=layer.gdn_tuned.get(hidden_states.size(0)) == SERIAL,
    )


def _fake_fork(hidden_states: torch.Tensor, layer_name: LayerNameType) -> None:
    """Gives nothing."""


def _fake_join(
    hidden_states: torch.Tensor, qkvz: torch.Tensor, ba_size: int, layer_name: LayerNameType
) -> torch.Tensor:
    return hidden_states.new_empty((hidden_states.size(0), ba_size))


def gdn_fused_in_proj(hidden_states: torch.Tensor, size: int, layer_name: LayerNameType) -> torch.Tensor:
    """Project ``hidden_states`` with both weights of the layer in one GEMM, or in two where these were timed as faster.

    vLLM drops the guards of its compiled graphs, so what must hold at every call is asked here: should a weight have
    been replaced or moved, the two projections are computed as stock vLLM would, and the reason is logged once.
    What is raised in it is as in :func:`gdn_in_proj_join`.

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
            return project_fused_apart(layer, hidden_states, fork(layer, hidden_states))
        fused.broken = True
        warn_once("a GDN layer goes back to serial, restart to fuse again", reason)
    return fused.apply_serially(layer, hidden_states)


def way_to_fuse(layer: Any, hidden_states: torch.Tensor) -> str:
    """fused, or where this call is captured in a CUDA graph, what was timed to be faster in such a graph."""
    way: str = layer.gdn_tuned.get(hidden_states.size(0), FUSED)
    return way if way != FUSED and torch.cuda.is_current_stream_capturing() else FUSED


def project_fused_apart(layer: Any, hidden_states: torch.Tensor, forked: Fork | None) -> torch.Tensor:
    """What one GEMM of a fused layer gives, by two into one result, side by side where there is a fork."""
    fused = layer.gdn_fused
    both, qkvz, ba = fused.result_for(hidden_states)
    torch.mm(hidden_states, fused.qkvz.weight.t(), out=qkvz)
    join(forked, lambda: torch.mm(hidden_states, fused.ba.weight.t(), out=ba))
    return both


def _fake_fused(hidden_states: torch.Tensor, size: int, layer_name: LayerNameType) -> torch.Tensor:
    return hidden_states.new_empty((hidden_states.size(0), size))


direct_register_custom_op("gdn_in_proj_fork", gdn_in_proj_fork, ["hidden_states"], _fake_fork, _library)
direct_register_custom_op("gdn_in_proj_join", gdn_in_proj_join, fake_impl=_fake_join, target_lib=_library)
direct_register_custom_op("gdn_fused_in_proj", gdn_fused_in_proj, fake_impl=_fake_fused, target_lib=_library)
