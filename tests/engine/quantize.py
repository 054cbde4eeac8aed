"""A tiny checkpoint in int8 whose GDN layers mix precisions: b and a stay bf16, as in most quantised checkpoints."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

IGNORED = ("in_proj_a", "in_proj_b", "in_proj_ba", "lm_head")
"""Linear layers that stay in bf16."""


def quantize(source: Path, target: Path, only: str = "") -> Path:
    """Write the checkpoint `source` as compressed-tensors W8A8 into `target` and return `target`; with `only`, just the
    linear layers whose names end so.

    Weights are int8 with one scale for each output channel, fixed; activations int8, a scale for each token, found
    while running.
    """
    shutil.copytree(source, target)
    ignored: list[str] = []
    weights: dict[str, torch.Tensor] = {}
    for name, weight in load_file(source / "model.safetensors").items():
        module = name.removesuffix(".weight")
        is_linear = weight.dim() == 2 and not module.endswith("embed_tokens")
        if not is_linear or module.endswith(IGNORED) or not module.endswith(only):
            weights[name] = weight
            ignored += [module] * is_linear
            continue
        scale = weight.float().abs().amax(dim=1, keepdim=True) / 127
        weights[name] = (weight.float() / scale).round().to(torch.int8)
        weights[f"{module}.weight_scale"] = scale.to(weight.dtype)
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": [f"re:.*(?<!{only})$"] if only else ignored,
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": _int8("channel", dynamic=False),
                "input_activations": _int8("token", dynamic=True),
            }
        },
    }
    (target / "config.json").write_text(json.dumps(config, indent=2))
    return target


def _int8(strategy: str, dynamic: bool) -> dict[str, Any]:
    return {"num_bits": 8, "type": "int", "symmetric": True, "strategy": strategy, "dynamic": dynamic}
