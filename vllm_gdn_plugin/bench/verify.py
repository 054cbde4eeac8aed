"""Whether the ways compute the same, asked before any of them is timed."""

from collections.abc import Mapping, Sequence

import torch

from vllm_gdn_plugin.bench.errors import WrongResult
from vllm_gdn_plugin.bench.results import QKVZ
from vllm_gdn_plugin.decide.plan import DUAL_STREAM, SERIAL

Outputs = tuple[torch.Tensor, ...]

PROJECTIONS = ("in_proj_qkvz", "in_proj_ba")

TOLERANCE = 1.05
"""One GEMM rounds differently from two; its error may be this many times theirs."""


def verify(outputs: Mapping[str, Outputs], reference: Sequence[torch.Tensor] = ()) -> None:
    """Compare what the ways gave for the same hidden states and weights.

    dual_stream and qkvz alone run serial's kernels: bit-equal. Any other way is held against float64: the Frobenius
    norm of its error is at most ``TOLERANCE`` times that of serial, in each projection.

    Args:
        outputs: by way, (num_tokens, qkvz) and (num_tokens, ba); of qkvz alone the first only.
        reference: the same in float64; needed where another way is among them.

    Raises:
        WrongResult: naming the way and the projection.
    """
    for way, found in outputs.items():
        if way == SERIAL:
            continue
        exact: Sequence[torch.Tensor | None] = (None, None) if way in (DUAL_STREAM, QKVZ) else reference
        if not exact:
            raise ValueError(f"{way} needs a reference")
        computed = PROJECTIONS[:1] if way == QKVZ else PROJECTIONS
        for number, (projection, one) in enumerate(zip(computed, found, strict=True)):
            other, wanted = outputs[SERIAL][number], exact[number]
            why = _not_bit_equal(one, other) if wanted is None else _not_exact(one, other, wanted)
            if why:
                raise WrongResult(f"{way}: {projection} {why}")


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
