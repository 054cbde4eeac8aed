"""`bench serve` and `bench compile` on real engines: what they write, and what they refuse. Never how fast."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
from serving import engine_env

ENGINE = ["--mamba-ssm-cache-dtype", "float32", "--max-model-len", "256", "--max-num-seqs", "4"]
EAGER = [*ENGINE, "--enforce-eager"]
SMALL = ["--rounds", "1", "--concurrency", "2", "--input-len", "8", "--output-len", "4", "--requests", "1"]
Bench = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def bench(models: Callable[[str], Path], scratch: Path, tmp_path: Path) -> Iterator[Bench]:
    """`bench(command, options, vllm_arguments, env)` starts `vllm-gdn-plugin bench`, which writes below `tmp_path`."""
    started = []

    def start(
        command: str, options: list[str], arguments: list[str], env: Mapping[str, str] | None = None
    ) -> "subprocess.Popen[str]":
        line = [sys.executable, "-m", "vllm_gdn_plugin", "bench", command, "--model", str(models("qwen3_5"))]
        line += ["--device", "cpu", "--output", str(tmp_path), *options, "--", *arguments]
        process = subprocess.Popen(
            line,
            cwd=tmp_path,
            env=engine_env(scratch, **(env or {})),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.terminate()
        process.wait()


def values(run: Any, case: str, variant: str) -> dict[str, float]:
    return {metric: by_round[0] for metric, by_round in run["samples"][case][variant].items()}


def test_serve_measures_both_engines_and_compares_their_answers(bench: Bench, tmp_path: Path) -> None:
    process = bench("serve", ["--strategy", "dual_stream", *SMALL], EAGER)
    out, errors = process.communicate()
    assert process.returncode == 0, errors
    run = json.loads((tmp_path / "serve.json").read_text())
    assert run["verified"] == {"dual_stream": "the same 16 tokens and log-probabilities"}
    assert run["vllm_arguments"] == EAGER
    for variant in ("off", "dual_stream"):
        assert set(values(run, "start", variant)) >= {"startup_s", "host_memory_mib", "kv_cache_blocks"}
        found = values(run, "concurrency 2", variant)
        assert set(found) == {"output_tokens_per_s", "output_tokens_per_s_per_request", "tpot_ms", "itl_ms", "ttft_ms"}
        assert min(found.values()) > 0
    assert "| concurrency 2 |" in out
    assert out.rstrip() == (tmp_path / "serve.md").read_text().rstrip()
    assert (tmp_path / "serve.png").exists()


@pytest.mark.slow
def test_serve_refuses_a_wrong_result(bench: Bench, witness: Callable[..., Any], tmp_path: Path) -> None:
    env, _ = witness("in_proj_ba")
    process = bench("serve", ["--strategy", "dual_stream", *SMALL], EAGER, env)
    _, errors = process.communicate()
    assert process.returncode == 1
    assert "dual_stream: its answer is not the stock engine's" in errors.splitlines()[-1]
    assert not (tmp_path / "serve.json").exists()


@pytest.mark.slow
def test_serve_refuses_to_measure_nothing(bench: Bench) -> None:
    process = bench("serve", SMALL, EAGER)  # auto, on a CPU
    _, errors = process.communicate()
    assert process.returncode == 2
    assert "the plugin does nothing here: vllm-gdn-plugin" in errors.splitlines()[-1]


@pytest.mark.slow
def test_a_server_that_does_not_start_gets_one_line(bench: Bench) -> None:
    process = bench("serve", SMALL, ["--no-such-option"])
    _, errors = process.communicate()
    assert process.returncode == 2
    last = errors.splitlines()[-1]
    assert "off: the server stopped with" in last
    assert Path(last.partition("(its log: ")[2].partition(")")[0]).read_text()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_leaves_no_server_and_keeps_what_was_measured(
    bench: Bench, tmp_path: Path, number: signal.Signals
) -> None:
    process = bench("compile", ["--strategy", "dual_stream", "--rounds", "2"], ENGINE)
    assert process.stderr is not None
    while "round 1, off, warm" not in os.read(process.stderr.fileno(), 4096).decode():
        assert process.poll() is None
    while not (servers := psutil.Process(process.pid).children(recursive=True)):
        time.sleep(0.1)
    process.send_signal(number)
    _, errors = process.communicate()
    assert process.returncode == 130
    assert "interrupted; kept: 1 of 8 steps" in errors.splitlines()[-1]
    _, alive = psutil.wait_procs(servers, timeout=10)
    assert [server for server in alive if server.status() != psutil.STATUS_ZOMBIE] == []
    run = json.loads((tmp_path / "compile.json").read_text())
    assert {case: list(variants) for case, variants in run["samples"].items()} == {"cold": ["off"]}


@pytest.mark.slow
def test_compile_counts_what_was_compiled(bench: Bench, tmp_path: Path) -> None:
    process = bench("compile", ["--strategy", "dual_stream", "--rounds", "1"], ENGINE)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    run = json.loads((tmp_path / "compile.json").read_text())
    for variant in ("off", "dual_stream"):
        for case in ("cold", "warm"):
            found = values(run, case, variant)
            assert found["artifacts"] >= 1
            assert found["cache_mib"] > 0
    assert (tmp_path / "compile.png").exists()


@pytest.mark.slow
@pytest.mark.parametrize("processes", [[], ["--one-process"]], ids=["processes", "one_process"])
def test_engines_in_processes_are_stepped_in_turn(scratch: Path, tmp_path: Path, processes: list[str]) -> None:
    benchmarks = Path(__file__).parents[2] / "benchmarks"
    model = tmp_path / "model"
    subprocess.run([sys.executable, benchmarks / "gpu_models.py", "tiny", model], check=True)
    settings = {"enforce_eager": True, "max_model_len": 256, "kv_cache_memory_bytes": 1 << 27}
    line = [sys.executable, str(benchmarks / "in_process.py"), str(model), str(tmp_path / "out"), "--device", "cpu"]
    line += [
        "--strategy",
        "fused,rules=VLLM_GDN_PLUGIN_STRATEGY=dual_stream VLLM_GDN_PLUGIN_TUNE=0",
        "--rounds",
        "2",
        "--concurrency",
        "1,3",
        "--input-len",
        "8,100",
    ]
    cpus = sorted(os.sched_getaffinity(0))
    line += ["--cpus", ",".join(map(str, cpus)), *processes]
    done = subprocess.run(
        [*line, "--engine", json.dumps(settings)], env=engine_env(scratch), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    run = json.loads((tmp_path / "out" / "serve.json").read_text())
    assert run["verified"].keys() == {"fused", "rules"}
    for name, strategy in (("fused", "fused"), ("rules", "dual_stream")):
        assert f"{strategy} on 3 of 3 GDN layers" in run["said"][name]
    assert run["load"].endswith(f"; each engine on CPUs {', '.join(map(str, cpus))}")
    for variant in ("off", "fused", "rules"):
        if not processes:  # in one process later engines find done what the first has had to do
            assert values(run, "start", variant)["startup_s"] > 0
        for case, metric in (("concurrency 1", "tpot_ms"), ("concurrency 3", "tpot_ms"), ("100 in", "ttft_ms")):
            assert values(run, case, variant).keys() == {metric}
    assert ("start" in run["samples"]) == (not processes)
    assert "| concurrency 3 |" in (tmp_path / "out" / "serve.md").read_text()
