"""Serve the tiny model in a scratch directory."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from vllm_gdn_plugin.bench.engine import server

MODEL_NAME = "tiny"


def engine_env(scratch: Path, **settings: str) -> dict[str, str]:
    """This process's environment for one engine that keeps all its files below `scratch`.

    Inherited `VLLM_*` variables stay out, `settings` are added. `scratch` must be short: vLLM puts
    sockets below it, and their paths may not exceed 107 characters.
    """
    cache, tmp = scratch / "cache", scratch / "tmp"
    cache.mkdir(parents=True, exist_ok=True)
    tmp.mkdir(parents=True, exist_ok=True)
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("VLLM_")}
    return inherited | {
        "TMPDIR": str(tmp),
        "VLLM_CACHE_ROOT": str(cache),
        "VLLM_CONFIG_ROOT": str(cache / "config"),
        "XDG_CACHE_HOME": str(cache),
        "HF_HOME": str(cache / "huggingface"),
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; ignored on GPUs
        **settings,
    }


def serve(model: Path, *, env: Mapping[str, str], args: Sequence[str] = ()) -> AbstractContextManager[server.Server]:
    """Serve `model` as `MODEL_NAME` until the block ends. `env` is the whole environment (see `engine_env`)."""
    arguments = ["--served-model-name", MODEL_NAME, *args]
    return server.serve(model.resolve(), env=env, directory=Path(env["TMPDIR"]), arguments=arguments)
