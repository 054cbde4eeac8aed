"""Whatever goes wrong in the plugin, the engine answers as stock vLLM does, and one line says why."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from answered import TOLERANCE, assert_same_but_for_rounding, our_lines, said
from safetensors.torch import load_file, save_file
from witness import BREAKS

HERE = Path(__file__).parent
ON = {"VLLM_GDN_PLUGIN_STRATEGY": "dual_stream"}


QUICK = ("layer_facts",)
STEPS = [step for step in BREAKS if step != "projection"]
SAID = {
    "contract": "planted breach",
    "version guard": "vLLM 0.99.0 is newer than the supported range",
    "layer module": "unexpected ModuleNotFoundError: import of vllm_gdn_plugin.run.layer halted",
}


@pytest.mark.parametrize("step", [pytest.param(s, marks=() if s in QUICK else pytest.mark.slow) for s in STEPS])
def test_the_engine_answers_and_one_line_says_why(
    run_generate: Callable[..., Any], witness: Callable[..., Any], stock: Any, step: str
) -> None:
    env, _ = witness(step)
    strategy = "fused" if step.startswith("fused") else "dual_stream"
    got = run_generate("qwen3_5", env=env | {"VLLM_GDN_PLUGIN_STRATEGY": strategy})
    # By "fused take_back" it has been arranged that the CPU does not pack the weights, and it rounds differently.
    assert_same_but_for_rounding(got, stock, TOLERANCE if step == "fused take_back" else 0)
    if step == "layer_facts":
        assert got["classes"] == stock["classes"], "where nothing of ours runs, the layers are of stock's class"
    # Where only the report fails, the layers have been set up.
    assert set(got["ran"]) == ({"dual_stream"} if step == "report" else set())
    lines = our_lines(got["log"])
    assert len(lines) == 1, lines
    assert "steps aside, vLLM runs as it is" in lines[0]
    assert SAID.get(step, "unexpected ZeroDivisionError: planted by the test") in lines[0]


@pytest.mark.parametrize("step", ["version guard", pytest.param("contract", marks=pytest.mark.slow)])
def test_vllm_knows_the_settings_also_where_the_plugin_steps_aside(
    run_generate: Callable[..., Any], witness: Callable[..., Any], stock: Any, step: str
) -> None:
    """It may be told not to start for unknown variables: `--fail-on-environ-validation`."""
    env, _ = witness(step)
    strict = {"ENGINE_ARGUMENTS": json.dumps({"fail_on_environ_validation": True})}
    got = run_generate("qwen3_5", env=env | ON | strict)
    assert said(got) == said(stock)
    (line,) = our_lines(got["log"])
    assert SAID[step] in line


@pytest.mark.slow
def test_what_a_projection_raises_is_the_engine_s(
    run_generate: Callable[..., Any], witness: Callable[..., Any]
) -> None:
    settings, _ = witness("projection")
    got = run_generate("qwen3_5", env=settings | ON, fails=True)
    assert "torch.OutOfMemoryError: planted by the test" in got["log"]
    assert not any("unexpected" in line for line in our_lines(got["log"]))


@pytest.mark.parametrize(
    "step", ["contract", *(pytest.param(s, marks=pytest.mark.slow) for s in ("declare_variables", "layer_facts"))]
)
def test_strict_stops_the_engine(run_generate: Callable[..., Any], witness: Callable[..., Any], step: str) -> None:
    env, _ = witness(step)
    got = run_generate("qwen3_5", env=env | ON | {"VLLM_GDN_PLUGIN_STRICT": "1"}, fails=True)
    lines = [line for line in got["log"].splitlines() if "the engine stops, as VLLM_GDN_PLUGIN_STRICT=1 asks" in line]
    assert len(lines) == 1, got["log"][-2000:]


@pytest.mark.slow
def test_a_wrong_setting_is_named_once(run_generate: Callable[..., Any], stock: Any) -> None:
    got = run_generate("qwen3_5", env={"VLLM_GDN_PLUGIN_STRATEGY": "fastest", "VLLM_GDN_PLUGIN_TUNE": "often"})
    assert got["token_ids"] == stock["token_ids"]
    for name in ("STRATEGY", "TUNE"):
        assert got["log"].count(f"VLLM_GDN_PLUGIN_{name}=") == 1
    assert "Unknown vLLM environment variable" not in got["log"]


UNWRITABLE = {"read-only": ("ro", "Read-only file system"), "full": ("size=4k", "No space left on device")}
MOUNT = 'mount -t tmpfs -o "$1" none "$0" && { head -c 4096 /dev/zero >"$0/fill" || true; } && shift && exec "$@"'


@pytest.mark.slow
@pytest.mark.parametrize("why", UNWRITABLE)
def test_a_cache_directory_that_cannot_be_written(run_generate: Callable[..., Any], scratch: Path, why: str) -> None:
    """The plugin writes no file. Eager, because stock vLLM does not compile without a cache."""
    directory = scratch / why
    directory.mkdir(exist_ok=True)
    options, error = UNWRITABLE[why]
    launcher = ["unshare", "--map-root-user", "--mount", "sh", "-c", MOUNT, str(directory), options]
    if shutil.which("unshare") is None or subprocess.run([*launcher, "true"], capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system in a namespace of its own")
    probe = subprocess.run(
        [*launcher, "sh", "-c", f"cat /proc/version >{directory}/file"], capture_output=True, text=True
    )
    assert error in probe.stderr

    env = {name: str(directory) for name in ("VLLM_CACHE_ROOT", "XDG_CACHE_HOME", "TORCHINDUCTOR_CACHE_DIR")}
    stock, got = (
        run_generate("qwen3_5", env=env | plugin, launcher=[*launcher, sys.executable])
        for plugin in ({"VLLM_PLUGINS": ""}, ON)
    )
    assert said(got) == said(stock)
    (line,) = our_lines(got["log"])
    assert "dual_stream on 3 of 3 GDN layers" in line


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["dual_stream", "fused"])
def test_handles_and_memory_do_not_grow_with_requests(
    run_generate: Callable[..., Any], witness: Callable[..., Any], strategy: str
) -> None:
    """Beyond what stock vLLM leaves behind."""
    stock, got = (
        run_generate("qwen3_5", env=witness()[0] | settings, script=HERE / "repeat.py")
        for settings in ({"VLLM_PLUGINS": "witness"}, {"VLLM_GDN_PLUGIN_STRATEGY": strategy})
    )
    assert got["ran"][strategy] > 100
    assert got["files"] <= stock["files"]
    assert got["objects"] - stock["objects"] < got["requests"], "less than one a request"


@pytest.mark.slow
def test_a_checkpoint_that_lacks_a_weight_is_refused_as_by_stock(
    run_generate: Callable[..., dict[str, Any]], models: Callable[[str], Path], scratch: Path
) -> None:
    """vLLM excuses missing parameters below a module that has a method for after loading."""
    damaged = scratch / "models" / "qwen3_5_without_a_log"
    shutil.copytree(models("qwen3_5"), damaged)
    (file,) = damaged.glob("*.safetensors")
    weights = load_file(file)
    (name,) = [name for name in weights if name.endswith("layers.0.linear_attn.A_log")]
    del weights[name]
    save_file(weights, file, {"format": "pt"})
    log = run_generate(damaged.name, env=ON, fails=True)["log"]
    assert "Following weights were not initialized from checkpoint" in log
    assert "layers.0.linear_attn.A_log" in log
