"""Generate greedily with one model in this process and write what came out as JSON.

    python generate.py MODEL OUTPUT.json [--compiled] [--tensor-parallel-size N] [--max-tokens N]

Run it in a process of its own: vLLM reads its environment (and its plugins) once.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

# Never a prompt of one token: vLLM 0.28 to 0.32 on CPU get it wrong, without any plugin.
PROMPT_LENGTHS = (3, 17, 40)


def prompts() -> list[list[int]]:
    """Fixed token ids of bytes, one prompt for each of `PROMPT_LENGTHS`, no two alike."""
    return [[(7 * i + 31 * length) % 256 for i in range(length)] for length in PROMPT_LENGTHS]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("output", type=Path)
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--max-tokens", type=int, default=12)
    args = parser.parse_args()

    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    llm = LLM(
        args.model,
        enforce_eager=not args.compiled,
        tensor_parallel_size=args.tensor_parallel_size,
        mamba_ssm_cache_dtype="float32",
        max_model_len=256,
        max_num_seqs=4,
        kv_cache_memory_bytes=64 << 20,
        seed=0,
    )
    sampling = SamplingParams(temperature=0, logprobs=0, max_tokens=args.max_tokens, ignore_eos=True, detokenize=False)
    outputs = llm.generate([TokensPrompt(prompt_token_ids=p) for p in prompts()], sampling, use_tqdm=False)
    completions = [output.outputs[0] for output in outputs]
    result = {
        "token_ids": [list(completion.token_ids) for completion in completions],
        "logprobs": [
            [step[token].logprob for step, token in zip(completion.logprobs, completion.token_ids, strict=True)]
            for completion in completions
        ],
    }
    witness = sys.modules.get("witness")
    result["op_calls"] = witness.calls if witness else {}
    args.output.write_text(json.dumps(result))


if __name__ == "__main__":  # spawned workers import this file again
    main()
