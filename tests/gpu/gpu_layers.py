"""The shapes of released models, and layers with real projections in them."""

from typing import Any

SHAPES = {
    "35B-A3B": (2048, 12288, 64),
    "122B-A10B": (3072, 20480, 128),
    "27B": (5120, 16384, 96),
    "9B": (4096, 12288, 64),
}
"""(hidden_size, in_proj_qkvz outputs, in_proj_ba outputs) of one layer at tensor parallel size 1."""

TOKENS = (1, 2, 3, 4, 7, 8, 16, 31, 32, 64, 128, 200, 256, 512, 1024, 2048, 4096)


class Layer:
    """What the plugin asks of a GDN layer: its two projections, a name, and what it keeps there itself."""

    def __init__(self, name: str, qkvz: Any, ba: Any) -> None:
        from vllm_gdn_plugin.run.layer import Gdn

        self.prefix = name
        self.in_proj_qkvz = qkvz
        self.in_proj_ba = ba
        self.gdn = Gdn("dual_stream", plain_gemm=True)


def fill(parameter: Any, hidden: int) -> None:
    """Random values in the range of trained weights, whatever the parameter stores."""
    import torch

    data = parameter.data
    if data.dtype == torch.float8_e4m3fn:
        data.copy_(torch.randn(data.shape, device="cuda").clamp_(-3, 3))
    elif data.is_floating_point():
        scale = 0.01 if data.dim() == 2 and min(data.shape) < hidden // 8 else hidden**-0.5
        data.copy_(torch.rand(data.shape, device="cuda") * scale + scale / 4)
        data.mul_(torch.where(torch.rand(data.shape, device="cuda") < 0.5, -1.0, 1.0) if scale != 0.01 else 1.0)
    else:
        data.copy_(torch.randint(0, 2**31 - 1, data.shape, device="cuda").to(data.dtype))
