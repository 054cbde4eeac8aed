"""Several processes: what each loads, imports and reads, and the same answers over HTTP and however work is shared."""

import json
import os
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from answered import TOLERANCE, assert_same_but_for_rounding, our_lines, said
from serving import MODEL_NAME, engine_env, serve
from tiny_model import make_model

from vllm_gdn_plugin.bench.engine.server import ServerFailed
from vllm_gdn_plugin.settings import Settings, describe

HERE = Path(__file__).parent
ON = {"VLLM_GDN_PLUGIN_STRATEGY": "dual_stream"}
SEPARATE = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
ENGINE_ARGS = ["--mamba-ssm-cache-dtype", "float32", "--max-model-len", "256", "--max-num-seqs", "4", "--enforce-eager"]


def processes(events: list[dict[str, Any]], event: str) -> set[str]:
    return {e["process"] for e in events if e["event"] == event}


def workers(events: list[dict[str, Any]], strategy: str) -> int:
    """How many processes ran layers with `strategy`, after a look at the settings: every process has read the same."""
    read = {e["pid"]: e["settings"] for e in events if e["event"] == "settings read"}
    ran = {e["pid"] for e in events if e["event"].endswith(" ran")}
    assert ran == {e["pid"] for e in events if e["event"] == f"{strategy} ran"}
    assert ran <= read.keys()
    assert all(settings == asdict(Settings(strategy=strategy)) for settings in read.values())
    return len(ran)


def reports(log: str) -> list[str]:
    """What was reported, in the order of the alphabet: processes come in any order."""
    return sorted(re.findall(r"vllm-gdn-plugin [0-9.]+: (.*) \(platform cpu, vLLM ", log))


def test_tensor_parallel_size_2(run_generate: Callable[..., Any], witness: Callable[..., Any], tmp_path: Path) -> None:
    """Same tokens; every process loads plugins, and none imports the GDN module that would not without us."""
    # An empty cache, so that stock vLLM also starts the process that inspects the model's class.
    stock_env, stock_events = witness()
    stock_env["VLLM_CACHE_ROOT"] = str(tmp_path)
    stock = run_generate("qwen3_5", env=stock_env | SEPARATE | {"VLLM_PLUGINS": "witness"}, tp=2)
    env, events = witness()
    env["VLLM_CACHE_ROOT"] = str(tmp_path)
    got = run_generate("qwen3_5", env=env | SEPARATE | ON, tp=2)
    assert said(got) == said(stock)

    assert processes(events(), "plugins loaded") >= {"main", "EngineCore", "VllmWorker"}
    assert processes(stock_events(), "GDN module imported") == {"VllmWorker", "inspection"}
    assert processes(events(), "GDN module imported") == {"VllmWorker"}
    assert processes(events(), "dual_stream ran") == {"VllmWorker"}
    assert workers(events(), "dual_stream") == 2
    assert reports(got["log"]) == ["dual_stream on 3 of 3 GDN layers"], "one line for an engine, not one for each rank"


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
    assert workers(events(), "fused") == 2
    assert reports(got["log"]) == ["fused on 3 of 3 GDN layers"]


@pytest.fixture(scope="module")
def two_stages(run_generate: Callable[..., Any], witness: Callable[..., Any], scratch: Path) -> Callable[..., Any]:
    """`two_stages(env)` generates with pipeline parallel size 2, three GDN layers and one of attention in each stage.

    Compiled: in eager mode vLLM 0.32's CPU worker fails by itself, an assertion on `self.intermediate_tensors`. So it
    does where a stage has no attention layer ("Workers disagree on supported KV cache layouts").
    """
    make_model("qwen3_5", scratch / "models" / "qwen3_5_two_blocks", blocks=2)

    def generate(env: dict[str, str]) -> tuple[Any, list[dict[str, Any]]]:
        extra, events = witness()
        got = run_generate("qwen3_5_two_blocks", env=extra | SEPARATE | env, pp=2, eager=False)
        return got, events()

    return generate


