"""Several processes: what each loads and imports, the same answers over HTTP and with tensor parallel size 2."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from serving import MODEL_NAME, engine_env, serve

from vllm_gdn_plugin.bench.engine.server import ServerFailed

ON = {"VLLM_GDN_PLUGIN_STRATEGY": "dual_stream"}
SEPARATE = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
ENGINE_ARGS = ["--mamba-ssm-cache-dtype", "float32", "--max-model-len", "256", "--max-num-seqs", "4", "--enforce-eager"]


def processes(events: list[dict[str, Any]], event: str) -> set[str]:
    return {e["process"] for e in events if e["event"] == event}


def test_tensor_parallel_size_2(run_generate: Callable[..., Any], witness: Callable[..., Any], tmp_path: Path) -> None:
    """Same tokens; every process loads plugins, and none imports the GDN module that would not without us."""
    # An empty cache, so that stock vLLM also starts the process that inspects the model's class.
    stock_env, stock_events = witness()
    stock_env["VLLM_CACHE_ROOT"] = str(tmp_path)
    stock = run_generate("qwen3_5", env=stock_env | SEPARATE | {"VLLM_PLUGINS": "witness"}, tp=2)
    env, events = witness()
    env["VLLM_CACHE_ROOT"] = str(tmp_path)
    got = run_generate("qwen3_5", env=env | SEPARATE | ON, tp=2)
    assert (got["token_ids"], got["logprobs"]) == (stock["token_ids"], stock["logprobs"])

    assert processes(events(), "plugins loaded") >= {"main", "EngineCore", "VllmWorker"}
    assert processes(stock_events(), "GDN module imported") == {"VllmWorker", "inspection"}
    assert processes(events(), "GDN module imported") == {"VllmWorker"}
    assert processes(events(), "dual_stream op called") == {"VllmWorker"}
    assert len({e["pid"] for e in events() if e["event"] == "dual_stream op called"}) == 2
    reports = re.findall(r"dual_stream on 3 of 3 GDN layers", got["log"])
    assert len(reports) == 1, "one line for an engine, not one for each rank"


@pytest.mark.slow
@pytest.mark.parametrize("eager", [True, False], ids=["eager", "compiled"])
def test_fused_with_tensor_parallel_size_2(
    run_generate: Callable[..., Any], witness: Callable[..., Any], eager: bool
) -> None:
    stock_env, _ = witness()
    stock = run_generate("qwen3_5", env=stock_env | SEPARATE | {"VLLM_PLUGINS": "witness"}, tp=2, eager=eager)
    env, events = witness()
    got = run_generate("qwen3_5", env=env | SEPARATE | {"VLLM_GDN_PLUGIN_STRATEGY": "fused"}, tp=2, eager=eager)
    assert got["token_ids"] == stock["token_ids"]
    assert len({e["pid"] for e in events() if e["event"] == "fused op called"}) == 2
    assert got["log"].count("fused on 3 of 3 GDN layers") == 1


@pytest.fixture(scope="module")
def answer(models: Callable[[str], Path], scratch: Path, witness: Callable[..., Any]) -> Callable[..., Any]:
    def ask(breaks: str | None = None, **settings: str) -> tuple[Any, str, list[dict[str, Any]]]:
        env, events = witness(breaks)
        env = engine_env(scratch, **env, **settings)
        with serve(models("qwen3_5"), env=env, args=ENGINE_ARGS) as server:
            body = {"model": MODEL_NAME, "prompt": "Gated delta", "max_tokens": 16, "temperature": 0, "logprobs": 1}
            choice = server.post("/v1/completions", body)["choices"][0]
            return choice, server.log_text(), events()

    return ask


@pytest.fixture(scope="module")
def stock_answer(answer: Callable[..., Any]) -> Any:
    stock, log, _ = answer(VLLM_PLUGINS="", **ON)
    assert "vllm-gdn-plugin" not in log
    return stock


def test_serving_over_http_switched_by_vllm_plugins(answer: Callable[..., Any], stock_answer: Any) -> None:
    """VLLM_PLUGINS with another name, and with ours (`witness` is the tests' own observer)."""
    other, other_log, events = answer(VLLM_PLUGINS="witness,no_such_plugin", **ON)
    ours, log, our_events = answer(VLLM_PLUGINS="witness,vllm_gdn_plugin", **ON)
    assert stock_answer == other == ours
    assert "vllm-gdn-plugin" not in other_log
    assert not processes(events, "dual_stream op called")
    assert processes(our_events, "plugins loaded") >= {"main", "EngineCore", "VllmWorker"}
    assert processes(our_events, "dual_stream op called") == {"VllmWorker"}
    lines = [line for line in log.splitlines() if "vllm-gdn-plugin" in line]
    assert len(lines) == 1
    assert "dual_stream on 3 of 3 GDN layers (platform cpu, vLLM " in lines[0]


@pytest.mark.parametrize("step", ["contract", pytest.param("layer_facts", marks=pytest.mark.slow)])
def test_a_server_works_where_the_plugin_refuses_or_fails(
    answer: Callable[..., Any], stock_answer: Any, step: str
) -> None:
    got, log, _ = answer(step, **ON)
    assert got == stock_answer
    lines = [line for line in log.splitlines() if "vllm-gdn-plugin" in line]
    assert len(lines) == 1
    assert "steps aside, vLLM runs as it is" in lines[0]


def test_strict_stops_the_server_with_one_clear_message(answer: Callable[..., Any], scratch: Path) -> None:
    with pytest.raises(ServerFailed, match="the server stopped"):
        answer("contract", **ON, VLLM_GDN_PLUGIN_STRICT="1")
    log = max((scratch / "tmp").glob("server-*.log"), key=lambda path: path.stat().st_mtime).read_text()
    message = "the engine stops, as VLLM_GDN_PLUGIN_STRICT=1 asks: this vLLM is not as the plugin expects it: planted"
    assert log.count(message) == 1
