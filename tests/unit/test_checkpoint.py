"""What is told of a model before its engine is started, without vLLM. With it: tests/engine/test_check_formats.py."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from threading import Event
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from vllm_gdn_plugin.cli.check import MAY_RUN, CannotTell, Report, check_elsewhere, with_model
from vllm_gdn_plugin.decide.checkpoint import (
    EngineFlags,
    ModelFacts,
    Undecidable,
    Unreadable,
    digest,
    gdn_shape,
    group,
    unquantised_facts,
)
from vllm_gdn_plugin.decide.decode import DecodeFacts
from vllm_gdn_plugin.decide.plan import LayerFacts, ProjectionFacts
from vllm_gdn_plugin.decide.scratch import UNQUANTIZED
from vllm_gdn_plugin.host import model as host_model
from vllm_gdn_plugin.host import model_files
from vllm_gdn_plugin.host.model_files import find_directory, load_config, quantised_by

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
FP8 = {"quant_method": "fp8", "modules_to_not_convert": ["model.layers.0.linear_attn.in_proj_b"]}


@pytest.fixture
def model(tmp_path: Path) -> Callable[..., str]:
    def write(text: dict[str, Any] = TEXT, **whole: Any) -> str:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_5", "text_config": text, **whole}))
        return str(tmp_path)

    return write


def facts_of(directory: str, **flags: Any) -> ModelFacts:
    path = Path(directory)
    return unquantised_facts(load_config(path), quantised_by(path), EngineFlags(**flags), "cuda", False)


def elsewhere(model: str, **flags: Any) -> Report:
    """The report where vLLM isn't installed."""
    return with_model(check_elsewhere("0.32.0", None), model, None, EngineFlags(**flags))


def test_a_model_without_quantisation_is_told_without_vllm(model: Any) -> None:
    facts = facts_of(model())
    (alike,) = group(facts.shape.hidden_size, facts.layers, "auto")
    assert (alike.layers, alike.plan.strategy, alike.facts.quantization) == (GDN_LAYERS, "fused", "")
    assert str(alike) == (
        "6 GDN layers (0-2, 4-6): fused; in_proj_qkvz 4096 x 12288 UnquantizedLinearMethod, in_proj_ba 4096 x 64"
        " UnquantizedLinearMethod; every condition of fused holds"
    )
    report = elsewhere(model())
    kernel = "may run with vLLM 0.28 and later: it proves itself when the engine starts"
    assert (report.status, report.strategy, report.decode_kernel) == ("active", "fused", kernel)
    assert report.model == [f"{alike}; decode kernel {kernel}"]
    assert report.warnings == ["the platform is not known here: the plan for the model is the one for CUDA"]


@pytest.mark.parametrize(
    ("flags", "strategy", "reason"),
    [
        ({"enforce_eager": True}, "fused", "every condition"),
        ({"enable_lora": True}, "serial", "LoRA is enabled"),
        ({"enable_dbo": True, "enforce_eager": True}, "fused", "every condition"),
        ({"cpu_offload_gb": 1.5}, "serial", "offloaded"),
        ({"offload_group_size": 4}, "serial", "offloaded"),
        ({"dtype": "float16"}, "fused", "every condition"),
    ],
)
def test_the_engines_flags_are_part_of_the_plan(model: Any, flags: Any, strategy: str, reason: str) -> None:
    report = elsewhere(model(), **flags)
    assert report.strategy == strategy
    assert reason in report.model[0]
    for name, value in flags.items():
        assert f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}") in str(report.engine)
    assert "not looked at" in str(report.engine)
    assert "--compilation-config" in str(report.engine)