@pytest.fixture(scope="module")
def stock_of_two_stages(two_stages: Callable[..., Any]) -> Any:
    got, events = two_stages({"VLLM_PLUGINS": "witness"})
    assert not processes(events, "settings read")
    return got


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["dual_stream", "fused"])
def test_pipeline_parallel_size_2(two_stages: Callable[..., Any], stock_of_two_stages: Any, strategy: str) -> None:
    got, events = two_stages({"VLLM_GDN_PLUGIN_STRATEGY": strategy})
    assert_same_but_for_rounding(got, stock_of_two_stages, TOLERANCE if strategy == "fused" else 0)
    assert workers(events, strategy) == 2
    assert reports(got["log"]) == [f"{strategy} on 3 of 3 GDN layers of pipeline stage {stage}" for stage in (0, 1)]


@pytest.fixture(scope="module")
def with_ray(run_generate: Callable[..., Any], witness: Callable[..., Any], scratch: Path) -> Callable[..., Any]:
    """`with_ray(env)` generates with the Ray executor and tensor parallel size 2, on the platform of ray_cpu.py."""
    pytest.importorskip("ray", reason="ray isn't installed: `.venv/bin/pip install ray`")
    information = scratch / "ray_cpu" / "ray_cpu-0.dist-info"
    information.mkdir(parents=True)
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: ray-cpu\nVersion: 0\n")
    (information / "entry_points.txt").write_text("[vllm.platform_plugins]\nray_cpu = ray_cpu:platform\n")

    def generate(env: dict[str, str]) -> tuple[Any, list[dict[str, Any]]]:
        extra, events = witness()
        path = os.pathsep.join([extra["PYTHONPATH"], str(information.parent), str(HERE)])
        extra |= {"PYTHONPATH": path, "RAY_AUTH_MODE": "disabled"}
        extra["ENGINE_ARGUMENTS"] = json.dumps({"distributed_executor_backend": "ray"})
        got = run_generate("qwen3_5", env=extra | env, tp=2, script=HERE / "ray_cpu.py")
        return got, events()

    return generate


@pytest.fixture(scope="module")
def stock_with_ray(with_ray: Callable[..., Any]) -> Any:
    got, events = with_ray({"VLLM_PLUGINS": "witness,ray_cpu"})
    assert not processes(events, "settings read")
    return got


@pytest.mark.slow
@pytest.mark.parametrize("executor", ["RayExecutorV2", "RayDistributedExecutor"])
def test_ray(with_ray: Callable[..., Any], stock_with_ray: Any, executor: str) -> None:
    """vLLM takes the settings to both of Ray's workers."""
    got, events = with_ray(ON | {"VLLM_USE_RAY_V2_EXECUTOR_BACKEND": str(int(executor == "RayExecutorV2"))})
    assert said(got) == said(stock_with_ray)
    assert processes(events, "dual_stream ran") == {"ray"}
    assert workers(events, "dual_stream") == 2
    # The workers of the older executor log no vLLM line below a warning, with or without the plugin.
    assert reports(got["log"]) == ["dual_stream on 3 of 3 GDN layers"] * (executor == "RayExecutorV2")


def test_vllm_copies_every_setting_to_rays_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """By its own rules, which test_ray sees at work."""
    from vllm.ray.ray_env import get_env_vars_to_copy

    names = {name for name, _, _ in describe()}
    for name in names:
        monkeypatch.setenv(name, "1")
    assert names <= get_env_vars_to_copy()


