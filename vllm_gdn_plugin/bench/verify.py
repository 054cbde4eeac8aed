"""Whether the strategies compute the same, asked before any of them is timed."""

from collections.abc import Mapping

import torch

from vllm_gdn_plugin.bench.errors import WrongResult
from vllm_gdn_plugin.bench.results import QKVZ
from vllm_gdn_plugin.plan import DUAL_STREAM, FUSED, SERIAL

Outputs = tuple[torch.Tensor, ...]

PROJECTIONS = ("in_proj_qkvz", "in_proj_ba")

FUSED_TOLERANCE = 1.05
"""One GEMM rounds differently from two; its error may be this many times theirs."""


def verify(outputs: Mapping[str, Outputs], reference: Outputs | None = None) -> None:
    """Compare what the strategies gave for the same hidden states and weights.

    dual_stream and qkvz alone run serial's kernels: bit-equal. fused is held against float64: the Frobenius norm of
    its error is at most ``FUSED_TOLERANCE`` times that of serial, in each projection.

    Args:
        outputs: by strategy, (num_tokens, qkvz) and (num_tokens, ba); of qkvz alone the first only.
        reference: the same in float64; needed where fused is among the strategies.

    Raises:
        WrongResult: naming the strategy and the projection.
    """
    serial = outputs[SERIAL]
    for name in (DUAL_STREAM, QKVZ):
        for projection, one, other in zip(PROJECTIONS, outputs.get(name, ()), serial, strict=False):
            if not torch.equal(one, other):
                wrong = int((one != other).sum()) if one.shape == other.shape else one.numel()
                raise WrongResult(f"{name} is not bit-equal to serial: {wrong} of {one.numel()} values of {projection}")
    if FUSED in outputs:
        if reference is None:
            raise ValueError("fused needs a reference")
        for projection, one, other, exact in zip(PROJECTIONS, outputs[FUSED], serial, reference, strict=True):
            fused_error, serial_error = error(one, exact), error(other, exact)
            if not fused_error <= FUSED_TOLERANCE * serial_error:  # also where one is NaN
                raise WrongResult(
                    f"the error of fused against float64 is {fused_error:.3e} in {projection},"
                    f" more than {FUSED_TOLERANCE} x serial's {serial_error:.3e}"
                )


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Frobenius norm of the difference from ``exact`` (float64), relative to that of ``exact``."""
    return float(torch.linalg.norm(found.double() - exact) / torch.linalg.norm(exact))
