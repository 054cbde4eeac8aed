"""Generate with one model with stock vLLM and with each strategy, in one process: its kernels are tuned once.

    python generate_all.py MODEL OUTPUT.json [--eager] [--mtp] [--narrow-kernel] [--tensor-parallel-size N]

With full and piecewise CUDA graphs, or eagerly; with `--mtp`, the model's own MTP head drafts; with `--narrow-kernel`,
`auto` takes that wherever it may, however it was timed. With more ranks than one, each engine has worker processes of
its own, which load the installed plugin, or don't.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

from vllm_gdn_plugin.plan import NARROW_KERNEL, choices_at

STRATEGIES = ("stock", "dual_stream", "fused", "auto")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("output", type=Path)
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--mtp", action="store_true")
    parser.add_argument("--narrow-kernel", action="store_true")
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    options = parser.parse_args()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    results: dict[str, Any] = {}
    if options.narrow_kernel:
        results["captured"] = take_narrow_kernel()
    for strategy in STRATEGIES:
        install(strategy)
        results[strategy] = generate(options)
        options.output.write_text(json.dumps(results))


def take_narrow_kernel() -> list[int]:
    """Have `auto` take it wherever it may. Returns the numbers of tokens with which it is captured after that."""
    import torch

    from vllm_gdn_plugin import narrow, tuning

    captured: list[int] = []
    linear = narrow.linear

    def watched(hidden_states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if torch.cuda.is_current_stream_capturing():
            captured.append(len(hidden_states))
        return linear(hidden_states, weight)

    def narrowest(times: tuning.Times, ways: tuple[str, ...]) -> dict[int, str]:
        captured.clear()  # by then the ways have been timed, in graphs of their own
        return {tokens: NARROW_KERNEL if NARROW_KERNEL in choices_at(ways, tokens) else ways[0] for tokens in times}

    narrow.linear, tuning.fastest = watched, narrowest
    return captured


def install(strategy: str) -> None:
    """Have the next engine built with `strategy`, or stock, whatever an earlier one was built with."""
    from vllm.model_executor.custom_op import op_registry_oot

    import vllm_gdn_plugin
    from vllm_gdn_plugin.contract import GDN_CLASSES

    for name in GDN_CLASSES.values():
        op_registry_oot.pop(name, None)
    os.environ["VLLM_PLUGINS"] = "" if strategy == "stock" else "vllm_gdn_plugin"  # for worker processes
    if strategy != "stock":
        os.environ["VLLM_GDN_PLUGIN_STRATEGY"] = strategy
        vllm_gdn_plugin.register()


def generate(options: argparse.Namespace) -> Any:
    """Tokens and log-probabilities of a few prompts, some of which share a prefix."""
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    llm = LLM(
        options.model,
        enforce_eager=options.eager,
        tensor_parallel_size=options.tensor_parallel_size,
        speculative_config={"method": "mtp", "num_speculative_tokens": 2} if options.mtp else None,
        max_model_len=1024,
        max_num_seqs=8,
        gpu_memory_utilization=0.01,  # asked of the GPU's free memory, but not used where the next one is given
        kv_cache_memory_bytes=1 << 30,
        enable_prefix_caching=not options.mtp,
        attention_backend="FLASH_ATTN",
        gdn_prefill_backend="triton",
        skip_tokenizer_init=True,
        seed=0,
    )
    lengths = (3, 17, 40, 600, 700)
    prompts = [{"prompt_token_ids": [(7 * i + 3) % 256 for i in range(n)]} for n in lengths]
    sampling = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True, detokenize=False, logprobs=0)
    rounds = [llm.generate(prompts, sampling, use_tqdm=False) for _ in range(2)]  # the second from the prefix cache
    answers = [answer.outputs[0] for outputs in rounds for answer in outputs]
    del llm
    cleanup_dist_env_and_memory()
    return [[(t, lp[t].logprob) for t, lp in zip(a.token_ids, a.logprobs, strict=True)] for a in answers]


if __name__ == "__main__":
    main()
