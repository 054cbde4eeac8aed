"""The small files of a model: in a directory, or of an id on the Hub."""

import json
from collections.abc import Mapping
from pathlib import Path
from threading import Thread
from typing import Any

from vllm_gdn_plugin.decide.checkpoint import Unreadable

TAKES = "it takes a local model directory, its config.json or a Hub id"

QUANTIZATION_FILES = {"hf_quant_config.json", "quant_config.json", "quantize_config.json"}
"""Where formats keep what config.json does not say."""

HUB_SECONDS = 20
"""How long the Hub may take: huggingface_hub waits for some answers without end."""


def find_directory(model: str, revision: str | None = None) -> Path:
    """The directory of a model's config.json: ``model`` itself, the directory of a file of that name, or the snapshot
    of a Hub id in the local cache, into which its small files are fetched first where the Hub can be reached.

    Raises:
        Unreadable: with one line that says what is wrong.
    """
    path = Path(model)
    try:
        is_directory, is_file = path.is_dir(), path.is_file()
    except (OSError, ValueError):  # too long, or a NUL in it
        is_directory = is_file = False
    if is_directory:
        return path
    if is_file:
        if path.name != "config.json":
            raise Unreadable(f"this file is not a config.json: {TAKES}")
        return path.parent
    return _snapshot(model, revision)


def _snapshot(model: str, revision: str | None) -> Path:
    try:
        from huggingface_hub import HfApi, constants, hf_hub_download, try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError
    except ImportError:
        raise Unreadable(f"there is no such path: {TAKES}, and an id needs vLLM") from None
    came: list[str | Exception] = []

    def fetch() -> None:
        try:
            info = HfApi().model_info(model, revision=revision, timeout=HUB_SECONDS)
            there = {file.rfilename for file in info.siblings or ()}
            # config.json last: where it is in the cache, so are the others. By the commit, none would be found offline.
            for name in (*sorted(there & QUANTIZATION_FILES), "config.json"):
                came.append(hf_hub_download(model, name, revision=revision))
        except Exception as error:  # each release of huggingface_hub, and of what it fetches with, has its own
            came.append(error)

    thread = Thread(target=fetch, daemon=True)
    thread.start()
    thread.join(HUB_SECONDS)
    failed = came[-1] if came and isinstance(came[-1], Exception) else None
    if isinstance(failed, HFValidationError):
        raise Unreadable(f"there is no such path: {TAKES}")
    if thread.is_alive() or failed:
        constants.HF_HUB_OFFLINE = True  # so that nothing else in this process waits for it again
        config = try_to_load_from_cache(model, "config.json", revision=revision)
    else:
        config = str(came[-1])
    if isinstance(config, str):
        return Path(config).parent
    lines = str(failed).splitlines() if failed else [f"no answer within {HUB_SECONDS} s"]
    reason = next(filter(None, map(str.strip, lines)), type(failed).__name__)
    raise Unreadable(f"it is no local path, it is not in the local cache, and from the Hub: {reason}")


def load_config(directory: Path) -> Mapping[str, Any]:
    """What the config.json in ``directory`` holds.

    Raises:
        Unreadable: there is none, or it is no model's.
    """
    file = directory / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError:
        raise Unreadable(f"there is no {file}: {TAKES}") from None
    except ValueError as error:
        raise Unreadable(f"{file} is not JSON: {error}") from None
    if not isinstance(config, dict) or not isinstance(config.get("text_config", {}), dict):
        raise Unreadable(f"{file} is not a model's config.json")
    return config


def quantised_by(directory: Path) -> str:
    """The file beside config.json that says what is quantised, or ""."""
    return next((name for name in sorted(QUANTIZATION_FILES) if (directory / name).exists()), "")
