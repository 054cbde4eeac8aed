"""What is read from the host's objects: each row changes one thing, and says what the plan then sees; and streams."""

from __future__ import annotations

import importlib
import sys
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_gdn_plugin.decide.checkpoint import digest


def own_gemm() -> None:
    pass


def default_unquantized_gemm() -> None:
    pass


class Fp8LinearMethod:
    pass


CHECKPOINT = SimpleNamespace(quantization_config={"bits": 4})
FOUR_BITS = digest({"bits": 4})


@pytest.fixture
def facts(plugin: Any) -> Any:
    """``host.facts``, beside the stand-in."""
    return importlib.import_module("vllm_gdn_plugin.host.facts")


@pytest.fixture
def streams(plugin: Any) -> Any:
    return importlib.import_module("vllm_gdn_plugin.host.streams")


def seen(facts: Any, plugin: Any, **changes: Any) -> dict[str, Any]:
    """The facts about a layer; a change names an attribute of the layer or of vLLM's config by its path."""
    layer = plugin.import_gdn()("layers.0")
    roots = {"layer": layer, "config": plugin.vllm("config.vllm").config, "envs": plugin.vllm("envs")}
    for linear in (layer.in_proj_qkvz, layer.in_proj_ba):
        linear.weight = SimpleNamespace(device="cuda:0")
    for path, value in changes.items():
        *way, last = path.split(".")
        target: Any = SimpleNamespace(**roots)
        for name in way:
            target = getattr(target, name)
        setattr(target, last, value)
    return asdict(facts.layer_facts(layer, "cuda"))


def test_a_plain_layer(facts: Any, plugin: Any) -> None:
    projection = {"linear_method": "UnquantizedLinearMethod", "dtype": "bfloat16", "plain": True}
    assert seen(facts, plugin) == {
        "platform": "cuda",
        "qkvz": projection | {"output_size": 6},
        "ba": projection | {"output_size": 2},
        "activation_dtype": "bfloat16",
        "lora": False,
        "cuda_graphs": True,
        "batch_invariant": False,
        "offload": False,
        "weights_in_place": True,
        "ubatching": False,
        "quantization": "",
    }


@pytest.mark.parametrize(
    ("path", "value", "found"),
    [
        ("layer.in_proj_qkvz.bias", object(), {"qkvz.plain": False}),
        ("layer.in_proj_ba.gather_output", True, {"ba.plain": False}),
        ("layer.in_proj_ba.return_bias", False, {"ba.plain": False}),
        ("layer.in_proj_ba.params_dtype", "torch.float32", {"ba.dtype": "float32"}),
        ("layer.in_proj_qkvz.quant_method", Fp8LinearMethod(), {"qkvz.linear_method": "Fp8LinearMethod"}),
        (
            "layer.in_proj_ba.quant_method._gemm_impl",
            own_gemm,
            {"ba.linear_method": "UnquantizedLinearMethod with own_gemm"},
        ),
        (
            "layer.in_proj_ba.quant_method._gemm_impl",
            partial(own_gemm),
            {"ba.linear_method": "UnquantizedLinearMethod with own_gemm"},
        ),
        ("layer.in_proj_ba.quant_method._gemm_impl", default_unquantized_gemm, {}),
        ("layer.in_proj_ba.weight.device", "cpu", {"weights_in_place": False}),
        ("layer.in_proj_ba.weight", None, {"weights_in_place": False}),
        ("layer.in_proj_qkvz", SimpleNamespace(weight=SimpleNamespace(device="cuda:0")), {"qkvz.plain": False}),
        ("layer.in_proj_qkvz", None, {"qkvz.plain": False, "weights_in_place": False}),
        ("config.lora_config", object(), {"lora": True}),
        ("config.model_config.dtype", "torch.float16", {"activation_dtype": "float16"}),
        ("config.model_config.enforce_eager", True, {"cuda_graphs": False}),
        ("config.compilation_config.cudagraph_mode.name", "NONE", {"cuda_graphs": False}),
        ("config.compilation_config.cudagraph_mode", None, {"cuda_graphs": False}),
        ("config.offload_config.uva.cpu_offload_gb", 0.5, {"offload": True}),
        ("config.offload_config.prefetch.offload_group_size", 8, {"offload": True}),
        ("envs.VLLM_BATCH_INVARIANT", True, {"batch_invariant": True}),
        ("config.parallel_config.use_ubatching", True, {"ubatching": True}),
        ("config.model_config.hf_config", CHECKPOINT, {"quantization": FOUR_BITS}),
        (
            "config.model_config.hf_config",
            SimpleNamespace(text_config=CHECKPOINT),
            {"quantization": FOUR_BITS},
        ),
        ("config.model_config.hf_config", SimpleNamespace(text_config=None), {}),
    ],
)
def test_what_differs_is_seen(facts: Any, plugin: Any, path: str, value: Any, found: dict[str, Any]) -> None:
    usual, now = seen(facts, plugin), seen(facts, plugin, **{path: value})
    flat = now | {f"{p}.{name}": v for p in ("qkvz", "ba") for name, v in now[p].items()}
    assert {name: flat[name] for name in found} == found
    assert {name for name in now if now[name] != usual[name]} == {name.partition(".")[0] for name in found}


