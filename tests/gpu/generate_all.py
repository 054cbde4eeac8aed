"""Generate with one model with stock vLLM and with each strategy, in one process.

    python generate_all.py MODEL OUTPUT.json ENGINE... [--arguments JSON] [--lengths N...] [--spoken] [--forced]
                                                       [--sleep OTHER_MODEL]

ENGINE is a name in SETTINGS. With what `--arguments` adds to those of vLLM's LLM. With `--spoken`, prompts are of the
sentence that the model has learned; with `--forced`, every engine goes on with the first one's tokens, whatever it
would have said; with `--sleep`, the engine sleeps at level 2 after its answers, wakes, is given its weights again and
asked again, then those of another model. With more ranks than one, each engine has worker processes of its own, which
load the installed plugin, or don't.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.extend(str(Path(__file__).parents[2] / folder) for folder in ("benchmarks", "examples"))

from switch_plugin import switch_plugin

from vllm_gdn_plugin.bench.engine.variants import STRATEGY
from vllm_gdn_plugin.decide import plan
from vllm_gdn_plugin.host.plugins import NAME, PLUGINS
from vllm_gdn_plugin.settings import variable

STEPS = 256
BEST = 5
BUILDS = "generate_all.py builds "
"""Before the name of an engine, in the log."""
DECODE_KERNEL = variable("decode_kernel")
SETTINGS = {
    "stock": {PLUGINS: ""},
    "dual_stream": {PLUGINS: NAME, STRATEGY: plan.DUAL_STREAM, DECODE_KERNEL: "0"},
    "fused": {PLUGINS: NAME, STRATEGY: plan.FUSED, DECODE_KERNEL: "0"},
    "decode": {PLUGINS: NAME, STRATEGY: plan.FUSED, DECODE_KERNEL: "1"},
    "auto": {PLUGINS: NAME, STRATEGY: plan.AUTO, DECODE_KERNEL: "auto"},
    "differ": {PLUGINS: f"{NAME},ranks_differ", STRATEGY: plan.FUSED, DECODE_KERNEL: "auto"},
}


ONE_CONFIGURATION = {"deterministic": True, "triton.autotune_pointwise": False}
"""Else Inductor chooses by time, for each engine anew, among kernels that round otherwise: by the tile a reduction adds
in another order, and another product of a sum is folded into the multiply-add (pytorch/torchtitan#4454). The variable
TORCHINDUCTOR_DETERMINISTIC does not reach vLLM 0.33's compilation."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("output", type=Path)
    parser.add_argument("engines", nargs="+", choices=SETTINGS)
    parser.add_argument("--arguments", type=json.loads, default={})
    parser.add_argument("--lengths", type=int, nargs="*", default=[3, 17, 40, 600, 700], help="of the prompts")
    parser.add_argument("--spoken", action="store_true")
    parser.add_argument("--forced", action="store_true")
    parser.add_argument("--sleep", metavar="OTHER_MODEL")
    options = parser.parse_args()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    found: dict[str, Any] = {}
    joins, (batches, preempted) = watch_joins(), watch_scheduler()
    forced = None
    for name in options.engines:
        print(f"{BUILDS}{name}", flush=True)
        switch_plugin(SETTINGS[name])  # for worker processes, too
        for watched in (joins, batches, preempted):
            watched.clear()
        found[name] = run(options, forced)
        if options.forced and not forced:
            forced = [[token for token, _ in text] for text in found[name]["answers"]["first"]]
        found[name] |= {"joins": dict(joins), "batches": list(batches), "preempted": len(preempted)}
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


def watch_scheduler() -> tuple[list[list[int]], list[str]]:
    """How many tokens of each request are in each step, by size; and the requests that give their place in the cache to
    another, and start anew later."""
    from vllm.v1.core.sched.scheduler import Scheduler

    batches: list[list[int]] = []
    preempted: list[str] = []
    schedule, preempt = Scheduler.schedule, Scheduler._preempt_request

    def watched_schedule(self: Any, *rest: Any, **more: Any) -> Any:
        found = schedule(self, *rest, **more)
        batches.append(sorted(found.num_scheduled_tokens.values()))
        return found

    def watched_preempt(self: Any, request: Any, *rest: Any, **more: Any) -> Any:
        preempted.append(request.request_id)
        return preempt(self, request, *rest, **more)

    Scheduler.schedule, Scheduler._preempt_request = watched_schedule, watched_preempt
    return batches, preempted


def layers(worker: Any) -> dict[str, Any]:
    """What the plugin does with the GDN layers of a rank, and what vLLM chose for them."""
    known = worker.vllm_config.compilation_config.static_forward_context.values()
    found = [layer for layer in known if hasattr(layer, "in_proj_ba")]
    ours = [layer.gdn for layer in found if hasattr(layer, "gdn")]
    return {
        "strategies": [gdn.strategy for gdn in ours],
        "rows": [gdn.fused.weight.shape[0] for gdn in ours if gdn.fused],
        "decodes": [bool(gdn.decode) for gdn in ours],
        "ways": [{str(n): way for n, way in gdn.decode.ways.items()} for gdn in ours if gdn.decode],
        "fused speculation": [bool(getattr(layer, "enable_fused_gdn_spec_decode", False)) for layer in found],
    }


def run(options: argparse.Namespace, forced: list[list[int]] | None) -> Any:
    """The `answers` of an engine, by name of the moment at which it was asked, and what is known of its layers."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    arguments = {
        "mamba_ssm_cache_dtype": "float32",
        "max_model_len": 1024,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 640,  # so that some prompts come in chunks, beside the decode of others
        "async_scheduling": False,  # else what is batched together may depend on the time that a step takes
        "gpu_memory_utilization": 0.01,  # asked of the GPU's free memory, but not used where the next one is given
        "kv_cache_memory_bytes": 1 << 30,
        "attention_backend": "FLASH_ATTN",
        "gdn_prefill_backend": "triton",
        "skip_tokenizer_init": True,
        "seed": 0,
        "enable_sleep_mode": bool(options.sleep),
    }
    arguments |= {"enable_trace_replay": True} if options.forced else {}
    arguments |= options.arguments
    compiled = {"inductor_compile_config": ONE_CONFIGURATION, **arguments.get("compilation_config", {})}
    llm = LLM(options.model, **arguments | {"compilation_config": compiled})
    prompts = prompts_for(options)
    answers = {"first": generate(llm, prompts, STEPS, forced)}
    if not options.forced:
        answers["again"] = generate(llm, prompts, 32)  # from the prefix cache
    if options.sleep:
        answers["host bytes asleep"] = sleep(llm)
        for when, model in (("awake", options.model), ("reloaded", options.sleep)):
            llm.collective_rpc("reload_weights", kwargs={"weights_path": model})
            if when == "awake":
                llm.wake_up(tags=["kv_cache"])
            llm.reset_prefix_cache()
            answers[when] = generate(llm, prompts, STEPS)
    found = {"answers": answers, "ranks": llm.collective_rpc(layers)}
    del llm
    cleanup_dist_env_and_memory()
    return found


def prompts_for(options: argparse.Namespace) -> list[list[int]]:
    """Token ids; some of the prompts share a prefix."""
    said = [(7 * i + 3) % 256 for i in range(256)]
    if options.spoken:
        from tiny_model import SENTENCE
        from transformers import PreTrainedTokenizerFast

        said = PreTrainedTokenizerFast.from_pretrained(options.model)(SENTENCE)["input_ids"]
    return [[said[i % len(said)] for i in range(n)] for n in options.lengths]


def sleep(llm: Any) -> int:
    """Sleep at level 2, and wake but for the contents of the weights. Returns how many bytes were kept on the host."""
    llm.sleep(level=2)
    (kept,) = llm.collective_rpc(lambda worker: sum(b.nbytes for b in worker._sleep_saved_buffers.values()))
    llm.wake_up(tags=["weights"])
    return int(kept)


def generate(llm: Any, prompts: list[list[int]], steps: int, forced: list[list[int]] | None = None) -> Any:
    """For each prompt the steps: each the token and the best, with their log-probabilities."""
    from vllm import SamplingParams

    common = {"temperature": 0, "max_tokens": steps, "ignore_eos": True, "detokenize": False, "logprobs": BEST}
    sampling = [SamplingParams(**common) for _ in prompts]
    if forced:
        sampling = [SamplingParams(**common, trace_decode_token_ids=text) for text in forced]
    asked = [{"prompt_token_ids": prompt} for prompt in prompts]
    outputs = [answer.outputs[0] for answer in llm.generate(asked, sampling, use_tqdm=False)]
    return [
        [
            (token, sorted(((p.logprob, t) for t, p in best.items()), reverse=True))
            for token, best in zip(output.token_ids, output.logprobs, strict=True)
        ]
        for output in outputs
    ]


if __name__ == "__main__":
    main()
