"""What a checkpoint's config.json tells of its GDN layers, in the forms found in the wild."""

import json
from pathlib import Path
from typing import Any

import pytest

from vllm_gdn_plugin import host
from vllm_gdn_plugin.cli.check import Report, check_elsewhere, with_model
from vllm_gdn_plugin.decide.checkpoint import Unreadable, digest, read_groups
from vllm_gdn_plugin.decide.plan import PADDED_TO
from vllm_gdn_plugin.tune.times import case_of, keep, without_narrow_kernel

TEXT = {
    "model_type": "qwen3_5_text",
    "hidden_size": 4096,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "num_hidden_layers": 8,
    "full_attention_interval": 4,
    "dtype": "bfloat16",
}
GDN_LAYERS = (0, 1, 2, 4, 5, 6)


@pytest.fixture
def model(tmp_path: Path) -> Any:
    def write(quantization: dict[str, Any] | None = None) -> str:
        config = {"model_type": "qwen3_5", "text_config": TEXT, "quantization_config": quantization or {}}
        (tmp_path / "config.json").write_text(json.dumps(config))
        return str(tmp_path)

    return write


def left_out(prefix: str) -> list[str]:
    return [f"{prefix}.layers.{i}.linear_attn.{name}" for i in GDN_LAYERS for name in ("in_proj_b", "in_proj_a")]


@pytest.mark.parametrize(
    ("quantization", "strategy", "reason"),
    [
        (None, "fused", "every condition"),
        ({"quant_method": "fp8", "modules_to_not_convert": left_out("model.language_model")}, "dual_stream", "Fp8"),
        ({"quant_method": "fp8", "ignored_layers": left_out("model")}, "dual_stream", "Fp8LinearMethod"),
        ({"quant_method": "compressed-tensors", "ignore": ["re:.*in_proj_[ab]$"]}, "dual_stream", "CompressedTensors"),
        ({"quant_method": "compressed-tensors", "ignore": ["re:.*linear_attn.*"]}, "fused", "every condition"),
        ({"quant_method": "awq", "modules_to_not_convert": ["linear_attn"]}, "fused", "every condition"),
        ({"quant_method": "modelopt", "exclude_modules": ["*in_proj_b*", "*in_proj_a*"]}, "dual_stream", "ModelOpt"),
        ({"quant_method": "gptq", "dynamic": {"-:.*linear_attn.*": {}}}, "fused", "every condition"),
        ({"quant_method": "auto-round", "extra_config": {"re:.*in_proj_[ab]": {"bits": 16}}}, "dual_stream", "INC"),
        ({"quant_method": "gptq"}, "serial", "AutoGPTQLinearMethod and AutoGPTQLinearMethod are not known to be safe"),
        ({"quant_method": "brand_new", "ignore": ["re:.*in_proj_[ab]$"]}, "serial", "the linear method of 'brand_new'"),
        ({"quant_method": "compressed-tensors", "ignore": ["re:("]}, "serial", "not known to be safe"),
    ],
)
def test_plan(model: Any, quantization: Any, strategy: str, reason: str) -> None:
    (group,) = read_groups(model(quantization), 1, "cuda", "auto")
    assert group.layers == GDN_LAYERS
    assert group.plan.strategy == strategy
    assert reason in group.plan.reason
    assert "6 GDN layers (0-2, 4-6)" in str(group)


def test_the_quantisation_is_a_part_of_what_times_are_kept_for(model: Any) -> None:
    """As the engine reads it: test_host.py."""
    quantization = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    (group,) = read_groups(model(quantization), 1, "cuda", "auto")
    assert group.facts.quantization == digest(quantization) != digest({})
    (plain,) = read_groups(model(), 1, "cuda", "auto")
    assert plain.facts.quantization == ""


def test_layers_that_differ_are_told_apart(model: Any) -> None:
    quantization = {"quant_method": "fp8", "ignored_layers": ["model.layers.4.linear_attn"]}
    groups = read_groups(model(quantization), 1, "cuda", "auto")
    assert {group.layers: group.plan.strategy for group in groups} == {(0, 1, 2, 5, 6): "serial", (4,): "fused"}


