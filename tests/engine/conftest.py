"""Real vLLM engines on tiny models, each in a process of its own, and what needs vLLM but no engine."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from packaging.version import Version
from serving import engine_env

from vllm_gdn_plugin import report
from vllm_gdn_plugin.bench.engine.server import end_group
from vllm_gdn_plugin.host.process import LOGGER

HERE = Path(__file__).parent
EXAMPLES = HERE.parents[1] / "examples"
TIMEOUT_SECONDS = 300


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if importlib.util.find_spec("vllm") is None:
        skip = pytest.mark.skip(reason="vllm isn't installed: run `python3.11 dev.py test`")
        for item in items:
            if HERE in item.path.parents:
                item.add_marker(skip)


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The warnings of the plugin since the test began, as if nothing had been said in this process before."""
    monkeypatch.setattr(report, "_said", set())
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    ours = logging.getLogger(LOGGER)
    ours.addHandler(handler)
    yield messages
    ours.removeHandler(handler)


@pytest.fixture(scope="session")
def scratch() -> Iterator[Path]:
    """One directory for the engines of this session: caches are shared, so later ones start faster.

    Not pytest's tmp_path: vLLM puts sockets here, whose paths must be short.
    """
    with tempfile.TemporaryDirectory(prefix="gdn-", ignore_cleanup_errors=True) as directory:
        yield Path(directory)


@pytest.fixture(scope="session")
def models(scratch: Path) -> Callable[[str], Path]:
    """`models(kind)` is the directory of the tiny model `kind` (see examples/tiny_model.py)."""

    def model(kind: str) -> Path:
        directory = scratch / "models" / kind
        if not directory.exists():
            command = [sys.executable, EXAMPLES / "tiny_model.py", kind, directory]
            if Version(importlib.metadata.version("vllm")) < Version("0.27"):  # knows Qwen3.5 only so
                command.append("--vision")
            subprocess.run(command, check=True, capture_output=True)
        return directory

    return model


@pytest.fixture(scope="session")
def witness(scratch: Path) -> Callable[..., tuple[dict[str, str], Callable[[], list[dict[str, Any]]]]]:
    """`env, events = witness(breaks=None)`: settings that load tests/engine/witness.py, and what it wrote down."""
    site = scratch / "witness"
    information = site / "witness-0.dist-info"
    information.mkdir(parents=True, exist_ok=True)
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: witness\nVersion: 0\n")
    (information / "entry_points.txt").write_text("[vllm.general_plugins]\nwitness = witness:register\n")
    shutil.copy(HERE / "witness.py", site)

    path = os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])

    def settings(breaks: str | None = None) -> tuple[dict[str, str], Callable[[], list[dict[str, Any]]]]:
        file = site / f"{time.time_ns()}.jsonl"
        env = {"PYTHONPATH": path, "WITNESS_FILE": str(file)} | ({"WITNESS_BREAKS": breaks} if breaks else {})
        return env, lambda: [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    return settings


@pytest.fixture(scope="session")
def run_generate(run_script: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """`run_script`, where vLLM has the compiled part that an engine needs."""
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    if not any(list(Path(path).glob("_C*")) for path in spec.submodule_search_locations or ()):
        pytest.skip(f"vLLM {importlib.metadata.version('vllm')} is here without its compiled part")
    return run_script


@pytest.fixture(scope="session")
def stock(run_generate: Callable[..., Any], witness: Callable[..., Any]) -> Any:
    """What stock vLLM answers with the tiny Qwen3.5, eagerly."""
    env, _ = witness()
    return run_generate("qwen3_5", env=env | {"VLLM_PLUGINS": "witness"})


@pytest.fixture(scope="session")
def run_script(models: Callable[[str], Path], scratch: Path) -> Callable[..., dict[str, Any]]:
    """`run_script(kind, env={...}, eager=True, tp=1, pp=1)` generates with a fresh engine.

    Returns what generate.py wrote, `token_ids` and `logprobs` with a list for each prompt, all that the processes
    printed as `log`, and the directories that vLLM added to its `compile_caches`. `env` adds to `engine_env`, so it
    can also choose another VLLM_CACHE_ROOT. `script` is one to run in place of generate.py, with the same arguments,
    `launcher` the command that runs it, and `arguments` are added. `fails`: the engine is expected to stop with an
    error.
    """

    def generate(
        kind: str,
        *,
        env: Mapping[str, str] | None = None,
        eager: bool = True,
        tp: int = 1,
        pp: int = 1,
        script: Path = HERE / "generate.py",
        arguments: Sequence[str | Path] = (),
        launcher: Sequence[str | Path] = (sys.executable,),
        fails: bool = False,
    ) -> dict[str, Any]:
        output = scratch / "tmp" / "generated.json"
        output.unlink(missing_ok=True)
        command = [*map(str, launcher), str(script), str(models(kind)), str(output)]
        command += ["--tensor-parallel-size", str(tp), "--pipeline-parallel-size", str(pp)]
        command += [*([] if eager else ["--compiled"]), *map(str, arguments)]
        caches = scratch / "cache" / "torch_compile_cache"
        before = set(caches.glob("*/*"))
        log = _run(command, engine_env(scratch, **_engine_settings(eager, tp * pp) | dict(env or {})), fails)
        new = {"log": log, "compile_caches": {cache.name for cache in set(caches.glob("*/*")) - before}}
        return (json.loads(output.read_text()) if not fails else {}) | new

    return generate


def _engine_settings(eager: bool, workers: int) -> dict[str, str]:
    """The quickest way to run: in this process where possible, on one core per worker."""
    settings = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": "1"}
    if eager:
        settings["TORCH_COMPILE_DISABLE"] = "1"
    if workers > 1:
        settings["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(map(str, sorted(os.sched_getaffinity(0))[:workers]))
    return settings


def _run(command: list[str], env: Mapping[str, str], fails: bool) -> str:
    """Run `command` in a process group of its own, end all of it, and return what it printed."""
    log_path = Path(env["TMPDIR"]) / "generate.log"
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            command, cwd=env["TMPDIR"], env=dict(env), stdout=log, stderr=log, start_new_session=True
        )
        try:
            status: int | str = process.wait(TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired:
            status = f"no end within {TIMEOUT_SECONDS} s"
        finally:
            end_group(process)
    text = log_path.read_text(errors="replace")
    if bool(status) != fails:
        pytest.fail(f"{' '.join(command)}: {status}\n" + "\n".join(text.splitlines()[-40:]), pytrace=False)
    return text
