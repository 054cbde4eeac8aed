"""Generate with one model with stock vLLM and with each strategy, in one process: its kernels are tuned once.

    python generate_all.py MODEL OUTPUT.json [--eager] [--mtp] [--take WAY,...] [--tensor-parallel-size N]

With full and piecewise CUDA graphs, or eagerly; with `--mtp`, the model's own MTP head drafts; with `--take`, `auto`
takes those ways wherever it may, at one number of tokens the one and at the next another, however they were timed.
With more ranks than one, each engine has worker processes of its own, which load the installed plugin, or don't.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from switch_plugin import switch_plugin

from vllm_gdn_plugin.bench.engine.variants import NAME, PLUGINS, STRATEGY
from vllm_gdn_plugin.decide import plan

SETTINGS = {
    "stock": {PLUGINS: ""},
    **{name: {PLUGINS: NAME, STRATEGY: name} for name in (plan.DUAL_STREAM, plan.FUSED, plan.AUTO)},
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("output", type=Path)
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--mtp", action="store_true")
    parser.add_argument("--take", metavar="WAY,...")
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    options = parser.parse_args()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    results: dict[str, Any] = {"joined": {}}
    joined = watch_joins()
    if options.take:
        results["captured"] = take(options.take.split(","))
    for name, settings in SETTINGS.items():
        switch_plugin(settings)  # for worker processes, too
        joined.clear()
        results[name] = generate(options)
        results["joined"][name] = sorted(joined)
        options.output.write_text(json.dumps(results))


def watch_joins() -> set[str]:
    """The names of the layers whose `in_proj_ba` this process captures on the auxiliary stream, and `serially` if it
    captures one that had no fork."""
    import torch

    from vllm_gdn_plugin.run import dual_stream as op

    seen: set[str] = set()
    join = op.join

    def watched(forked: Any, work: Any) -> Any:
        if torch.cuda.is_current_stream_capturing():
            seen.add(forked.layer_name if forked else "serially")
        return join(forked, work)

    op.join = watched
    return seen


def take(preferred: list[str]) -> list[tuple[str, int]]:
    """Have `auto` take these ways wherever it may. Returns the ways and numbers of tokens that it captures after that:
    the last engine's."""
    import torch

    from vllm_gdn_plugin.run import fused, narrow
    from vllm_gdn_plugin.tune import times as tuning

    plan.MOST_PADDING = 1.0  # a tiny model's rows are few
    captured: list[tuple[str, int]] = []
    linear, apply = narrow.linear, fused.FusedProjections.apply

    def note(way: str, hidden_states: torch.Tensor) -> None:
        if torch.cuda.is_current_stream_capturing():
            captured.append((way, len(hidden_states)))

    def watched_linear(hidden_states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        note(plan.NARROW_KERNEL, hidden_states)
        return linear(hidden_states, weight)

    def watched_apply(self: Any, hidden_states: torch.Tensor, way: str = plan.FUSED) -> torch.Tensor:
        note(way, hidden_states)
        return apply(self, hidden_states, way)

    def fastest(times: tuning.Times, ways: tuple[str, ...]) -> dict[int, str]:
        captured.clear()  # by then the ways have been timed, in graphs of their own
        chosen = {}
        for number, tokens in enumerate(sorted(times)):
            there = [way for way in preferred if way in plan.choices_at(ways, tokens)] or [ways[0]]
            chosen[tokens] = there[number % len(there)]
        return chosen

    narrow.linear, fused.FusedProjections.apply, tuning.fastest = watched_linear, watched_apply, fastest
    return captured


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
