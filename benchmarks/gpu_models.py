"""Models with the sizes of real ones and no weights, for `--load-format dummy`: a configuration and a tokenizer.

    python benchmarks/gpu_models.py NAME DIRECTORY [--layers N] [--rank-of N] [--quantization awq|fp8|fp8-per-token]

With `--rank-of N` the model is as wide as one of N tensor-parallel ranks of it, so that one GPU does what each of N
would, but for what they say to each other, and for sampling, which is from its share of the vocabulary.

As the real checkpoints have it, the recurrent state is kept in float32, and there is one layer that drafts (MTP).

The tokenizer has a word for each id below WORDS (but the first 27), so that ids become text and the same ids again:
clients that send text (`vllm bench serve`) work, which they don't with `--skip-tokenizer-init`. The ids above have no
text.
"""

import argparse
import json
import string
from itertools import islice
from pathlib import Path
from typing import Any

INTERVAL = 4
"""Every fourth layer is full attention."""
END_OF_TEXT = "<|endoftext|>"
WORDS = 16384
"""Enough for prompts of as many different tokens; loading one for all of a vocabulary of 248320 ids takes 1.5 s each
time (AMD EPYC), and of this 0.04 s."""

_TEXT: dict[str, Any] = {
    "vocab_size": 248320,
    "head_dim": 256,
    "linear_num_key_heads": 16,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
    "mamba_ssm_dtype": "float32",
    "mtp_num_hidden_layers": 1,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "attn_output_gate": True,
    "tie_word_embeddings": False,
    "max_position_embeddings": 32768,
    "dtype": "bfloat16",
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e7,
        "partial_rotary_factor": 0.25,
        "mrope_section": [11, 11, 10],
        "mrope_interleaved": True,
    },
}
_EXPERTS = {
    "model_type": "qwen3_5_moe_text",
    "num_experts": 256,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
}
MODELS: dict[str, dict[str, Any]] = {
    "35B-A3B": {
        **_TEXT,
        **_EXPERTS,
        "hidden_size": 2048,
        "num_hidden_layers": 40,
        "linear_num_value_heads": 32,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
    },
    "122B-A10B": {
        **_TEXT,
        **_EXPERTS,
        "hidden_size": 3072,
        "moe_intermediate_size": 1024,
        "shared_expert_intermediate_size": 1024,
        "num_hidden_layers": 48,
        "linear_num_value_heads": 64,
        "num_attention_heads": 32,
        "num_key_value_heads": 2,
    },
    "27B": {
        **_TEXT,
        "model_type": "qwen3_5_text",
        "hidden_size": 5120,
        "intermediate_size": 17408,
        "num_hidden_layers": 64,
        "linear_num_value_heads": 48,
        "num_attention_heads": 24,
        "num_key_value_heads": 4,
    },
    "9B": {
        **_TEXT,
        "model_type": "qwen3_5_text",
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 32,
        "linear_num_value_heads": 32,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
    },
    "tiny": {  # for a dry run
        **_TEXT,
        "vocab_size": 320,
        "model_type": "qwen3_5_text",
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    },
}
"""By name: the part of the configuration that sizes the language model. The widths are those of the Qwen3.5 models of
these names, as far as a GDN layer and the layer's MLP go."""
KV_HEADS = "num_key_value_heads"
"""Of which each rank has at least one: vLLM repeats them where there are more ranks."""
SHARED_AMONG_RANKS = (
    "vocab_size",
    "intermediate_size",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "linear_num_key_heads",
    "linear_num_value_heads",
    "num_attention_heads",
    KV_HEADS,
)


def fp8(layer_types: list[str]) -> dict[str, Any]:
    """The quantisation of an official FP8 checkpoint: blocks of 128 x 128, the narrow projections in bfloat16."""
    gdn = [number for number, kind in enumerate(layer_types) if kind == "linear_attention"]
    layer = "model.language_model.layers.{}.linear_attn.in_proj_{}"
    return {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": ["lm_head", *(layer.format(number, part) for number in gdn for part in "ba")],
    }


