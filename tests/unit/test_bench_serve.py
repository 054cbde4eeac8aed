"""`bench serve` with a `vllm` that only says it serves: which engines start when, how clients run, what is kept."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

NEEDS = ("torch", "numpy", "scipy", "matplotlib", "tqdm", "psutil")
MISSING = [name for name in NEEDS if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")

VLLM = """
import json, os, pathlib, sys, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

HERE = pathlib.Path(os.environ["FAKE_VLLM"])
strategy = os.environ.get("VLLM_GDN_PLUGIN_STRATEGY", "off")

def option(name):
    return sys.argv[sys.argv.index(name) + 1]

class Answers(BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/health" and len(list(HERE.glob("started-*"))) < int(os.environ.get("FAKE_TOGETHER", "1")):
            return self.send_error(503)
        self.say({"data": [{"id": "a model"}]})

    def do_POST(self):
        (HERE / f"asked-{strategy}").touch()
        self.say({"choices": [{"logprobs": {"tokens": ["token_id:1"], "token_logprobs": [-1.0]}}]})

    def say(self, body):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

if sys.argv[1] == "serve":
    if os.environ.get("FAKE_REFUSES") == strategy:
        while len(list(HERE.glob("started-*"))) < 2:
            time.sleep(0.01)
        raise ValueError("no room")
    server = ThreadingHTTPServer(("127.0.0.1", int(option("--port"))), Answers)
    print("" if strategy == "off" else "vllm-gdn-plugin 0: at work on 3 of 4 GDN layers", flush=True)
    asked = sorted(path.name for path in HERE.glob("asked-*"))
    HERE.joinpath(f"new-{strategy}").write_text(json.dumps([os.getpid(), *asked]))
    HERE.joinpath(f"new-{strategy}").rename(HERE / f"started-{strategy}")
    server.serve_forever()
assert sys.argv[1:3] == ["bench", "serve"]
if "--help" in sys.argv:
    sys.exit(0)
with (HERE / "clients").open("a") as file:
    print(json.dumps([os.getpid(), *sys.argv[3:]]), file=file)
if option("--max-concurrency") == os.environ.get("FAKE_FAILS"):
    raise ValueError("no such concurrency")
if option("--max-concurrency") == os.environ.get("FAKE_HANGS"):
    time.sleep(600)
print("0\\n1")  # as status of the process: what vLLM prints is not taken for it
found = dict.fromkeys(("output_throughput", "median_tpot_ms", "median_itl_ms", "median_ttft_ms"), 1.0)
found["completed"] = int(option("--num-prompts"))
pathlib.Path(option("--result-dir"), option("--result-filename")).write_text(json.dumps(found))
"""
Bench = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    """`bench(options, vllm_arguments, env)` starts `bench serve --side-by-side`, which writes below `tmp_path`."""
    package = tmp_path / "path" / "vllm" / "entrypoints" / "cli"
    package.mkdir(parents=True)
    for directory in (package, package.parent, package.parent.parent):
        (directory / "__init__.py").write_text("")
    (package / "main.py").write_text(VLLM)
    processes = []

    def start(options: list[str], arguments: list[str], **env: str) -> "subprocess.Popen[str]":
        line = [sys.executable, "-m", "vllm_gdn_plugin", "bench", "serve", "--model", "a model", "--device", "cpu"]
        line += ["--side-by-side", "--output", str(tmp_path / "out"), *options, "--", *arguments]
        path = os.pathsep.join([str(tmp_path / "path"), *filter(None, [os.environ.get("PYTHONPATH")])])
        env = {**os.environ, "PYTHONPATH": path, "TMPDIR": str(tmp_path), "FAKE_VLLM": str(tmp_path), **env}
        processes.append(subprocess.Popen(line, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        return processes[-1]

    yield start
    for process in processes:
        process.terminate()
        process.communicate()


def clients(directory: Path) -> list[list[Any]]:
    """(process, its arguments) of each `vllm bench serve`."""
    return [json.loads(line) for line in (directory / "clients").read_text().splitlines()]


def option(client: list[Any], name: str) -> str:
    return str(client[client.index(name) + 1])


def started(directory: Path) -> dict[str, list[Any]]:
    """(process, the engines that had been asked by then) of each `vllm serve`."""
    return {path.name.removeprefix("started-"): json.loads(path.read_text()) for path in directory.glob("started-*")}


def no_process_is_left(directory: Path) -> bool:
    known = [*started(directory).values(), *(clients(directory) if (directory / "clients").exists() else [])]
    for process, *_ in known:
        with suppress(ProcessLookupError):
            os.kill(process, 0)
            return False
    return True


KV_CACHE = ["--kv-cache-memory-bytes", "1000"]


def test_engines_with_a_cache_of_given_size_start_at_once(bench: Bench, tmp_path: Path) -> None:
    options = ["--strategy", "fused,dual_stream", "--rounds", "2", "--concurrency", "1,2", "--input-len", "8,64"]
    process = bench(options, KV_CACHE, FAKE_TOGETHER="3")  # none is healthy before all have started
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert started(tmp_path).keys() == {"off", "fused", "dual_stream"}
    run = json.loads((tmp_path / "out" / "serve.json").read_text())
    cases = [f"{length} in, concurrency {clients}" for length in (8, 64) for clients in (1, 2)]
    order = ["off", "fused", "dual_stream", "fused", "dual_stream", "off"]
    assert [(s["variant"], s["case"]) for s in run["samples"]] == [(name, case) for name in order for case in cases]
    ran = clients(tmp_path)
    assert len({client[0] for client in ran}) == 1  # one process, which has imported vLLM once
    assert len({option(client, "--base-url") for client in ran}) == 3
    lengths = [option(client, "--random-input-len") for client in ran[:4]]
    assert lengths == ["8", "8", "64", "64"]
    seeds = [option(client, "--seed") for client in ran]
    assert (seeds[:4], len(set(seeds))) == (seeds[4:8], 8)
    assert no_process_is_left(tmp_path)


def test_other_engines_start_one_after_the_other(bench: Bench, tmp_path: Path) -> None:
    process = bench(["--strategy", "fused,dual_stream", "--rounds", "1", "--concurrency", "1"], [])
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert started(tmp_path)["dual_stream"][1:] == ["asked-fused", "asked-off"]


def test_an_engine_that_does_not_start_stops_the_others(bench: Bench, tmp_path: Path) -> None:
    options = ["--strategy", "fused,dual_stream", "--rounds", "1", "--concurrency", "1"]
    process = bench(options, KV_CACHE, FAKE_TOGETHER="3", FAKE_REFUSES="dual_stream")  # off and fused wait for it
    _, errors = process.communicate()
    assert process.returncode == 2
    assert "dual_stream: the server stopped with 1: ValueError: no room" in errors.splitlines()[-1]
    assert set(started(tmp_path)) == {"off", "fused"}
    assert no_process_is_left(tmp_path)


def test_a_client_that_fails_gets_one_line(bench: Bench, tmp_path: Path) -> None:
    process = bench(["--rounds", "1", "--concurrency", "1,2"], KV_CACHE, FAKE_FAILS="2")
    _, errors = process.communicate()
    assert process.returncode == 2
    says = "vllm bench serve, concurrency 2: status 1: ValueError: no such concurrency; kept: 2 of 4 steps"
    assert errors.splitlines()[-1].endswith(says)
    assert no_process_is_left(tmp_path)


def test_when_it_is_interrupted_it_keeps_what_was_measured(bench: Bench, tmp_path: Path) -> None:
    process = bench(["--rounds", "1", "--concurrency", "1,2"], KV_CACHE, FAKE_HANGS="2")
    while not (tmp_path / "clients").exists() or len(clients(tmp_path)) < 2:
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130
    assert "interrupted; kept: 2 of 4 steps" in errors.splitlines()[-1]
    run = json.loads((tmp_path / "out" / "serve.json").read_text())
    assert [(s["variant"], s["case"]) for s in run["samples"]] == [("off", "concurrency 1")]
    assert no_process_is_left(tmp_path)