def test_weights_on_the_meta_device_are_not_in_place(facts: Any, plugin: Any) -> None:
    meta = {f"layer.{name}.weight.device": "meta" for name in ("in_proj_qkvz", "in_proj_ba")}
    assert seen(facts, plugin, **meta)["weights_in_place"] is False


@pytest.mark.parametrize(
    ("says", "device_name", "device_type", "name"),
    [
        ("is_cuda", "NVIDIA", "cuda", "cuda"),
        ("is_rocm", "AMD", "cuda", "rocm"),
        ("is_xpu", "Intel", "gpu", "xpu"),
        ("is_cpu", "x86", "host", "cpu"),
        ("is_npu", "npu", "other", "npu"),
        ("is_npu", "", "npu", "npu"),
        ("is_npu", None, None, "unspecified"),
    ],
)
def test_the_name_of_the_platform(
    facts: Any, plugin: Any, says: str, device_name: Any, device_type: Any, name: str
) -> None:
    answers = {f"is_{p}": (lambda p=p: says == f"is_{p}") for p in ("cuda", "rocm", "xpu", "cpu")}
    platform = SimpleNamespace(**answers, device_name=device_name, device_type=device_type)
    plugin.vllm("platforms").current_platform = platform
    assert facts.platform() == name


@pytest.mark.parametrize("active", [None, False, True])
def test_a_breakable_capture_is_only_asked_about_where_it_exists(streams: Any, active: bool | None) -> None:
    if active is not None:
        capture = SimpleNamespace(is_active=lambda: active)
        sys.modules["vllm.compilation.breakable_cudagraph"] = SimpleNamespace(BreakableCUDAGraphCapture=capture)  # type: ignore[assignment]
    assert streams.breakable_capture() is bool(active)


def test_a_package_without_a_directory_is_no_vllm(plugin: Any) -> None:
    imports = importlib.import_module("vllm_gdn_plugin.host.imports")
    assert imports.package_directory() == plugin.tree.package
    plugin.tree.root.joinpath("vllm").rename(plugin.tree.root / "other")
    (plugin.tree.root / "vllm.py").touch()
    importlib.invalidate_caches()
    with pytest.raises(ModuleNotFoundError, match="vllm"):
        imports.package_directory()


@pytest.mark.parametrize(
    ("changes", "sizes"),
    [
        ({}, (1, 2, 4, 8)),
        ({"compilation_config.cudagraph_capture_sizes": None}, ()),
        ({"compilation_config.cudagraph_capture_sizes": []}, ()),
        ({"model_config.enable_sleep_mode": True}, ()),
        ({"model_config.enable_cumem_allocator": True}, ()),
        ({"speculative_config": SimpleNamespace(target_model_config=SimpleNamespace())}, (1, 2, 4, 8)),
        ({"speculative_config": SimpleNamespace(target_model_config=SimpleNamespace(enable_sleep_mode=True))}, ()),
    ],
    ids=str,
)
def test_the_captured_sizes(facts: Any, plugin: Any, changes: dict[str, Any], sizes: tuple[int, ...]) -> None:
    seen(facts, plugin, **{"config.compilation_config.cudagraph_capture_sizes": [4, 1, 2, 8, 8]})
    seen(facts, plugin, **{f"config.{path}": value for path, value in changes.items()})
    assert facts.captured_sizes() == sizes


