"""`bench serve` and `bench compile` with a `vllm` that only says it serves: which engines start when and with what, how
clients run, what is measured and kept."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_gdn_plugin.bench.engine import server
from vllm_gdn_plugin.bench.engine.client import client
from vllm_gdn_plugin.bench.engine.results import COMPILE, SERVE, EngineRun
from vllm_gdn_plugin.bench.engine.server import ServerFailed
from vllm_gdn_plugin.bench.engine.variants import OFF, variants
from vllm_gdn_plugin.bench.errors import BadInput
from vllm_gdn_plugin.bench.results import Machine
from vllm_gdn_plugin.cli.main import main

pytest.importorskip("psutil", reason="psutil is not installed")
import psutil

from vllm_gdn_plugin.bench.engine import compile as compiling
from vllm_gdn_plugin.bench.engine.serve import START, Load, measure

NEEDS = ("torch", "numpy", "scipy", "matplotlib", "tqdm", "vllm")
MISSING = [name for name in NEEDS if importlib.util.find_spec(name) is None]

VLLM = """
import json, os, pathlib, signal, subprocess, sys, threading, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

HERE = pathlib.Path(os.environ["FAKE_VLLM"])
strategy = os.environ.get("VLLM_GDN_PLUGIN_STRATEGY", "off")

def option(name):
    return sys.argv[sys.argv.index(name) + 1]

class Answers(BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/health" and (
            len(list(HERE.glob("started-*"))) < int(os.environ.get("FAKE_TOGETHER", "1"))
            or (HERE / f"dying-{strategy}").exists()
        ):
            return self.send_error(503)
        if self.path == "/metrics":
            return self.say('vllm:cache_config_info{block_size="16",num_gpu_blocks="7"} 1.0')
        self.say({"data": [{"id": "a model"}]})

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        # Greedy; and as ids, because a model's may be more than its tokenizer has words.
        if asked["temperature"] != 0 or not asked.get("return_tokens_as_token_ids"):
            return self.send_error(400)
        if os.environ.get("FAKE_DIES") == strategy:
            print("MemoryError: no more", flush=True)
            if os.environ["FAKE_DYING"] == "at once":
                os._exit(3)
            (HERE / f"dying-{strategy}").touch()
            threading.Timer(0.5, os._exit, [3]).start()
            return self.send_error(500)
        (HERE / f"asked-{strategy}").touch()
        self.say({"choices": [{"logprobs": {"tokens": ["token_id:1"], "token_logprobs": [-1.0]}}]})

    def say(self, body):
        self.send_response(200)
        self.end_headers()
        self.wfile.write((body if isinstance(body, str) else json.dumps(body)).encode())

def end(*_):
    time.sleep(0.2)
    (HERE / f"ended-{strategy}").touch()
    os._exit(0)