@pytest.fixture(scope="module")
def answer(models: Callable[[str], Path], scratch: Path, witness: Callable[..., Any]) -> Callable[..., Any]:
    """`answer(breaks, replicas=N, SETTING=...)` asks each data-parallel replica of a server the same."""

    def ask(breaks: str | None = None, replicas: int = 1, **settings: str) -> tuple[Any, str, list[dict[str, Any]]]:
        env, events = witness(breaks)
        env = engine_env(scratch, **env, **settings)
        with serve(models("qwen3_5"), env=env, args=[*ENGINE_ARGS, "--data-parallel-size", str(replicas)]) as server:
            body = {"model": MODEL_NAME, "prompt": "Gated delta", "max_tokens": 16, "temperature": 0, "logprobs": 1}
            answers = [
                server.post("/v1/completions", body, **{"X-data-parallel-rank": str(replica)})["choices"][0]
                for replica in range(replicas)
            ]
            return answers, server.log_text(), events()

    return ask


@pytest.mark.slow
def test_data_parallel_size_2(answer: Callable[..., Any]) -> None:
    stock, stock_log, _ = answer(replicas=2, VLLM_PLUGINS="witness")
    got, log, events = answer(replicas=2, **ON)
    assert got == stock
    assert reports(stock_log) == []
    assert workers(events, "dual_stream") == 2
    assert reports(log) == ["dual_stream on 3 of 3 GDN layers"] * 2, "one line for each replica"


@pytest.mark.slow
def test_data_parallel_size_2_of_a_mixture_of_experts(models: Callable[[str], Path], scratch: Path) -> None:
    """These replicas share one world of ranks, and still each has its line.

    Nothing is asked: vLLM 0.32's CPU communicator has no `all_gatherv`, so the first request ends the server.
    """
    args = [*ENGINE_ARGS, "--data-parallel-size", "2"]
    with serve(models("qwen3_5_moe"), env=engine_env(scratch, **ON), args=args) as server:
        assert reports(server.log_text()) == ["dual_stream on 3 of 3 GDN layers"] * 2


@pytest.fixture(scope="module")
def stock_answer(answer: Callable[..., Any]) -> Any:
    stock, log, _ = answer(VLLM_PLUGINS="", **ON)
    assert "vllm-gdn-plugin" not in log
    return stock


@pytest.mark.slow
def test_serving_over_http(answer: Callable[..., Any], stock_answer: Any) -> None:
    """Where VLLM_PLUGINS names the plugin (`witness` is the tests' own observer), whatever else it names."""
    got, log, events = answer(VLLM_PLUGINS="witness,no_such_plugin,vllm_gdn_plugin", **ON)
    assert got == stock_answer
    assert processes(events, "plugins loaded") >= {"main", "EngineCore", "VllmWorker"}
    assert processes(events, "dual_stream ran") == {"VllmWorker"}
    lines = our_lines(log)
    assert len(lines) == 1
    assert "dual_stream on 3 of 3 GDN layers (platform cpu, vLLM " in lines[0]


@pytest.mark.slow
def test_a_server_where_vllm_plugins_names_others(answer: Callable[..., Any], stock_answer: Any) -> None:
    got, log, events = answer(VLLM_PLUGINS="witness,no_such_plugin", **ON)
    assert got == stock_answer
    assert "vllm-gdn-plugin" not in log
    assert not processes(events, "dual_stream ran")


@pytest.mark.slow
@pytest.mark.parametrize("step", ["contract", "layer_facts"])
def test_a_server_works_where_the_plugin_refuses_or_fails(
    answer: Callable[..., Any], stock_answer: Any, step: str
) -> None:
    got, log, _ = answer(step, **ON)
    assert got == stock_answer
    lines = our_lines(log)
    assert len(lines) == 1
    assert "steps aside, vLLM runs as it is" in lines[0]


@pytest.mark.slow
def test_strict_stops_the_server_with_one_clear_message(answer: Callable[..., Any], scratch: Path) -> None:
    with pytest.raises(ServerFailed, match="the server stopped"):
        answer("contract", **ON, VLLM_GDN_PLUGIN_STRICT="1")
    log = max((scratch / "tmp").glob("server-*.log"), key=lambda path: path.stat().st_mtime).read_text()
    message = "the engine stops, as VLLM_GDN_PLUGIN_STRICT=1 asks: this vLLM is not as the plugin expects it: planted"
    assert log.count(message) == 1
