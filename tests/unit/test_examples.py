"""The Dockerfile of examples/: what it is made of, and what its commands do where there is no image to build."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def instructions() -> list[tuple[str, str]]:
    """(instruction, arguments) of each, without comments and with continued lines joined."""
    text = "\n".join(line for line in (ROOT / "examples" / "Dockerfile").read_text().splitlines() if line[:1] != "#")
    lines = [line for line in text.replace("\\\n", "").splitlines() if line.strip()]
    return [(name, " ".join(arguments.split())) for name, _, arguments in (line.partition(" ") for line in lines)]


def test_it_is_pinned_by_digest_and_checked_twice() -> None:
    assert [name for name, _ in instructions()] == ["FROM", "RUN", "RUN", "ENV", "ENTRYPOINT"]
    (_, image), (_, install), (_, check), (_, require), (_, start) = instructions()
    assert re.fullmatch(r"vllm/vllm-openai:v\d+\.\d+\.\d+@sha256:<digest>", image)
    assert "--mount=type=bind,source=dist,target=/plugin python3 -m pip install --no-deps --no-index" in install
    assert check.startswith("vllm-gdn-plugin check --vllm-version ")
    assert require == "REQUIRE=fused"
    assert json.loads(start)[:2] == ["bash", "-c"]


def command(folder: Path, name: str, script: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


@pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vllm isn't installed: run `python3.11 dev.py test`"
)
def test_the_check_of_the_build_needs_no_gpu(tmp_path: Path) -> None:
    command(tmp_path, "python3", f'exec {sys.executable} "$@"')
    command(tmp_path, "vllm-gdn-plugin", f'exec {sys.executable} -m vllm_gdn_plugin "$@"')
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    check = instructions()[2][1]
    built = subprocess.run(["sh", "-c", check], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    assert re.search(r"^status +active$", built.stdout, re.MULTILINE)
    assert "is as the plugin expects it" in built.stdout
    refused = check.replace('version("vllm")', '"0.34.0"')
    assert refused != check
    assert subprocess.run(["sh", "-c", refused], cwd=tmp_path, env=env, capture_output=True).returncode == 1


@pytest.mark.parametrize("status", [0, 1, 2])
def test_the_server_starts_only_where_the_check_passes(tmp_path: Path, status: int) -> None:
    for name, exit_status in (("vllm-gdn-plugin", status), ("vllm", 0)):
        command(tmp_path, name, f'echo {name} "$@"; exit {exit_status}')
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "REQUIRE": "dual_stream"}
    start = [*json.loads(instructions()[-1][1]), *shlex.split("--max-model-len 4096 --served-model-name 'a model'")]
    result = subprocess.run(start, env=env, capture_output=True, text=True)
    assert result.returncode == status
    check, *serve = result.stdout.splitlines()
    assert check == "vllm-gdn-plugin check --model /model --require dual_stream"
    assert serve == ([] if status else ["vllm serve /model --max-model-len 4096 --served-model-name a model"])