if sys.argv[1] == "serve":
    if os.environ.get("FAKE_REFUSES") == strategy:
        while len(list(HERE.glob("started-*"))) < 2:
            time.sleep(0.01)
        raise ValueError("no room")
    assert option("--host") == "127.0.0.1"
    signal.signal(signal.SIGTERM, end)
    if "VLLM_CACHE_ROOT" in os.environ:  # bench compile's
        graphs = pathlib.Path(os.environ["VLLM_CACHE_ROOT"], "aotautograd")
        graphs.joinpath(str(len(list(graphs.glob("*"))))).mkdir(parents=True)  # one more than there were
        caches = ("VLLM_CACHE_ROOT", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
        assert len({pathlib.Path(os.environ[name]).parent for name in caches}) == 1
    server = ThreadingHTTPServer(("127.0.0.1", int(option("--port"))), Answers)
    print("" if strategy == "off" else "vllm-gdn-plugin 0: at work on 3 of 4 GDN layers", flush=True)
    asked = sorted(path.name for path in HERE.glob("asked-*"))
    new = HERE / f"new-{os.getpid()}"  # two of a strategy may start at once
    new.write_text(json.dumps([subprocess.Popen(["sleep", "600"]).pid, *asked]))
    new.rename(HERE / f"started-{strategy}")
    server.serve_forever()
assert sys.argv[1:3] == ["bench", "serve"]
if "--help" in sys.argv:
    sys.exit(0)
with (HERE / "clients").open("a") as file:
    print(json.dumps([os.getpid(), *sys.argv[3:]]), file=file)
if "--ends-early" in sys.argv:
    sys.exit(option("--ends-early") or None)
if option("--max-concurrency") == os.environ.get("FAKE_FAILS"):
    raise ValueError("no such concurrency")
if option("--max-concurrency") == os.environ.get("FAKE_HANGS"):
    time.sleep(600)
print("0\\n1")  # as status of the process: what vLLM prints is not taken for it
found = dict.fromkeys(("output_throughput", "median_tpot_ms", "median_itl_ms", "median_ttft_ms"), 1.0)
found["completed"] = int(option("--num-prompts"))
pathlib.Path(option("--result-dir"), option("--result-filename")).write_text(json.dumps(found))
if "--ends-late" in sys.argv:
    sys.exit(option("--ends-late"))
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory whose `vllm` is the one above, which keeps its records there."""
    package = tmp_path / "path" / "vllm" / "entrypoints" / "cli"
    package.mkdir(parents=True)
    for directory in (package, package.parent, package.parent.parent):
        (directory / "__init__.py").write_text("")
    (package / "main.py").write_text(VLLM)
    path = [str(tmp_path / "path"), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))
    monkeypatch.setenv("FAKE_VLLM", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(server, "START_SECONDS", 60)
    return tmp_path


MACHINE = Machine("cpu", "a processor", "3.11.0", "0.1.0", "2.13.0")
PROGRESS = SimpleNamespace(set_description=print, update=print)


def measured(load: Load, strategies: list[str], vllm_arguments: list[str], side_by_side: bool = True) -> EngineRun:
    """Two rounds."""
    run = EngineRun(SERVE, "command", "2026-01-01", 2, "a model", vllm_arguments, variants(strategies), MACHINE)
    try:
        measure(run, load, side_by_side, PROGRESS)
    except BadInput as error:
        run.stopped = str(error)
    return run


def clients(directory: Path) -> list[list[Any]]:
    """(process, its arguments) of each `vllm bench serve`."""
    return [json.loads(line) for line in (directory / "clients").read_text().splitlines()]


def option(client: list[Any], name: str) -> str:
    return str(client[client.index(name) + 1])


def started(directory: Path) -> dict[str, list[Any]]:
    """(a process of its own, the engines that had been asked by then) of each `vllm serve`."""
    return {path.name.removeprefix("started-"): json.loads(path.read_text()) for path in directory.glob("started-*")}


def no_process_is_left(directory: Path) -> bool:
    known = [*started(directory).values(), *(clients(directory) if (directory / "clients").exists() else [])]
    left = [psutil.Process(process) for process, *_ in known if psutil.pid_exists(process)]
    end = time.monotonic() + 10
    while (
        left := [p for p in left if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    ) and time.monotonic() < end:
        time.sleep(0.01)
    return not left


KV_CACHE = ["--kv-cache-memory-bytes", "1000"]
BOTH = ["fused", "dual_stream"]
ONE = Load([1], [8], 4, 1)


def test_engines_with_a_cache_of_given_size_start_at_once(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_TOGETHER", "3")  # none is healthy before all have started
    run = measured(Load([1, 2], [8, 64], 4, 1), BOTH, KV_CACHE)
    assert run.stopped is None
    assert run.verified.keys() == run.said.keys() == set(BOTH)
    assert all(" GDN layers" in line for line in run.said.values())
    assert started(here).keys() == {OFF, *BOTH}
    assert {path.name for path in here.glob("ended-*")} == {f"ended-{name}" for name in (OFF, *BOTH)}
    cases = [f"{length} in, concurrency {count}" for length in (8, 64) for count in (1, 2)]
    order = [OFF, *BOTH, *BOTH, OFF]
    assert [(s.variant, s.case) for s in run.samples] == [(name, case) for name in order for case in cases]
    ran = clients(here)
    assert len({client[0] for client in ran}) == 1  # one process, which has imported vLLM once
    assert len({option(client, "--base-url") for client in ran}) == 3
    assert all("--ignore-eos" in client for client in ran)  # so that every answer is as long as asked for
    lengths = [option(client, "--random-input-len") for client in ran[:4]]
    assert lengths == ["8", "8", "64", "64"]
    seeds = [option(client, "--seed") for client in ran]
    assert (seeds[:4], len(set(seeds))) == (seeds[4:8], 8)
    assert no_process_is_left(here)


def test_other_engines_start_one_after_the_other(here: Path) -> None:
    assert measured(ONE, BOTH, []).stopped is None
    assert started(here)["dual_stream"][1:] == ["asked-fused", "asked-off"]


def test_engines_in_turn_are_new_in_each_round(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = here / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 100; echo 23\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{here}:{os.environ['PATH']}")
    run = measured(ONE, ["fused"], [], side_by_side=False)
    assert [s.variant for s in run.samples if "startup_s" in s.values] == [OFF, "fused", "fused", OFF]
    assert len({option(client, "--base-url") for client in clients(here)}) == 4
    assert min(run.values("startup_s", START, OFF).values()) > 0
    assert set(run.values("kv_cache_blocks", START, OFF).values()) == {7}
    assert set(run.values("gpu_memory_mib", START, OFF).values()) == {123}
    assert 5 < min(run.values("host_memory_mib", START, OFF).values()) < 500  # a Python and a sleep


def test_caches_are_empty_then_full(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at_once = 3
    run = EngineRun(COMPILE, "command", "2026-01-01", 2, "a model", [], variants(["fused"]), MACHINE)
    started, together = compiling.started, []

    def noted(run: Any, names: Any, *arguments: Any, **options: Any) -> Any:
        together.append(names)
        return started(run, names, *arguments, **options)

    monkeypatch.setattr(compiling, "started", noted)
    compiling.measure(run, at_once, PROGRESS)
    order = [OFF, "fused", "fused", OFF]
    assert together == [order[n : n + at_once] for n in range(0, 4, at_once) for _ in range(2)]
    expected = {(n, name, case) for n in range(2) for name in (OFF, "fused") for case in ("cold", "warm")}
    assert {(s.round, s.variant, s.case) for s in run.samples} == expected
    assert all(s.values["artifacts"] == {"cold": 1, "warm": 2}[s.case] for s in run.samples)
    assert len(run.samples) == compiling.steps(run) == 8
    assert run.verified == {"fused": "the same 1 tokens and log-probabilities"}
    assert no_process_is_left(here)


@pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")
def test_starts_at_the_same_time_are_whole_rounds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for at_once in (3, 6, 8):
        line = ["bench", "compile", "--model", "a model", "--device", "cpu", "--rounds", "2", "--strategy", "fused"]
        assert main([*line, "--at-once", str(at_once), "--output", str(tmp_path), "--", *KV_CACHE]) == 2
        told = capsys.readouterr().err
        assert told.count("\n") == 1
        assert f"--at-once {at_once}: 2 rounds of 2 engines are not made of groups of so many" in told


def test_an_engine_that_never_answers_is_stopped(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_TOGETHER", "3")
    monkeypatch.setattr(server, "START_SECONDS", 1)
    run = measured(ONE, ["fused"], [])
    assert run.stopped
    assert "off: the server did not answer within 1 s (its log: " in run.stopped
    assert no_process_is_left(here)


def test_an_engine_that_does_not_start_stops_the_others(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_TOGETHER", "3")  # off and fused wait for dual_stream
    monkeypatch.setenv("FAKE_REFUSES", "dual_stream")
    run = measured(ONE, BOTH, KV_CACHE)
    assert run.stopped
    assert "dual_stream: the server stopped with 1: ValueError: no room (its log: " in run.stopped
    assert set(started(here)) == {OFF, "fused"}
    assert no_process_is_left(here)


@pytest.mark.parametrize("dying", ["at once", "later"])
def test_an_engine_that_dies_gets_one_line_and_keeps_its_log(
    here: Path, dying: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_DIES", "fused")
    monkeypatch.setenv("FAKE_DYING", dying)
    run = measured(ONE, ["fused"], KV_CACHE)
    assert run.stopped
    assert run.stopped.startswith("fused: the server stopped with 3: ")
    assert "MemoryError: no more" in Path(run.stopped.partition("(its log: ")[2].rstrip(")")).read_text()
    assert no_process_is_left(here)


def test_a_client_that_fails_gets_one_line(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_FAILS", "2")
    run = measured(Load([1, 2], [8], 4, 1), ["fused"], KV_CACHE)
    assert run.stopped == "vllm bench serve, concurrency 2: status 1: ValueError: no such concurrency"
    assert [(s.variant, s.case) for s in run.samples] == [(OFF, "concurrency 1")]
    assert no_process_is_left(here)


def test_no_run_of_a_client_is_taken_for_another(here: Path) -> None:
    works = {"max-concurrency": 1, "num-prompts": 2}
    with client(os.environ, here) as driver:
        assert driver.run(works)["completed"] == 2
        for options, what, log in (
            ({"ends-early": "no room"}, "status 1", {"no room"}),
            ({"ends-early": ""}, "status 0", set()),
            ({"ends-late": "too slow"}, "status 1", {"0", "1", "too slow"}),
        ):
            with pytest.raises(ServerFailed) as failed:
                driver.run(works | options)
            assert (failed.value.what, set(failed.value.log.splitlines())) == (what, log)
        process = clients(here)[0][0]
        os.kill(process, signal.SIGKILL)
        os.waitid(os.P_PID, process, os.WEXITED | os.WNOWAIT)
        with pytest.raises(ServerFailed, match="its process is gone"):
            driver.run(works)


@pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")
def test_when_it_is_interrupted_it_keeps_what_was_measured(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_HANGS", "2")
    line = [sys.executable, "-m", "vllm_gdn_plugin", "bench", "serve", "--model", "a model", "--device", "cpu"]
    line += [
        "--side-by-side",
        "--input-len",
        "8,64",
        "--concurrency",
        "1,2",
        "--output",
        str(here / "out"),
        "--",
        *KV_CACHE,
    ]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (here / "clients").exists() or len(clients(here)) < 2:
        assert process.poll() is None
    while process.poll() is None:  # only the first one counts
        process.send_signal(signal.SIGINT)
        time.sleep(0.01)
    _, errors = process.communicate()
    assert process.returncode == 130
    assert "interrupted; kept: 2 of 12 steps" in errors.splitlines()[-1]
    assert (here / "out" / "serve.png").exists()
    run = json.loads((here / "out" / "serve.json").read_text())
    assert {case: list(engines) for case, engines in run["samples"].items()} == {"8 in, concurrency 1": [OFF]}
    assert no_process_is_left(here)
