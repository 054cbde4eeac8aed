"""Tiny random models with Gated Delta Net layers, made offline in a few seconds.

    python tiny_model.py KIND DIRECTORY [--seed N] [--vision] [--learn]

Each is a complete checkpoint (config, bf16 weights, byte-level tokenizer) of about 5 MB. It says
nothing sensible, but its logits differ from token to token, so two ways of computing it can be
compared. With `--learn` it learns one sentence while it is made, which takes half a minute, and says
it over and over. vLLM 0.26 and earlier know Qwen3.5 only with a vision tower: `--vision` adds a tiny one.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen3_5Config,
    Qwen3_5ForCausalLM,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5MoeConfig,
    Qwen3_5MoeForCausalLM,
    Qwen3_5MoeForConditionalGeneration,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)
from transformers.utils.logging import disable_progress_bar

VOCAB_SIZE = 320  # 256 bytes, one end-of-text token, the rest unused
END_OF_TEXT = 256

SENTENCE = "The gated delta rule forgets a little, then writes what is new. "
"""What a model says that was made to learn it."""
TRAINING_STEPS = 40

_LAYERS = ["linear_attention"] * 3 + ["full_attention"]
_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 256,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 2048,
    "initializer_range": 0.08,  # at the usual 0.02 so small a model's logits are nearly constant
    "eos_token_id": END_OF_TEXT,
    "dtype": "bfloat16",
}
_DENSE: dict[str, Any] = {"intermediate_size": 512}
_MOE: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
    "shared_expert_intermediate_size": 128,
}

_BUILDERS: dict[str, Callable[..., Any]] = {
    "qwen3_5": lambda **layers: Qwen3_5ForCausalLM(Qwen3_5TextConfig(**_COMMON, **_DENSE, **layers)),
    "qwen3_5_moe": lambda **layers: Qwen3_5MoeForCausalLM(Qwen3_5MoeTextConfig(**_COMMON, **_MOE, **layers)),
    # The only one whose checkpoint stores q, k, v, z (and b, a) interleaved by key head.
    "qwen3_next": lambda **layers: Qwen3NextForCausalLM(Qwen3NextConfig(**_COMMON, **_DENSE, **_MOE, **layers)),
}
KINDS = tuple(_BUILDERS)

_VISION: dict[str, Any] = {
    "depth": 1,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_heads": 2,
    "num_position_embeddings": 16,
    "out_hidden_size": _COMMON["hidden_size"],
}
_BUILDERS_WITH_VISION: dict[str, Callable[..., Any]] = {
    "qwen3_5": lambda **layers: Qwen3_5ForConditionalGeneration(
        Qwen3_5Config(text_config=_COMMON | _DENSE | layers, vision_config=_VISION, dtype="bfloat16")
    ),
    "qwen3_5_moe": lambda **layers: Qwen3_5MoeForConditionalGeneration(
        Qwen3_5MoeConfig(text_config=_COMMON | _MOE | layers, vision_config=_VISION, dtype="bfloat16")
    ),
}


def make_model(
    kind: str, directory: Path, seed: int = 0, blocks: int = 1, vision: bool = False, learn: bool = False
) -> Path:
    """Write the tiny model `kind`, one of `KINDS`, into `directory` and return `directory`.

    It has `blocks` times three GDN layers and one of full attention; `vision` adds a vision tower to the kinds that can
    have one; with `learn` it knows `SENTENCE`. The same `seed` gives the same weights. Raises ValueError for an unknown
    `kind`.
    """
    if kind not in _BUILDERS:
        raise ValueError(f"unknown kind {kind!r}: choose one of {', '.join(KINDS)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        build = (_BUILDERS | _BUILDERS_WITH_VISION if vision else _BUILDERS)[kind]
        model = build(num_hidden_layers=len(_LAYERS) * blocks, layer_types=_LAYERS * blocks)
        _spread_gates(model)
        if learn:
            _teach(model)
    model.to(torch.bfloat16).save_pretrained(directory)
    _byte_tokenizer().save_pretrained(directory)
    return directory


@torch.no_grad()
def _spread_gates(model: torch.nn.Module) -> None:
    """Give the heads of each GDN layer decays from slow to fast, as trained models have."""
    for name, parameter in model.named_parameters():
        if name.endswith("A_log"):
            parameter.uniform_(0.1, 2.0).log_()
        elif name.endswith("dt_bias"):
            parameter.uniform_(-4.0, 0.0)


def _teach(model: torch.nn.Module) -> None:
    """Train until the model goes on with `SENTENCE` from anywhere in it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so small a model is slower on several, and far slower on a busy machine
    ids = torch.tensor(_byte_tokenizer()(SENTENCE * 3)["input_ids"])
    model.float().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(TRAINING_STEPS):
        starts = torch.randint(len(SENTENCE), (2,)).tolist()
        batch = torch.stack([ids[start : start + 80] for start in starts])
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    torch.set_num_threads(threads)


def _byte_tokenizer() -> PreTrainedTokenizerFast:
    names = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<|endoftext|>"]
    names += [f"<|unused{i}|>" for i in range(VOCAB_SIZE - len(names))]
    tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=names[END_OF_TEXT])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vision", action="store_true")
    parser.add_argument("--learn", action="store_true")
    args = parser.parse_args()
    disable_progress_bar()
    print(make_model(args.kind, args.directory, args.seed, vision=args.vision, learn=args.learn))


if __name__ == "__main__":
    main()
