"""How many artifacts vLLM compiles, saves and loads for engines of a model, stock and with each strategy.

    python count_artifacts.py MODEL OUTPUT.json

One process, so that Python and the GPU start once; where the caches are is VLLM_CACHE_ROOT's affair.
"""

import json
import os
import sys
from pathlib import Path

from generate_all import SETTINGS
from switch_plugin import switch_plugin


def main() -> None:
    from vllm import LLM, SamplingParams
    from vllm.compilation.counter import compilation_counter
    from vllm.distributed import cleanup_dist_env_and_memory

    model, output = sys.argv[1:]
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    found: dict[str, dict[str, int]] = {}
    for name in ("stock", "dual_stream", "fused", "decode"):
        switch_plugin(SETTINGS[name])
        before = vars(compilation_counter).copy()
        llm = LLM(
            model,
            mamba_ssm_cache_dtype="float32",
            max_model_len=256,
            max_num_seqs=4,
            gpu_memory_utilization=0.01,  # not used where the next one is given
            kv_cache_memory_bytes=1 << 28,
            attention_backend="FLASH_ATTN",
            gdn_prefill_backend="triton",
            skip_tokenizer_init=True,
        )
        sampling = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, detokenize=False)
        llm.generate([{"prompt_token_ids": [1, 2, 3]}], sampling, use_tqdm=False)
        counts = {key: value - before[key] for key, value in vars(compilation_counter).items()}
        found[name] = {key: n for key, n in counts.items() if "artifacts" in key}
        del llm
        cleanup_dist_env_and_memory()
    Path(output).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
