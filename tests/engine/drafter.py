"""A tiny checkpoint with a drafter: one more layer that predicts a second token (multi-token prediction)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

LAST_LAYER = "model.layers.3."


def add_drafter(source: Path, target: Path) -> Path:
    """Write the checkpoint `source` with a drafter made of its last layer into `target` and return `target`."""
    shutil.copytree(source, target)
    weights = load_file(source / "model.safetensors")
    hidden_size = weights["model.norm.weight"].numel()
    generator = torch.Generator().manual_seed(0)
    fc = torch.randn(hidden_size, 2 * hidden_size, generator=generator) * 0.08
    drafter = {"fc": fc.to(torch.bfloat16)}
    drafter |= dict.fromkeys(("norm", "pre_fc_norm_hidden", "pre_fc_norm_embedding"), weights["model.norm.weight"])
    layer = {name.removeprefix(LAST_LAYER): w for name, w in weights.items() if name.startswith(LAST_LAYER)}
    weights |= {f"mtp.{name}.weight": weight.clone() for name, weight in drafter.items()}
    weights |= {f"mtp.layers.0.{name}": weight.clone() for name, weight in layer.items()}
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text()) | {"mtp_num_hidden_layers": 1}
    (target / "config.json").write_text(json.dumps(config, indent=2))
    return target