def fp8_per_token(layer_types: list[str]) -> dict[str, Any]:
    """The quantisation of compressed-tensors' FP8 dynamic checkpoints: a scale for each output of a weight and for each
    token, the narrow projections in bfloat16."""
    eight = {"num_bits": 8, "type": "float", "symmetric": True}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**eight, "strategy": "channel", "dynamic": False},
                "input_activations": {**eight, "strategy": "token", "dynamic": True},
            }
        },
        "ignore": ["lm_head", r"re:.*linear_attn\.in_proj_[ab]$"],
    }


def awq(layer_types: list[str]) -> dict[str, Any]:
    """AWQ with 4 bits in groups of 128; a GDN layer stays in bfloat16, as in most AWQ checkpoints of such models."""
    return {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 128,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": ["lm_head", "linear_attn"],
    }


QUANTIZATIONS = {"awq": awq, "fp8": fp8, "fp8-per-token": fp8_per_token}


def make_model(
    name: str, directory: Path, layers: int | None = None, quantization: str | None = None, ranks: int = 1
) -> Path:
    """Write the model `name` into `directory` and return it, with `layers` layers where given, a multiple of four, and
    as wide as one of `ranks` ranks. Raises ValueError.

    `quantization` is None or one of QUANTIZATIONS, for a dense model.
    """
    text = dict(MODELS[name])
    text["num_hidden_layers"] = layers = layers or text["num_hidden_layers"]
    if layers % INTERVAL:
        raise ValueError(f"--layers: {layers} layers are not a multiple of {INTERVAL}")
    for key in SHARED_AMONG_RANKS:
        if key == KV_HEADS and text[key] < ranks:
            text[key] = 1
        elif key in text:
            text[key], rest = divmod(text[key], ranks)
            if rest:
                raise ValueError(f"--rank-of: {key} is no multiple of {ranks}")
    text["layer_types"] = (["linear_attention"] * (INTERVAL - 1) + ["full_attention"]) * (layers // INTERVAL)
    kind = text["model_type"].removesuffix("_text")
    config = {
        # The class with a vision part, which every release has; the part is tiny, `--language-model-only` drops it.
        "architectures": [f"Qwen3_5{'Moe' if kind.endswith('moe') else ''}ForConditionalGeneration"],
        "model_type": kind,
        "dtype": "bfloat16",
        "tie_word_embeddings": False,
        "text_config": text,
        "vision_config": {
            "model_type": kind,
            "depth": 1,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 2,
            "out_hidden_size": text["hidden_size"],
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "in_channels": 3,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [],
        },
    }
    if quantization:
        config["quantization_config"] = QUANTIZATIONS[quantization](text["layer_types"])
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config, indent=1))
    _tokenizer(min(text["vocab_size"], WORDS)).save_pretrained(directory)
    return directory


def _tokenizer(size: int) -> Any:
    """Letters, then words of a space and letters, each made by one merge of a shorter word and a letter.

    A byte-level BPE, because transformers makes one of whatever lies beside a Qwen3.5 configuration.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters, words, merges = string.ascii_lowercase, ["\u0120"], []  # how such vocabularies write a space
    longer = ((word, letter) for word in words for letter in letters)
    for merge in islice(longer, size - len(letters) - 2):
        merges.append(merge)
        words.append("".join(merge))
    vocab = {name: number for number, name in enumerate([*letters, *words, END_OF_TEXT])}
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=MODELS)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--quantization", choices=QUANTIZATIONS, help="of a dense model")
    parser.add_argument(
        "--rank-of", metavar="N", type=int, choices=(1, 2, 4, 8), default=1, help="1, 2, 4 or 8; default 1"
    )
    options = parser.parse_args()
    try:
        print(make_model(options.name, options.directory, options.layers, options.quantization, options.rank_of))
    except ValueError as wrong:
        parser.error(str(wrong))


if __name__ == "__main__":
    main()