@pytest.mark.parametrize(
    ("size", "quantization", "qkvz", "ba"),
    [(1, None, 12288, 64), (4, None, 3072, 16), (4, {"quant_method": "awq"}, 3072, 64)],
)
def test_shapes(model: Any, size: int, quantization: Any, qkvz: int, ba: int) -> None:
    (group,) = read_groups(model(quantization), size, "cuda", "auto")
    assert (group.hidden_size, group.facts.qkvz.output_size, group.facts.ba.output_size) == (4096, qkvz, ba)


def test_batch_invariance_is_taken_from_the_environment(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--require fused` must not pass where the engine would never fuse."""
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    report = with_model(check_elsewhere("0.32.0", None), model(), 1)
    assert (report.status, report.strategy) == ("active", "dual_stream")
    assert "promises bit-equal results" in report.model[0]


def test_a_setting_that_leaves_nothing_to_overlap_is_said(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_GDN_PLUGIN_MAX_TOKENS", "0")
    monkeypatch.setenv("VLLM_GDN_PLUGIN_STRATEGY", "dual_stream")
    report = with_model(check_elsewhere("0.32.0", None), model(), 1)
    assert "VLLM_GDN_PLUGIN_MAX_TOKENS=0 leaves no batch to overlap" in report.model[0]


def test_strict_and_a_serial_layer_do_not_go_together(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine would stop at that layer, whatever the others get."""
    mixed = model({"quant_method": "fp8", "ignored_layers": ["model.layers.4.linear_attn"]})
    assert with_model(check_elsewhere("0.32.0", None), mixed, 1).exit_code == 0
    monkeypatch.setenv("VLLM_GDN_PLUGIN_STRICT", "1")
    report = with_model(check_elsewhere("0.32.0", None), mixed, 1)
    assert (report.status, report.exit_code) == ("refused", 1)
    assert "unset VLLM_GDN_PLUGIN_STRICT" in report.what_to_do


def test_auto_on_the_cpu_is_stock(model: Any) -> None:
    (group,) = read_groups(model(), 1, "cpu", "auto")
    assert group.plan.strategy == "serial"


@pytest.mark.parametrize(
    ("content", "size", "says"),
    [
        (None, 1, "takes a local model directory"),
        ("not json", 1, "is not JSON"),
        ("[]", 1, "is not a model's config.json"),
        ('{"text_config": 3}', 1, "is not a model's config.json"),
        ('{"hidden_size": 8}', 1, "not the config.json of a model with Gated Delta Net layers"),
        (json.dumps(TEXT | {"layer_types": ["full_attention"]}), 1, "none of the model's layers"),
        (json.dumps(TEXT | {"hidden_size": "wide"}), 1, "not the config.json"),
        (json.dumps(TEXT | {"hidden_size": None}), 1, "not the config.json"),
        (json.dumps(TEXT | {"linear_num_value_heads": 0}), 1, "is less than 1"),
        (json.dumps(TEXT | {"linear_key_head_dim": -4}), 1, "is less than 1"),
        (json.dumps(TEXT | {"layer_types": 5}), 1, "makes no sense"),
        (json.dumps(TEXT | {"full_attention_interval": 0}), 1, "makes no sense"),
        (json.dumps(TEXT | {"num_hidden_layers": 10**9}), 1, "num_hidden_layers below 100000"),
        (json.dumps(TEXT | {"quantization_config": "fp8"}), 1, "makes no sense"),
        (json.dumps(TEXT | {"quantization_config": ["fp8"]}), 1, "makes no sense"),
        (json.dumps(TEXT | {"quantization_config": {"quant_method": "fp8", "ignore": 3}}), 1, "makes no sense"),
        (json.dumps(TEXT | {"quantization_config": {"extra_config": ["x"]}}), 1, "makes no sense"),
        (json.dumps(TEXT | {"quantization_config": {"extra_config": {"x": {"bits": "4"}}}}), 1, "makes no sense"),
        (json.dumps(TEXT), 3, "cannot be split 3 ways"),
        (json.dumps(TEXT), 0, "cannot be split 0 ways"),
    ],
)
def test_what_cannot_be_read_is_said_in_one_line(tmp_path: Path, content: str | None, size: int, says: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(Unreadable, match=says) as raised:
        read_groups(str(tmp_path), size, "cuda", "auto")
    assert "\n" not in str(raised.value)


WAYS = f"fused, {', '.join(PADDED_TO)}, dual_stream or serial"
TO_COME = f"; in CUDA graphs {WAYS}, as timed on this GPU when the engine starts"
AT_16 = ", fused at 16 to 32 tokens, padded at 1 of 4 sizes"
EARLIER = f"; in CUDA graphs dual_stream at 1 to 8 tokens{AT_16} (timed at an earlier start)"


@pytest.mark.parametrize(
    ("variables", "platform", "gpu", "told"),
    [
        ({}, "cuda", "NVIDIA H200", EARLIER),
        ({"MAX_TOKENS": "8"}, "cuda", "NVIDIA H200", EARLIER.replace(AT_16, "")),
        ({"MAX_TOKENS": "0"}, "cuda", "NVIDIA H200", ""),
        ({}, "cuda", "NVIDIA L4", TO_COME),
        ({"TUNE": "0"}, "cuda", "NVIDIA H200", ""),
        ({"STRATEGY": "dual_stream"}, "cuda", "NVIDIA H200", ""),
        ({}, None, None, ""),
    ],
)
def test_what_this_gpu_was_timed_to_do_best_is_told(
    model: Any,
    tmp_path: Path,
    variables: dict[str, str],
    platform: str | None,
    gpu: str | None,
    told: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("torch", reason="torch isn't installed: its version is a part of what times are kept for")
    for name, value in {"driver": "580.1", "version": "0.32.0", "tuning_directory": tmp_path / "times"}.items():
        monkeypatch.setattr(host, name, lambda value=value: value)
    (group,) = read_groups(model(), 1, "cuda", "auto")
    slow = dict.fromkeys(("fused", *PADDED_TO, "dual_stream", "serial"), 3.0)
    apart, padded, fused = (slow | {way: 1.0} for way in ("dual_stream", "fused_to_256", "fused"))
    times = {1: apart, 8: apart, 16: padded, 32: fused}
    keep(case_of(group.facts, 4096, "NVIDIA H200"), times, tmp_path / "times")
    for name, text in variables.items():
        monkeypatch.setenv(f"VLLM_GDN_PLUGIN_{name}", text)
    report = with_model(Report("active", "", "auto", platform=platform, device=gpu), model(), 1)
    (line,) = report.model
    assert line.endswith(group.plan.reason + told if "STRATEGY" not in variables else "holds")


def test_times_without_the_narrow_kernel_are_told_where_it_does_not_run(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch", reason="torch isn't installed: its version is a part of what times are kept for")
    for name, value in {"driver": "580.1", "version": "0.32.0", "tuning_directory": tmp_path / "times"}.items():
        monkeypatch.setattr(host, name, lambda value=value: value)
    path = model({"quant_method": "fp8", "modules_to_not_convert": left_out("model")})
    (group,) = read_groups(path, 1, "cuda", "auto")
    case = case_of(group.facts, 4096, "NVIDIA H200")
    times = {"dual_stream": 2.0, "serial": 3.0}
    report = Report("active", "", "auto", platform="cuda", device="NVIDIA H200")
    keep(without_narrow_kernel(case), {1: times}, tmp_path / "times")
    (line,) = with_model(report, path, 1).model
    assert line.endswith("; in CUDA graphs dual_stream at 1 token (timed at an earlier start)")
    keep(case, {1: times | {"narrow_kernel": 1.0}}, tmp_path / "times")
    (line,) = with_model(report, path, 1).model
    assert line.endswith("; in CUDA graphs narrow_kernel at 1 token (timed at an earlier start)")
