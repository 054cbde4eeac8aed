"""Whether `fused` changes how fast vLLM's CPU engine decodes.

    python benchmarks/cpu_decode.py [--rounds N] [--tokens N] [--threads N] [--note TEXT] [--output DIRECTORY]

Each round starts a fresh engine without the plugin and one with `fused`, one after the other, for each model; which
goes first changes from round to round. A sample is the decode rate of one engine: the tokens after the first, divided
by the time that they add to a request. Writes cpu_decode.json and the table cpu_decode.md. Needs scipy.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from vllm_gdn_plugin.bench.engine.table import shown
from vllm_gdn_plugin.bench.machine import cpu
from vllm_gdn_plugin.bench.stats import paired_change
from vllm_gdn_plugin.bench.table import table

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from serving import engine_env
from tiny_model import make_model

BATCHES = (1, 8)
STRATEGIES = {"off": {"VLLM_PLUGINS": ""}, "fused": {"VLLM_GDN_PLUGIN_STRATEGY": "fused"}}
REPEATS = 3
"""Of each measurement in one engine, of which the median counts."""
PROMPT_LENGTH = 16

LARGER: dict[str, Any] = {
    "vocab_size": 32768,
    "hidden_size": 1024,
    "intermediate_size": 3584,
    "num_hidden_layers": 8,
    "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 2,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 16,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "max_position_embeddings": 2048,
    "dtype": "bfloat16",
}
"""A dense model of real head dims. Its weights are dummies: only its speed is looked at."""

ONE_ENGINE = """
import json, statistics, sys, time
from vllm import LLM, SamplingParams
from vllm.inputs import TokensPrompt

model, load_format, tokens, repeats, length, *batches = sys.argv[1:]
llm = LLM(model, load_format=load_format, enforce_eager=True, skip_tokenizer_init=True, mamba_ssm_cache_dtype="float32",
          max_model_len=512, max_num_seqs=8, kv_cache_memory_bytes=128 << 20, seed=0)

def seconds(batch, count):
    sampling = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
    ids = [[(7 * i + 31 * n) % 256 for i in range(int(length))] for n in range(batch)]
    start = time.perf_counter()
    outputs = llm.generate([TokensPrompt(prompt_token_ids=i) for i in ids], sampling, use_tqdm=False)
    took = time.perf_counter() - start
    assert [len(output.outputs[0].token_ids) for output in outputs] == [count] * batch
    return took

rates = {}
for batch in map(int, batches):
    seconds(batch, 8)
    times = [seconds(batch, 1 + int(tokens)) - seconds(batch, 1) for _ in range(int(repeats))]
    rates[batch] = batch * int(tokens) / statistics.median(times)
print(json.dumps(rates))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=128, help="decoded in one measurement, after the first")
    parser.add_argument("--threads", type=int, default=1, help="OpenMP threads of the engine")
    parser.add_argument("--note", default="", help="what a reader should know about the machine during the run")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    if options.rounds < 2:
        parser.error("an interval needs two rounds or more")
    with tempfile.TemporaryDirectory(prefix="gdn-", ignore_cleanup_errors=True) as scratch:
        samples = measure(Path(scratch), options)
    result = {
        "command": f"python benchmarks/cpu_decode.py --rounds {options.rounds} --tokens {options.tokens}"
        f" --threads {options.threads}",
        "hardware": f"{cpu()}, {os.cpu_count()} cores, {options.threads} used",
        "versions": {name: version(name) for name in ("vllm-gdn-plugin", "vllm", "torch", "scipy")}
        | {"python": sys.version.split()[0]},
        "note": options.note,
        "mode": "eager, one process",
        "models": {"tiny": "qwen3_5 of examples/tiny_model.py", "larger": LARGER},
        "unit": "decoded tokens per second, all requests of a batch together; one sample a round",
        "samples": samples,
        "load_average_at_end": os.getloadavg(),
    }
    (options.output / "cpu_decode.json").write_text(json.dumps(result, indent=1) + "\n")
    text = table_of(samples)
    (options.output / "cpu_decode.md").write_text(text)
    print(text, end="")


def measure(scratch: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each engine: model, round, strategy, and the rate at each batch size."""
    models = {"tiny": (make_model("qwen3_5", scratch / "tiny"), "auto"), "larger": (make_larger(scratch), "dummy")}
    settings = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "TORCH_COMPILE_DISABLE": "1",
        "OMP_NUM_THREADS": str(options.threads),
    }
    rows = []
    for round_number in range(options.rounds):
        order = list(STRATEGIES) if round_number % 2 == 0 else list(STRATEGIES)[::-1]
        for model, (path, load_format) in models.items():
            for strategy in order:
                command = [sys.executable, "-c", ONE_ENGINE, str(path), load_format]
                command += map(str, (options.tokens, REPEATS, PROMPT_LENGTH, *BATCHES))
                start = time.monotonic()
                done = subprocess.run(
                    command,
                    env=engine_env(scratch, **settings, **STRATEGIES[strategy]),
                    cwd=scratch,
                    capture_output=True,
                    text=True,
                )
                log = done.stdout + done.stderr
                if done.returncode != 0 or (" fused on " in log) != (strategy == "fused"):
                    raise SystemExit(f"{model} {strategy}: status {done.returncode}\n{log[-4000:]}")
                rates = json.loads(next(line for line in done.stdout.splitlines()[::-1] if line.startswith("{")))
                rows.append({"round": round_number, "model": model, "strategy": strategy, "rates": rates})
                print(f"{rows[-1]} ({time.monotonic() - start:.0f} s)", file=sys.stderr)
    return rows


def make_larger(scratch: Path) -> Path:
    """Only a config.json: vLLM makes dummy weights for it."""
    from transformers import Qwen3_5TextConfig

    config = Qwen3_5TextConfig(**LARGER, architectures=["Qwen3_5ForCausalLM"])
    config.save_pretrained(scratch / "larger")
    return scratch / "larger"


def table_of(samples: list[dict[str, Any]]) -> str:
    """Markdown: median and range of each strategy, and how the rounds' pairs compare."""
    lines = [["model", "batch", "off, tokens/s", "fused, tokens/s", "change by fused"]]
    for model, batch, rates in cells(samples):
        spreads = [f"{statistics.median(r):.1f} ({min(r):.1f} to {max(r):.1f})" for r in rates.values()]
        lines.append([model, batch, *spreads, shown(paired_change(rates["fused"], rates["off"]))])
    return table(lines) + "\n"


def cells(samples: list[dict[str, Any]]) -> Iterator[tuple[str, str, dict[str, list[float]]]]:
    """(model, batch, rates of each strategy in the order of the rounds)."""
    for model in dict.fromkeys(row["model"] for row in samples):
        for batch in map(str, BATCHES):
            yield (
                model,
                batch,
                {
                    strategy: [
                        row["rates"][batch] for row in samples if (row["model"], row["strategy"]) == (model, strategy)
                    ]
                    for strategy in STRATEGIES
                },
            )


if __name__ == "__main__":
    main()
