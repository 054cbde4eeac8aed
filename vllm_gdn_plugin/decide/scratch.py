"""When the two projections may run side by side: pure functions, with the reasons as data."""

from enum import Enum


class StaysSerial(Enum):
    """Why a call runs the two projections one after the other."""

    NO_AUX_STREAM = "there is no auxiliary stream on this platform"
    UNSAFE_PAIR = "the pair of linear methods is not known to share no scratch memory"
    NOT_CAPTURING = "outside a CUDA graph, fork and join cost more CPU time than they hide"
    BREAKABLE_CAPTURE = "a breakable CUDA-graph capture cannot record a fork and join across its breaks"
    TOO_MANY_TOKENS = "the batch is larger than VLLM_GDN_PLUGIN_MAX_TOKENS: the wide projection fills the GPU"
    TIMED_SLOWER = "this GPU was timed to be slower side by side for this number of tokens"


def stays_serial(
    *,
    aux_stream: bool,
    safe_pair: bool,
    capturing: bool,
    breakable_capture: bool,
    num_tokens: int,
    max_tokens: int,
    timed_slower: bool,
) -> StaysSerial | None:
    """The first reason to run this call serially, or None when it may overlap.

    Peers that overlap such projections do so under the same conditions: sglang and vLLM's own Kimi K3 only while
    a CUDA graph is captured and below a number of tokens.
    """
    if not aux_stream:
        return StaysSerial.NO_AUX_STREAM
    if not safe_pair:
        return StaysSerial.UNSAFE_PAIR
    if not capturing:
        return StaysSerial.NOT_CAPTURING
    if breakable_capture:
        return StaysSerial.BREAKABLE_CAPTURE
    if num_tokens > max_tokens:
        return StaysSerial.TOO_MANY_TOKENS
    if timed_slower:
        return StaysSerial.TIMED_SLOWER
    return None


UNQUANTIZED = "UnquantizedLinearMethod"

WIDE_METHODS_BESIDE_UNQUANTIZED = frozenset(
    {
        UNQUANTIZED,
        "AWQLinearMethod",
        "AWQMarlinLinearMethod",
        "AutoAWQLinearMethod",
        "AutoAWQMarlinLinearMethod",
        "AutoGPTQLinearMethod",
        "CompressedTensorsLinearMethod",
        "FBGEMMFp8LinearMethod",
        "Fp8LinearMethod",
        "GPTQLinearMethod",
        "GPTQMarlinLinearMethod",
        "INCLinearMethod",
        "ModelOptBlockQuantLinearMethod",
        "ModelOptFp8LinearMethod",
        "ModelOptFp8PbWoLinearMethod",
        "ModelOptFp8PcPtLinearMethod",
        "ModelOptLinearMethod",
        "ModelOptMxFp8LinearMethod",
        "ModelOptNvFp4LinearMethod",
        "ModelOptNvFp4W4A16LinearMethod",
    }
)
"""Wide methods that are safe beside an unquantised narrow projection. PyTorch gives cuBLAS one workspace per
handle and stream, so the narrow GEMM shares none; these methods keep theirs in the layer or allocate it per call."""


def share_no_scratch(qkvz_method: str, ba_method: str) -> bool:
    """Whether the kernels of this pair of linear methods (class names) are known to use no common scratch memory.

    Two kernels on two streams that share a static buffer corrupt each other without an error. So a pair is
    refused unless it is known: an unquantised ``in_proj_ba`` beside a method of the list above.
    """
    return ba_method == UNQUANTIZED and qkvz_method in WIDE_METHODS_BESIDE_UNQUANTIZED
