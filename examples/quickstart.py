"""Serve a tiny model with vllm-gdn-plugin and without it, and compare the answers.

    python quickstart.py [--compiled]

Needs vLLM and the plugin installed, no GPU and no download. Without a GPU the plugin computes both
projections one after the other, so this shows that it works, not that it is faster. Exits with
1 if the answers differ.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from progress import step
from serving import MODEL_NAME, engine_env, serve

from vllm_gdn_plugin.bench.engine.server import ServerFailed
from vllm_gdn_plugin.bench.errors import BenchError

NAME = "vllm-gdn-plugin"  # begins each line that the plugin logs
PROMPT = "The gated delta rule"
TOKENS = 96
"""Bytes of the answer: a sentence and a half."""
ENGINE_ARGS = ["--mamba-ssm-cache-dtype", "float32", "--max-model-len", "256", "--max-num-seqs", "4"]
PLUGIN_ON = {"VLLM_PLUGINS": "vllm_gdn_plugin", "VLLM_GDN_PLUGIN_STRATEGY": "dual_stream"}
PLUGIN_OFF = {"VLLM_PLUGINS": ""}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--compiled", action="store_true", help="with torch.compile: slower to start")
    engine_args = ENGINE_ARGS + ([] if parser.parse_args().compiled else ["--enforce-eager"])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the server is stopped then, too

    with tempfile.TemporaryDirectory(prefix="gdn-", ignore_cleanup_errors=True) as directory:
        scratch = Path(directory)
        on, off = engine_env(scratch, **PLUGIN_ON), engine_env(scratch, **PLUGIN_OFF)
        model = make_model(scratch / "model")
        check(on)
        answer_on, log = ask(model, on, engine_args, "with the plugin")
        said = [line for line in log.splitlines() if NAME in line.replace("_", "-")]
        print("The plugin's lines in the server's log:", *(said or ["(none)"]), sep="\n    ")
        answer_off, log_off = ask(model, off, engine_args, "without the plugin")

    if not any("dual_stream on" in line for line in said):
        print("FAILED: by the server's log, the plugin wasn't at work when it should have been.")
        return 1
    if f"{NAME} " in log_off:
        print("FAILED: by the server's log, the plugin was at work when it was switched off.")
        return 1
    if answer_on != answer_off:
        print(f"FAILED: the answers differ.\n    with:    {answer_on}\n    without: {answer_off}")
        return 1
    print(f"OK: the same {len(answer_on['tokens'])} tokens with and without the plugin,")
    print("    the same log-probabilities, bit for bit,")
    print("    and by the log the plugin was at work in the first server and not in the second.")
    return 0


def make_model(directory: Path) -> Path:
    with step("making a tiny Qwen3.5 model, which learns one sentence"):
        script = Path(__file__).with_name("tiny_model.py")
        command = [sys.executable, script, "qwen3_5", directory, "--learn"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return directory


def check(env: dict[str, str]) -> None:
    with step(f"{NAME} check"):
        # Not from the current directory, which may hold the package's source tree.
        subprocess.run([sys.executable, "-m", "vllm_gdn_plugin", "check"], cwd=env["TMPDIR"], env=env)


def ask(model: Path, env: dict[str, str], args: list[str], what: str) -> tuple[dict[str, Any], str]:
    """Serve `model`, ask it once, and return (tokens and their log-probabilities, the server's log)."""
    with step(f"vllm serve {what}: start, one answer, stop"), serve(model, env=env, args=args) as server:
        body = {"model": MODEL_NAME, "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0, "logprobs": 1}
        choice = server.post("/v1/completions", body)["choices"][0]
        logprobs = choice["logprobs"]
        answer = {"tokens": logprobs["tokens"], "logprobs": logprobs["token_logprobs"]}
        print(f"    {PROMPT!r} -> {choice['text']!r}")
    return answer, server.log_text()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ServerFailed, BenchError, subprocess.CalledProcessError) as error:
        sys.exit(f"FAILED: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted: the server is stopped and its files are removed")
