"""Generate text with `vllm.LLM` and the plugin: nothing to call, an installed plugin is loaded by vLLM.

    python offline_generation.py [--model MODEL]

Without --model it makes a tiny random model, which runs on a CPU and babbles.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

PROMPTS = ["The two projections of a Gated Delta Net layer", "A second CUDA stream"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", help="a model with GDN layers, e.g. of the Qwen3.5 family")
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--max-tokens", type=int, default=32)
    args = parser.parse_args()

    # vLLM and the plugin read these when vLLM is first imported.
    os.environ.setdefault("VLLM_GDN_PLUGIN_STRATEGY", "auto")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; ignored on GPUs
    from vllm import LLM, SamplingParams

    with tempfile.TemporaryDirectory() as directory:
        llm = LLM(
            args.model or tiny_model(directory),
            tensor_parallel_size=args.tensor_parallel_size,
            mamba_ssm_cache_dtype="float32",
            max_model_len=1024,
        )
    for output in llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=args.max_tokens)):
        print(f"{output.prompt!r} -> {output.outputs[0].text!r}")


def tiny_model(directory: str) -> str:
    from tiny_model import make_model

    return str(make_model("qwen3_5", Path(directory)))


if __name__ == "__main__":  # spawned workers import this file again
    main()
