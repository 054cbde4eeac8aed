"""Which linear methods share no scratch memory, so that their kernels may run side by side on two streams."""

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
