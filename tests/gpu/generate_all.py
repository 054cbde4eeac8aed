"""Generate with one model with stock vLLM and with each strategy, in one process: its kernels are tuned once.

    python generate_all.py MODEL OUTPUT.json [--more decode auto] [--eager | --piecewise] [--mtp]
                                             [--sleep OTHER_MODEL] [--tensor-parallel-size N]

With full and piecewise CUDA graphs where nothing else is said; with `--more`, also with the decode kernel, and with
what `auto` chooses; with `--mtp`, the model's own MTP head drafts; with `--sleep`, each engine sleeps at level 2 after
its answers, wakes, is given its weights again and asked again, then those of another model. With more ranks than one,
each engine has worker processes of its own, which load the installed plugin, or don't.
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
from vllm_gdn_plugin.settings import variable

STEPS = 256
PROMPT_LENGTHS = (3, 17, 40, 600, 700)
DECODE_KERNEL = variable("decode_kernel")
SETTINGS = {
    "stock": {PLUGINS: ""},
    "dual_stream": {PLUGINS: NAME, STRATEGY: plan.DUAL_STREAM, DECODE_KERNEL: "0"},
    "fused": {PLUGINS: NAME, STRATEGY: plan.FUSED, DECODE_KERNEL: "0"},
    "decode": {PLUGINS: NAME, STRATEGY: plan.FUSED, DECODE_KERNEL: "1"},
    "auto": {PLUGINS: NAME, STRATEGY: plan.AUTO, DECODE_KERNEL: "auto"},
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("output", type=Path)
    parser.add_argument("--more", nargs="*", default=[], choices=["decode", "auto"])
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--piecewise", action="store_true")
    parser.add_argument("--mtp", action="store_true")
    parser.add_argument("--sleep", metavar="OTHER_MODEL")
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    options = parser.parse_args()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    found: dict[str, Any] = {}
    joins = watch_joins()
    for name, settings in SETTINGS.items():
        if name not in ("stock", "dual_stream", "fused", *options.more):
            continue
        switch_plugin(settings)  # for worker processes, too
        joins.clear()
        found[name] = run(options) | {"joins": dict(joins)}
        options.output.write_text(json.dumps(found))


def watch_joins() -> dict[str, int]:
    """How many `in_proj_ba` this process captures on the auxiliary stream, and how many `serially`."""
    import torch

    from vllm_gdn_plugin.run import dual_stream

    seen: dict[str, int] = {}
    join = dual_stream.join

    def watched(forked: Any, work: Any) -> Any:
        if torch.cuda.is_current_stream_capturing():
            how = "overlapped" if forked else "serially"
            seen[how] = seen.get(how, 0) + 1
        return join(forked, work)

    dual_stream.join = watched
    return seen


def layers(llm: Any) -> dict[str, Any]:
    """What the plugin does with the GDN layers of this process, and what vLLM chose for them."""
    known = llm.llm_engine.vllm_config.compilation_config.static_forward_context.values()
    found = [layer for layer in known if hasattr(layer, "in_proj_ba")]
    return {
        "strategies": [layer.gdn.strategy for layer in found if hasattr(layer, "gdn")],
        "decodes": [bool(layer.gdn.decode) for layer in found if hasattr(layer, "gdn")],
        "fused speculation": [bool(getattr(layer, "enable_fused_gdn_spec_decode", False)) for layer in found],
    }


def run(options: argparse.Namespace) -> Any:
    """The `answers` of an engine, by name of the moment at which it was asked, and what is known of its layers."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    llm = LLM(
        options.model,
        enforce_eager=options.eager,
        compilation_config={"cudagraph_mode": "PIECEWISE"} if options.piecewise else {},
        tensor_parallel_size=options.tensor_parallel_size,
        speculative_config={"method": "mtp", "num_speculative_tokens": 2} if options.mtp else None,
        mamba_ssm_cache_dtype="float32",
        max_model_len=1024,
        max_num_seqs=8,
        gpu_memory_utilization=0.01,  # asked of the GPU's free memory, but not used where the next one is given
        kv_cache_memory_bytes=1 << 30,
        enable_prefix_caching=not options.mtp,
        enable_sleep_mode=bool(options.sleep),
        attention_backend="FLASH_ATTN",
        gdn_prefill_backend="triton",
        skip_tokenizer_init=True,
        seed=0,
    )
    answers = {"first": generate(llm, STEPS), "again": generate(llm, 32)}  # the second from the prefix cache
    if options.sleep:
        answers["host bytes asleep"] = sleep(llm)
        for when, model in (("awake", options.model), ("reloaded", options.sleep)):
            llm.collective_rpc("reload_weights", kwargs={"weights_path": model})
            if when == "awake":
                llm.wake_up(tags=["kv_cache"])
            llm.reset_prefix_cache()
            answers[when] = generate(llm, STEPS)
    found = {"answers": answers} | layers(llm)
    del llm
    cleanup_dist_env_and_memory()
    return found


def sleep(llm: Any) -> int:
    """Sleep at level 2, and wake but for the contents of the weights. Returns how many bytes were kept on the host."""
    llm.sleep(level=2)
    (kept,) = llm.collective_rpc(lambda worker: sum(b.nbytes for b in worker._sleep_saved_buffers.values()))
    llm.wake_up(tags=["weights"])
    return int(kept)


def generate(llm: Any, steps: int) -> Any:
    """For each prompt, some of which share a prefix, the steps: each the token and the two best, with their
    log-probabilities."""
    from vllm import SamplingParams

    prompts = [{"prompt_token_ids": [(7 * i + 3) % 256 for i in range(n)]} for n in PROMPT_LENGTHS]
    sampling = SamplingParams(temperature=0, max_tokens=steps, ignore_eos=True, detokenize=False, logprobs=2)
    outputs = [answer.outputs[0] for answer in llm.generate(prompts, sampling, use_tqdm=False)]
    return [
        [
            (token, sorted(((p.logprob, t) for t, p in best.items()), reverse=True))
            for token, best in zip(output.token_ids, output.logprobs, strict=True)
        ]
        for output in outputs
    ]


if __name__ == "__main__":
    main()