@pytest.mark.parametrize(
    ("whole", "flags", "says"),
    [
        ({"quantization_config": FP8}, {}, "which layers quantization_config in config.json leaves unquantised"),
        ({"compression_config": {"format": "int-quantized"}}, {}, "which layers compression_config in config.json"),
        ({"text_config": TEXT | {"quantization_config": FP8}}, {}, "which layers quantization_config in config.json"),
        ({}, {"quantization": "fp8"}, "which layers --quantization leaves unquantised"),
        ({"text_config": TEXT | {"model_type": "olmo_hybrid"}}, {}, "layers of model type 'olmo_hybrid'"),
        ({"text_config": TEXT | {"model_type": "qwen4_exp_text"}}, {}, "layers of model type 'qwen4_exp_text'"),
    ],
)
def test_what_only_vllm_can_tell_is_not_guessed(model: Any, whole: Any, flags: Any, says: str) -> None:
    path = model(**whole)
    with pytest.raises(Undecidable, match=says):
        facts_of(path, **flags)
    with pytest.raises(CannotTell, match=says) as raised:
        elsewhere(path, **flags)
    assert str(raised.value).startswith(f"--model {path}: ")


@pytest.mark.parametrize("name", sorted(model_files.QUANTIZATION_FILES))
def test_quantisation_may_be_in_a_file_of_its_own(model: Any, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("{}")
    with pytest.raises(Undecidable, match=f"which layers {name} leaves"):
        facts_of(model())


def test_what_is_not_known_of_the_model_does_not_change_that_the_plugin_steps_aside(model: Any) -> None:
    report = with_model(check_elsewhere("0.19.0", None), model(quantization_config=FP8))
    assert (report.status, report.exit_code, report.model) == ("refused", 1, [])
    assert report.warnings[-1].startswith("the plan for the model cannot be told: which layers quantization_config")


def of_method(qkvz: str, ba: str = UNQUANTIZED) -> LayerFacts:
    return LayerFacts("cuda", ProjectionFacts(qkvz, "bfloat16", 12288), ProjectionFacts(ba, "bfloat16", 64), "bfloat16")


def test_layers_that_differ_are_told_apart() -> None:
    fp8 = of_method("Fp8LinearMethod")
    groups = group(4096, {0: fp8, 1: fp8, 2: fp8, 4: of_method(UNQUANTIZED), 5: fp8}, "auto")
    assert {g.layers: g.plan.strategy for g in groups} == {(0, 1, 2, 5): "dual_stream", (4,): "fused"}
    assert [str(g).partition(":")[0] for g in groups] == ["4 GDN layers (0-2, 5)", "1 GDN layers (4)"]


@pytest.mark.parametrize(("size", "qkvz", "ba"), [(1, 12288, 64), (4, 3072, 16)])
def test_shapes(model: Any, size: int, qkvz: int, ba: int) -> None:
    facts = facts_of(model(), tensor_parallel_size=size)
    assert facts.shape.hidden_size == 4096
    assert (facts.layers[0].qkvz.output_size, facts.layers[0].ba.output_size) == (qkvz, ba)


def test_batch_invariance_is_taken_from_the_environment(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--require fused` must not pass where the engine would never fuse."""
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    report = elsewhere(model())
    assert (report.status, report.strategy) == ("active", "dual_stream")
    assert "promises bit-equal results" in report.model[0]


DECODE = DecodeFacts("cuda")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[int, LayerFacts]:
    """What vLLM says when it is asked, on a GPU that was not timed before; of the decode it says :data:`DECODE`."""
    found: dict[int, LayerFacts] = {}
    timing = ModuleType("vllm_gdn_plugin.run.timing")
    timing.kept_ways_of = lambda facts, hidden_size, device: ""  # type: ignore[attr-defined]
    timing.kept_decode_ways_of = lambda *args: ""  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, timing.__name__, timing)

    def model_facts(*args: Any) -> ModelFacts:
        return ModelFacts(gdn_shape(TEXT, 1), found, DECODE if args[-1] else None)

    monkeypatch.setattr(host_model, "model_facts", model_facts)
    return found


HERE = Report("active", "", "auto", platform="cuda", device="NVIDIA H200")
WITH_KERNEL = replace(HERE, decode_kernel=MAY_RUN)


def test_where_vllm_is_installed_it_is_asked(model: Any, asked: dict[int, LayerFacts]) -> None:
    asked |= {0: of_method("INCLinearMethod")}
    report = with_model(HERE, model(quantization_config=FP8))
    assert (report.strategy, report.exit_code, report.warnings) == ("dual_stream", 0, [])
    assert "INCLinearMethod" in report.model[0]


def test_who_holds_the_layer_is_said(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM has loaded the other plugins by then, as the engine will."""
    found = ModelFacts(gdn_shape(TEXT, 1), {0: of_method("UnquantizedLinearMethod")}, holder="other.Layer")
    monkeypatch.setattr(host_model, "model_facts", lambda *args: found)
    report = with_model(HERE, model())
    assert (report.status, report.strategy, report.exit_code) == ("refused", "serial", 1)
    assert report.reason.startswith("other.Layer of another plugin replaces the GDN layer")


@pytest.mark.parametrize(
    ("status", "says", "exit_code"), [("active", "vLLM does not take", 2), ("serial", "cannot be told: vLLM", 1)]
)
def test_what_vllm_refuses_is_said(
    model: Any, status: Any, says: str, exit_code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stand-in for vLLM of these tests has no configuration to be asked."""
    monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm"))
    if exit_code == 2:
        with pytest.raises(CannotTell, match=f"{says} this model here: ModuleNotFoundError: No module named 'vllm."):
            with_model(HERE, model())
    else:
        report = with_model(replace(HERE, status=status), model())
        assert (report.exit_code, says in report.warnings[0]) == (1, True)


def test_what_vllm_changes_while_it_is_asked_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """This plugin is left out then, and headers of weights that cannot be had are an error."""
    seen: list[Any] = []
    formats = ModuleType("vllm.model_executor.layers.quantization")
    get = formats.get_quantization_config = lambda name: None  # type: ignore[attr-defined]
    get.__module__ = formats.__name__
    awq = ModuleType(f"{formats.__name__}.awq")
    original = awq.get_safetensors_params_metadata = lambda model, **revision: {}  # type: ignore[attr-defined]
    for module in (formats, awq):
        monkeypatch.setitem(sys.modules, module.__name__, module)

    def model_facts(*args: Any) -> Any:
        seen.append(os.environ["VLLM_PLUGINS"].split(","))
        return awq.get_safetensors_params_metadata("here")  # type: ignore[attr-defined]

    monkeypatch.setattr(host_model, "_model_facts", model_facts)
    monkeypatch.setenv("VLLM_PLUGINS", "vllm_gdn_plugin,another")
    with pytest.raises(Undecidable, match=r"does not list the quantised modules.*\(Qwen/X gives none\)"):
        host_model.model_facts("Qwen/X", Path("here"), None, EngineFlags(), "cuda", False)
    assert (seen, os.environ["VLLM_PLUGINS"]) == ([["another"]], "vllm_gdn_plugin,another")
    assert awq.get_safetensors_params_metadata is original  # type: ignore[attr-defined]


def test_strict_and_a_serial_layer_do_not_go_together(
    model: Any, asked: dict[int, LayerFacts], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine would stop at that layer, whatever the others get."""
    asked |= {0: of_method("Fp8LinearMethod", "Fp8LinearMethod"), 4: of_method(UNQUANTIZED)}
    assert with_model(HERE, model()).exit_code == 0
    monkeypatch.setenv("VLLM_GDN_PLUGIN_STRICT", "1")
    report = with_model(HERE, model())
    assert (report.status, report.exit_code) == ("refused", 1)
    assert "unset VLLM_GDN_PLUGIN_STRICT" in report.what_to_do


def test_auto_on_the_cpu_is_stock(model: Any) -> None:
    facts = unquantised_facts(load_config(Path(model())), "", EngineFlags(), "cpu", False)
    assert [g.plan.strategy for g in group(4096, facts.layers, "auto")] == ["serial"]


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
        (json.dumps(TEXT | {"layer_types": 5}), 1, "not the config.json"),
        (json.dumps(TEXT | {"full_attention_interval": 0}), 1, "not the config.json"),
        (json.dumps(TEXT | {"num_hidden_layers": 10**9}), 1, "layers: num_hidden_layers is not below 100000"),
        (json.dumps(TEXT), 3, "cannot be split 3 ways"),
        (json.dumps(TEXT), 0, "cannot be split 0 ways"),
    ],
)
def test_what_cannot_be_read_is_said_in_one_line(tmp_path: Path, content: str | None, size: int, says: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(Unreadable, match=says) as raised:
        facts_of(str(tmp_path), tensor_parallel_size=size)
    assert "\n" not in str(raised.value)


def test_a_config_that_is_named_counts_as_its_directory(model: Any, tmp_path: Path) -> None:
    assert find_directory(model()) == find_directory(str(tmp_path / "config.json")) == tmp_path
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(Unreadable, match=r"this file is not a config.json: it takes a local model directory"):
        find_directory(str(tmp_path / "other.json"))


class Hub:
    """huggingface_hub's functions, with a cache below `root`, and a Hub that has `files` or does what they do."""

    def __init__(self, root: Path, files: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        hub = pytest.importorskip("huggingface_hub", reason="huggingface_hub, which vLLM brings, isn't installed")
        self.root, self.files, self.calls = root, files, []
        monkeypatch.setattr(hub.HfApi, "model_info", lambda api, model, **kw: self.info(model, **kw))
        monkeypatch.setattr(hub, "hf_hub_download", self.download)
        monkeypatch.setattr(hub, "try_to_load_from_cache", self.cached)
        monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)

    def info(self, model: str, revision: str | None, timeout: float) -> Any:
        self.calls.append((model, revision))
        if callable(self.files):
            self.files()
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in self.files])

    def download(self, model: str, name: str, revision: str) -> str:
        self.calls.append((name, revision))
        (self.root / name).write_text("{}")
        return str(self.root / name)

    def cached(self, model: str, name: str, revision: str | None) -> str | None:
        return str(self.root / name) if (self.root / name).exists() else None


def test_a_hub_id_is_fetched_file_by_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(tmp_path, ["config.json", "hf_quant_config.json", "model.safetensors", "tokenizer.json"], monkeypatch)
    assert find_directory("Qwen/Qwen3.5-27B", "v2") == tmp_path
    assert hub.calls == [("Qwen/Qwen3.5-27B", "v2"), ("hf_quant_config.json", "v2"), ("config.json", "v2")]
    assert not sys.modules["huggingface_hub"].constants.HF_HUB_OFFLINE


def no_network() -> None:
    raise OSError("\n[Errno -2] Name or service not known\nmore")


@pytest.mark.parametrize("hub", ["no network", "silent"])
@pytest.mark.parametrize("cached", [True, False])
def test_without_the_hub_there_is_the_cache(
    tmp_path: Path, hub: str, cached: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = Event()
    monkeypatch.setattr(model_files, "HUB_SECONDS", 0.2)
    Hub(tmp_path, no_network if hub == "no network" else lambda: ended.wait(60), monkeypatch)
    if cached:
        (tmp_path / "config.json").write_text("{}")
        assert find_directory("Qwen/Qwen3.5-27B") == tmp_path
    else:
        why = r"\[Errno -2\] Name or service not known$" if hub == "no network" else "no answer within 0.2 s$"
        with pytest.raises(Unreadable, match=f"not in the local cache, and from the Hub: {why}"):
            find_directory("Qwen/Qwen3.5-27B")
    ended.set()
    assert sys.modules["huggingface_hub"].constants.HF_HUB_OFFLINE, "nothing waits for it again"


@pytest.mark.parametrize("text", ["one\ntwo", "nor/a/path", "a" * 5000, "/no/such/place"], ids=lambda text: text[:9])
def test_what_is_neither_a_path_nor_an_id(text: str) -> None:
    pytest.importorskip("huggingface_hub", reason="huggingface_hub, which vLLM brings, isn't installed")
    with pytest.raises(Unreadable, match="there is no such path: it takes a local model directory"):
        find_directory(text)


def test_without_huggingface_hub_there_are_no_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(Unreadable, match=r"there is no such path: .*, and an id needs vLLM"):
        find_directory("Qwen/Qwen3.5-27B")


def test_a_quantisation_config_has_a_short_name() -> None:
    """As the engine reads it: test_host.py."""
    assert digest({}) == digest(None) == ""
    assert digest({"quant_method": "fp8"}) != digest({"quant_method": "awq"}) != ""


EARLIER = "; in CUDA graphs serial at 64 tokens (timed at an earlier start)"
TO_COME = "; in CUDA graphs dual_stream or serial, as timed on this GPU when the engine starts"


@pytest.mark.parametrize(
    ("variables", "platform", "method", "kept", "told"),
    [
        ({}, "cuda", "Fp8LinearMethod", "serial at 64 tokens", EARLIER),
        ({}, "cuda", "Fp8LinearMethod", "", TO_COME),
        ({"TUNE": "0"}, "cuda", "Fp8LinearMethod", "serial at 64 tokens", ""),
        ({"STRATEGY": "dual_stream"}, "cuda", "Fp8LinearMethod", "serial at 64 tokens", ""),
        ({}, "cuda", UNQUANTIZED, "serial at 64 tokens", ""),
        ({}, "rocm", "Fp8LinearMethod", "serial at 64 tokens", ""),
    ],
)
def test_what_this_gpu_was_timed_to_do_best_is_told(
    model: Any,
    asked: dict[int, LayerFacts],
    variables: dict[str, str],
    platform: str,
    method: str,
    kept: str,
    told: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    timing = sys.modules["vllm_gdn_plugin.run.timing"]
    monkeypatch.setattr(timing, "kept_ways_of", lambda facts, hidden_size, device: kept)
    asked |= {0: of_method(method)}
    for name, text in variables.items():
        monkeypatch.setenv(f"VLLM_GDN_PLUGIN_{name}", text)
    (line,) = with_model(replace(HERE, platform=platform), model()).model
    assert line.endswith(told)
    assert ("in CUDA graphs" in line) == bool(told)


@pytest.mark.parametrize(
    ("changes", "flags", "facts"),
    [
        ({}, {}, {}),
        ({"mamba_ssm_dtype": "float32"}, {}, {"dtypes": ("bfloat16", "bfloat16", "float32", "bfloat16")}),
        (
            {"mamba_ssm_dtype": "float32"},
            {"mamba_ssm_cache_dtype": "float16"},
            {"dtypes": ("bfloat16", "bfloat16", "float16", "bfloat16")},
        ),
        ({}, {"dtype": "float16"}, {"dtypes": ("float16",) * 4}),
        ({"output_gate_type": "swish"}, {}, {"gate": "silu"}),
        ({"output_gate_type": "sigmoid"}, {}, {"gate": "sigmoid"}),
        ({"linear_key_head_dim": 64}, {}, {"head_dims": (64, 128)}),
        ({"linear_conv_kernel_dim": 3, "hidden_act": "gelu"}, {}, {"conv": (3, False, "gelu")}),
        ({"model_type": "qwen3_next"}, {}, {"interleaved": True}),
        ({}, {"enable_lora": True, "enable_dbo": True}, {"lora": True, "ubatching": True}),
        ({}, {"speculative_config": '{"method": "mtp"}'}, {"speculation": True}),
    ],
)
def test_what_the_decode_depends_on_is_told_without_vllm(model: Any, changes: Any, flags: Any, facts: Any) -> None:
    """With vLLM, of each release that has the packed branch: tests/engine/test_check_formats.py."""
    plain = replace(DECODE, dtypes=("bfloat16",) * 4)
    assert facts_of(model(TEXT | changes), **flags).decode == replace(plain, **facts)


def test_a_model_without_the_kernel_is_told_the_reason(model: Any) -> None:
    report = elsewhere(model(), speculative_config="{}")
    assert report.decode_kernel == "off: with speculative decoding vLLM has a kernel of its own"
    assert report.model[0].endswith(f"; decode kernel {report.decode_kernel}")
    assert (report.status, report.strategy, report.exit_code) == ("active", "fused", 0)


QUANTISED = of_method("Fp8LinearMethod", "Fp8LinearMethod")


@pytest.mark.parametrize(
    ("variables", "kernel", "status", "reason"),
    [
        ({}, MAY_RUN, "active", "the decode kernel alone, by the model's configuration"),
        ({"STRICT": "1"}, MAY_RUN, "active", "the decode kernel alone"),
        ({}, "off: it says so", "serial", "one GEMM cannot serve"),
        ({"STRICT": "1"}, "off: it says so", "refused", "one GEMM cannot serve"),
        ({"DECODE_KERNEL": "1"}, "off: it says so", "serial", "one GEMM cannot serve"),
        ({"DECODE_KERNEL": "1", "STRICT": "1"}, "off: it says so", "refused", "no decode kernel: it says so"),
        ({"STRATEGY": "serial", "DECODE_KERNEL": "1"}, MAY_RUN, "active", "the decode kernel alone"),
    ],
)
def test_layers_that_only_the_kernel_is_for(
    model: Any,
    asked: dict[int, LayerFacts],
    variables: dict[str, str],
    kernel: str,
    status: str,
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As in the engine, such a layer is left to vLLM only where it has no kernel either."""
    asked |= {0: QUANTISED}
    for name, text in variables.items():
        monkeypatch.setenv(f"VLLM_GDN_PLUGIN_{name}", text)
    report = with_model(replace(HERE, decode_kernel=kernel), model())
    assert (report.status, report.strategy) == (status, "serial")
    assert reason in report.reason
    assert ("unset VLLM_GDN_PLUGIN_STRICT" in report.what_to_do) == (status == "refused")


@pytest.mark.parametrize(
    ("variables", "kept", "told"),
    [
        ({}, "kernel at 1 to 16 tokens", "may run: kernel at 1 to 16 tokens (timed at an earlier start)"),
        ({}, "", "may run: it proves itself when the engine starts, and is timed on this GPU"),
        ({"TUNE": "0"}, "kernel at 1 to 16 tokens", "may run: it proves itself when the engine starts"),
        ({"DECODE_KERNEL": "1"}, "kernel at 1 to 16 tokens", "may run: it proves itself when the engine starts"),
    ],
)
def test_the_sizes_at_which_the_kernel_was_faster_are_told(
    model: Any,
    asked: dict[int, LayerFacts],
    variables: dict[str, str],
    kept: str,
    told: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[Any] = []
    timing = sys.modules["vllm_gdn_plugin.run.timing"]
    monkeypatch.setattr(timing, "kept_decode_ways_of", lambda *args: seen.append(args) or kept)
    asked |= {0: of_method(UNQUANTIZED)}
    for name, text in variables.items():
        monkeypatch.setenv(f"VLLM_GDN_PLUGIN_{name}", text)
    report = with_model(WITH_KERNEL, model(), None, EngineFlags(tensor_parallel_size=4))
    assert report.decode_kernel == told
    assert report.model[0].endswith(f"; decode kernel {told}")
    assert all(args == (DECODE, 8, 2048, "NVIDIA H200") for args in seen), "of one rank"
    assert bool(seen) == (not variables)


def test_where_the_plugin_takes_no_part_nothing_is_told_of_the_kernel(model: Any, asked: dict[int, LayerFacts]) -> None:
    asked |= {0: of_method(UNQUANTIZED)}
    report = with_model(replace(HERE, status="refused"), model())
    assert (report.decode_kernel, "decode kernel" in report.model[0]) == (None, False)