@pytest.mark.parametrize("known", [SimpleNamespace(), SimpleNamespace(value=None), SimpleNamespace(value="dedicated")])
def test_the_stream_is_left_as_vllm_knows_it(
    streams: Any, plugin: Any, known: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM gives a process a stream of its own only where it knows of none that was set."""
    before, current = getattr(known, "value", None), ["dedicated" if hasattr(known, "value") else "default"]

    def set_stream(stream: str) -> None:  # as vLLM patches it
        known.value = stream
        current.append(stream)

    cuda = importlib.import_module("torch.cuda")
    monkeypatch.setattr(cuda, "current_stream", lambda: current[-1], raising=False)
    monkeypatch.setattr(cuda, "set_stream", set_stream, raising=False)
    plugin.vllm("utils.torch_utils")._current_stream_tls = known
    with suppress(ZeroDivisionError), streams.unchanged_stream():
        cuda.set_stream("capture")
        raise ZeroDivisionError
    assert current == [current[0], "capture", current[0]]
    assert known.value == before


def fail(*args: Any) -> Any:
    raise ZeroDivisionError("planted")


@pytest.mark.parametrize(
    ("snapshot", "exist"),
    [
        (lambda: [{"segment_pool_id": (0, 0)}], False),
        (list, False),
        (lambda: [{"segment_pool_id": (0, 0)}, {"segment_pool_id": (0, 1)}], True),
        (lambda: [{"segment_pool_id": (2, 0)}], True),
        (fail, True),
    ],
    ids=["the one of all", "none", "one of a graph", "only one of a graph", "an allocator that cannot tell"],
)
def test_graphs_are_seen_by_their_memory(
    streams: Any, snapshot: Any, exist: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.import_module("torch.cuda"), "memory_snapshot", snapshot, raising=False)
    assert streams.cuda_graphs_exist() is exist


@pytest.mark.parametrize("graphs", [True, False])
def test_workspaces_are_given_back_once_the_gpu_is_done_with_them(
    streams: Any, graphs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Graphs that are gone have left the pools before it is asked whether there are some."""
    done: list[str] = []
    torch = importlib.import_module("torch")
    for name in ("synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, partial(done.append, name), raising=False)
    clear = SimpleNamespace(_cuda_clearCublasWorkspaces=partial(done.append, "clear"))
    monkeypatch.setattr(torch, "_C", clear, raising=False)
    monkeypatch.setattr(streams, "cuda_graphs_exist", lambda: bool(done.append("asked")) or graphs)
    streams.release_workspaces()
    assert done == ["synchronize", "empty_cache", "asked", *([] if graphs else ["clear", "empty_cache"])]


@pytest.mark.parametrize(("initialized", "name"), [(True, "the second GPU"), (False, "Stub Device")])
def test_the_gpu_is_the_one_of_this_process(
    facts: Any, plugin: Any, initialized: bool, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a second data-parallel replica vLLM knows one device, the first, where torch's index is 1."""
    cuda = importlib.import_module("torch.cuda")
    monkeypatch.setattr(cuda, "is_initialized", lambda: initialized, raising=False)
    monkeypatch.setattr(cuda, "current_device", lambda: 1, raising=False)
    monkeypatch.setattr(cuda, "get_device_name", lambda: "the second GPU", raising=False)
    assert facts.gpu() == name


@pytest.mark.parametrize(
    ("text", "nvml", "version"),
    [
        (
            "NVRM version: NVIDIA UNIX Open Kernel Module  580.159.04  Release\nGCC version: 13.3.0\n",
            "1.0",
            "580.159.04",
        ),
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  470.82  Wed", "1.0", "470.82"),
        ("", "576.02", "576.02"),
        (None, "576.02", "576.02"),
        (None, None, ""),
    ],
)
def test_the_driver_is_told_by_proc_or_as_in_wsl_by_nvml(
    facts: Any, tmp_path: Any, text: str | None, nvml: str | None, version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "version"
    if text is not None:
        file.write_text(text)
    monkeypatch.setattr(facts, "NVIDIA_DRIVER", file)
    initialised: list[bool] = []
    known = SimpleNamespace(
        nvmlInit=lambda: initialised.append(True) if nvml else fail(),
        nvmlSystemGetDriverVersion=lambda: nvml if initialised else fail(),
    )
    sys.modules["vllm.utils.import_utils"] = SimpleNamespace(import_pynvml=lambda: known)  # type: ignore[assignment]
    assert facts.driver() == version
