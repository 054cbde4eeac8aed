"""``in_proj_ba`` on a second CUDA stream: the custom ops ``gdn_in_proj_fork`` and ``gdn_in_proj_join``.

They lie around vLLM's own ``in_proj_qkvz``, which stays what it is in stock vLLM, a part of the compiled graph.

Importing this module registers them. They lie in a library of our own: vLLM may one day have ops of these names.
Both take the layer's key in the forward context. As a ``LayerName`` it is an input of the compiled graph, so that
all layers share one artifact; as a string it would make one artifact per layer (the reason for which vLLM undid its
first such op: vLLM #38152).

The two streams overlap only while a CUDA graph is captured. Elsewhere fork and join would cost the CPU more time than
they hide, so there the ops ask one question, whether a capture is on, and the narrow GEMM follows the wide one.
"""

import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from vllm.utils.torch_utils import LayerNameType, _encode_layer_name, aux_stream, direct_register_custom_op

from vllm_gdn_plugin.decide.plan import DUAL_STREAM, SERIAL
from vllm_gdn_plugin.host import streams
from vllm_gdn_plugin.host.layers import layer_by_name
from vllm_gdn_plugin.host.streams import breakable_capture, is_captured
from vllm_gdn_plugin.report import unexpected, warn_once

MOST_OVERLAPPED = 1024
"""Above this number of tokens in a batch the wide projection fills the GPU and there is nothing left to overlap."""

RAN_SERIALLY = "dual_stream runs serially in a CUDA graph"

_library = torch.library.Library("vllm_gdn_plugin", "FRAGMENT")


class Fork(NamedTuple):
    """A point of the current stream after which the auxiliary stream may compute ``in_proj_ba``."""

    address: int
    """Of ``hidden_states``, which is there by then."""
    stream: torch.cuda.Stream
    reached: torch.cuda.Event
    done: torch.cuda.Event
    """Recorded behind ``in_proj_ba``."""


class _Thread(threading.local):
    fork: Fork | None = None
    """Not joined yet."""
    is_prepared: bool = False
    """cuBLAS has its workspace for the auxiliary stream."""
    prepared_at: int = -1
    """What :data:`streams.times_released` was when that was tried."""


_thread = _Thread()


def project_side_by_side(layer: Any, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both projections of ``hidden_states`` (num_tokens, hidden_size), ``in_proj_ba`` beside ``in_proj_qkvz``."""
    ops, name = torch.ops.vllm_gdn_plugin, _encode_layer_name(layer.prefix)
    ops.gdn_in_proj_fork(hidden_states, name)
    qkvz, _ = layer.in_proj_qkvz(hidden_states)
    ba = layer.in_proj_ba
    weight = ba.weight.t() if layer.gdn.plain_gemm else None
    return qkvz, ops.gdn_in_proj_join(hidden_states, qkvz, weight, ba.output_size_per_partition, name)


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
    _thread.fork = fork(lambda: layer_by_name(layer_name), hidden_states)


def gdn_in_proj_join(
    hidden_states: torch.Tensor,
    qkvz: torch.Tensor,
    weight: torch.Tensor | None,
    ba_size: int,
    layer_name: LayerNameType,
) -> torch.Tensor:
    """Project ``hidden_states`` with the layer's ``in_proj_ba``, beside what has been enqueued since the fork.

    Args:
        hidden_states: (num_tokens, hidden_size), in the model's dtype, what the fork was given.
        qkvz: what ``in_proj_qkvz`` gave. It is not read: it has to be enqueued before.
        weight: (hidden_size, ba_size), that of ``in_proj_ba``; None where vLLM does not multiply by ``F.linear``
            (batch invariance, a CPU that has packed the weight): then the layer's own module is called.
        ba_size: ``in_proj_ba.output_size_per_partition``.
        layer_name: the layer's key in the forward context.

    Returns:
        (num_tokens, ba_size), contiguous, in the dtype of ``hidden_states``.

    What the projection raises, an out-of-memory say, passes through; so does a failure to find the layer. Should the
    auxiliary stream not get to the fork, or the fork be of another tensor, the call does without, and a line says why.
    """
    forked, _thread.fork = _thread.fork, None
    if forked is not None and forked.address != hidden_states.data_ptr():
        warn_once(RAN_SERIALLY, "the compiler gave a join not what its fork was given")
        forked = None
    if weight is not None:
        return join(forked, lambda: torch.mm(hidden_states, weight))
    return join(forked, lambda: layer_by_name(layer_name).in_proj_ba(hidden_states)[0])


def fork(find_layer: Callable[[], Any], hidden_states: torch.Tensor) -> Fork | None:
    """The fork of a call that is captured and overlaps; none for one that runs serially, also where this fails.

    Events made here cost nothing at replay and are shared with nobody. A breakable capture cannot record a fork and a
    join across its breaks.
    """
    if not is_captured(hidden_states):
        if _thread.prepared_at != streams.times_released:
            prepare()
        return None
    layer = find_layer()
    try:
        if breakable_capture() or not layer.gdn.overlaps(hidden_states.size(0)):
            return None
        if not _thread.is_prepared:
            raise RuntimeError("this thread captures a layer before it has run one")
        forked = Fork(hidden_states.data_ptr(), aux_stream(), torch.cuda.Event(), torch.cuda.Event())
        forked.reached.record()
        return forked
    except Exception as error:
        warn_once(RAN_SERIALLY, unexpected(error))
        return None


def prepare() -> None:
    """Give this thread its workspace, once. vLLM runs a step before it captures one."""
    _thread.prepared_at, _thread.is_prepared = streams.times_released, False
    try:
        _thread.is_prepared = streams.prepare_aux_stream()
    except Exception as error:
        warn_once(RAN_SERIALLY, unexpected(error))


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
        warn_once(RAN_SERIALLY, unexpected(error))
        return work()
    with torch.cuda.stream(forked.stream):
        result = work()
        forked.done.record()
    forked.done.wait()
    return result


def side_by_side(layer: Any, hidden_states: torch.Tensor) -> object:
    """What a captured layer does where it overlaps, for the timer."""
    forked = fork(lambda: layer, hidden_states)
    qkvz = layer.in_proj_qkvz(hidden_states)[0]
    return qkvz, join(forked, lambda: layer.in_proj_ba(hidden_states)[0])


def one_by_one(layer: Any, hidden_states: torch.Tensor) -> object:
    """What it does elsewhere, and in stock vLLM."""
    return layer.in_proj_qkvz(hidden_states)[0], layer.in_proj_ba(hidden_states)[0]


WAYS = {DUAL_STREAM: side_by_side, SERIAL: one_by_one}
"""How a layer may be run that is not fused."""


def _fake_fork(hidden_states: torch.Tensor, layer_name: LayerNameType) -> None:
    """Gives nothing."""


def _fake_join(
    hidden_states: torch.Tensor,
    qkvz: torch.Tensor,
    weight: torch.Tensor | None,
    ba_size: int,
    layer_name: LayerNameType,
) -> torch.Tensor:
    return hidden_states.new_empty((hidden_states.size(0), ba_size))


direct_register_custom_op("gdn_in_proj_fork", gdn_in_proj_fork, ["hidden_states"], _fake_fork, _library)
direct_register_custom_op("gdn_in_proj_join", gdn_in_proj_join, fake_impl=_fake_join, target_lib=_library)
