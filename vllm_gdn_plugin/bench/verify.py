"""Whether the strategies compute the same, asked before any of them is timed."""

from collections.abc import Mapping, Sequence

import torch

from vllm_gdn_plugin.bench.errors import WrongResult
from vllm_gdn_plugin.bench.results import QKVZ
from vllm_gdn_plugin.decide.plan import FUSED, NARROW_KERNEL, PADDED_TO, SERIAL

Outputs = tuple[torch.Tensor, ...]

PROJECTIONS = ("in_proj_qkvz", "in_proj_ba")

TOLERANCE = 1.05
"""One GEMM rounds differently from two, and another kernel from cuBLAS's; its error may be this many times theirs."""


def verify(outputs: Mapping[str, Outputs], reference: Sequence[torch.Tensor | None] | None = None) -> None:
    """Compare what the strategies gave for the same hidden states and weights.

    dual_stream and qkvz alone run serial's kernels: bit-equal. fused, also padded, and narrow_kernel are held against
    float64: the Frobenius norm of their error is at most ``TOLERANCE`` times that of serial, in each projection that
    has a reference; the others are bit-equal.

    Args:
        outputs: by strategy, (num_tokens, qkvz) and (num_tokens, ba); of qkvz alone the first only.
        reference: the same in float64; needed where fused or narrow_kernel is among the strategies.

    Raises:
        WrongResult: naming the strategy and the projection.
    """
    for name, found in outputs.items():
        if name == SERIAL:
            continue
        exact: Sequence[torch.Tensor | None] = (None, None)
        if name in (FUSED, *PADDED_TO, NARROW_KERNEL):
            if reference is None:
                raise ValueError(f"{name} needs a reference")
            exact = reference
        computed = PROJECTIONS[:1] if name == QKVZ else PROJECTIONS
        for number, (projection, one) in enumerate(zip(computed, found, strict=True)):
            other, wanted = outputs[SERIAL][number], exact[number]
            why = _not_bit_equal(one, other) if wanted is None else _not_exact(one, other, wanted)
            if why:
                raise WrongResult(f"{name}: {projection} {why}")


def _not_bit_equal(one: torch.Tensor, serial: torch.Tensor) -> str:
    if torch.equal(one, serial):
        return ""
    wrong = int((one != serial).sum()) if one.shape == serial.shape else one.numel()
    return f"is not bit-equal to serial's: {wrong} of {one.numel()} values"


def _not_exact(one: torch.Tensor, serial: torch.Tensor, exact: torch.Tensor) -> str:
    found, allowed = error(one, exact), TOLERANCE * error(serial, exact)
    if found <= allowed:  # not so where one is NaN
        return ""
    return f"has an error of {found:.3e} against float64, more than {TOLERANCE} x serial's, {allowed:.3e}"


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Frobenius norm of the difference from ``exact`` (float64), relative to that of ``exact``."""
    return float(torch.linalg.norm(found.double() - exact) / torch.linalg.norm(exact))
