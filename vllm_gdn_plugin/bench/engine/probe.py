"""What a running server tells about itself: its answer to one request, its memory, its KV cache."""

import re
import subprocess
from contextlib import suppress
from pathlib import Path

import psutil

from vllm_gdn_plugin.bench.engine.server import Server
from vllm_gdn_plugin.bench.errors import WrongResult

PROMPT = list(range(1, 17))
"""Token ids, so that it is the same for every model."""
ANSWER_TOKENS = 16
TOLERANCE = 0.25
"""How far the log-probability of a chosen token may lie from the stock engine's, in nat. fused rounds differently,
which moves it by hundredths; a wrong weight or a wrong order moves it by whole ones."""

MIB = 1 << 20


def answer(server: Server) -> tuple[list[str], list[float]]:
    """The tokens of one greedy answer, and their log-probabilities."""
    body = {"prompt": PROMPT, "max_tokens": ANSWER_TOKENS, "temperature": 0, "logprobs": 1, "ignore_eos": True}
    body["return_tokens_as_token_ids"] = True  # some ids have no text, or the same
    logprobs = server.post("/v1/completions", body)["choices"][0]["logprobs"]
    return list(logprobs["tokens"]), [float(value) for value in logprobs["token_logprobs"]]


def compare(stock: tuple[list[str], list[float]], found: tuple[list[str], list[float]]) -> str:
    """Says how an answer compares with the stock engine's; raises WrongResult where rounding cannot explain it.

    Compared are the log-probabilities of the tokens up to the first that differs, that one included: until there, both
    engines have seen the same text.
    """
    if stock == found:
        return f"the same {len(stock[0])} tokens and log-probabilities"
    pairs = list(zip(*stock, *found, strict=True))
    same = next((i for i, (one, _, other, _) in enumerate(pairs) if one != other), len(pairs))
    apart = max(abs(one - other) for _, one, _, other in pairs[: same + 1])
    if not apart <= TOLERANCE:
        raise WrongResult(
            f"its answer is not the stock engine's: the log-probability of one of the first {same + 1} tokens is"
            f" {apart:.2f} nat away"
        )
    return f"the same first {same} of {len(pairs)} tokens, log-probabilities within {apart:.4f} nat"


def memory(server: Server) -> dict[str, float]:
    """Memory and KV cache of the server, now that it has worked; what cannot be known is left out."""
    parent = psutil.Process(server.process.pid)
    peaks = [_peak_bytes(process.pid) for process in (parent, *parent.children(recursive=True))]
    values = {"host_memory_mib": sum(peaks) / MIB}
    blocks = re.search(r'vllm:cache_config_info\{[^}]*num_gpu_blocks="(\d+)"', server.get("/metrics"))
    if blocks:
        values["kv_cache_blocks"] = float(blocks[1])
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    with suppress(OSError, ValueError, subprocess.SubprocessError):
        used = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
        values["gpu_memory_mib"] = float(sum(map(int, used.split())))
    return values


def _peak_bytes(pid: int) -> int:
    """The kernel's own record of the most that was resident; 0 for a process that is gone."""
    with suppress(OSError):
        found = re.search(r"^VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
        return int(found[1]) * 1024 if found else 0
    return 0
