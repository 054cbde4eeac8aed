"""Generate greedily with one model in this process and write what came out as JSON.

    python generate.py MODEL OUTPUT.json [--compiled] [--tensor-parallel-size N] [--pipeline-parallel-size N]
                                         [--max-tokens N]

Run it in a process of its own: vLLM reads its environment (and its plugins) once. More arguments of `LLM` can be
given as JSON in the environment variable ENGINE_ARGUMENTS.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

# Never a prompt of one token: vLLM 0.28 to 0.32 on CPU get it wrong, without any plugin.
PROMPT_LENGTHS = (3, 17, 40)


def prompts() -> list[list[int]]:
    """Fixed token ids of bytes, one prompt for each of `PROMPT_LENGTHS`, no two alike."""
    return [[(7 * i + 31 * length) % 256 for i in range(length)] for length in PROMPT_LENGTHS]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("output", type=Path)
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--pipeline-parallel-size", type=int, default=1)
    parser.add_argument("--max-tokens", type=int, default=12)
    return parser.parse_args()


def engine(args: argparse.Namespace) -> Any:
    from vllm import LLM

    return LLM(
        args.model,
        enforce_eager=not args.compiled,
        language_model_only=True,  # where the model has a vision tower
        tensor_parallel_size=args.tensor_parallel_size,
        pipeline_parallel_size=args.pipeline_parallel_size,
        mamba_ssm_cache_dtype="float32",
        max_model_len=256,
        max_num_seqs=4,
        kv_cache_memory_bytes=64 << 20,
        seed=0,
        **json.loads(os.environ.get("ENGINE_ARGUMENTS", "{}")),
    )


def answers(llm: Any, max_tokens: int) -> dict[str, Any]:
    """What the engine says now to each of `prompts()`, the projections that the plugin `ran` until then, by strategy,
    and in this process the `classes` of the GDN layers."""
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    sampling = SamplingParams(temperature=0, logprobs=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
    outputs = llm.generate([TokensPrompt(prompt_token_ids=p) for p in prompts()], sampling, use_tqdm=False)
    completions = [output.outputs[0] for output in outputs]
    witness = sys.modules.get("witness")
    return {
        "token_ids": [list(completion.token_ids) for completion in completions],
        "logprobs": [
            [step[token].logprob for step, token in zip(completion.logprobs, completion.token_ids, strict=True)]
            for completion in completions
        ],
        "ran": witness.calls_of_all_processes() if witness else {},
        "classes": sorted({f"{c.__module__}.{c.__qualname__}" for c in map(type, gdn_layers(llm))}),
    }


def gdn_layers(llm: Any) -> list[Any]:
    """None where vLLM runs the model in another process."""
    config = llm.llm_engine.vllm_config.compilation_config
    return [layer for layer in config.static_forward_context.values() if hasattr(layer, "in_proj_ba")]


def main() -> None:
    args = arguments()
    answer = answers(engine(args), args.max_tokens)
    import torch
    import vllm

    args.output.write_text(json.dumps(answer | {"vllm": vllm.__version__, "torch": torch.__version__}))


if __name__ == "__main__":  # spawned workers import this file again
    main()
