"""What `check` tells of models in every quantisation format, beside what vLLM constructs from the same config.json.

    python check_formats.py MODEL OUTPUT.json

vLLM makes the configuration and constructs the model, on the meta device; the facts about its GDN layers are read where
the plugin reads them. Stood in for are the weights of quantised linear layers, whose making asks for a GPU's kernels: a
layer's linear method is chosen before. Needs only the Python files of a vLLM release, as construct.py does.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, replace
from io import StringIO
from pathlib import Path
from typing import Any

GDN_LAYERS = (0, 1, 2)
INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
FLOAT8 = {"num_bits": 8, "type": "float", "symmetric": True}
FLOAT4 = {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "tensor_group", "group_size": 16}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}
AUTOROUND = {"quant_method": "auto-round", "bits": 4, "group_size": 128, "sym": True}
AUTOROUND |= {"packing_format": "auto_round:auto_gptq"}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
QUARK_FP8 = {"dtype": "fp8_e4m3", "qscheme": "per_tensor", "is_dynamic": False, "symmetric": None}
QUARK = {
    "quant_method": "quark",
    "export": {"kv_cache_group": [], "pack_method": "reorder"},
    "layer_type_quant_config": {},
    "layer_quant_config": {},
    "global_quant_config": {"weight": QUARK_FP8, "input_tensors": QUARK_FP8, "output_tensors": None, "bias": None},
}
HALVES = {"bits": 16, "data_type": "fp"}


def compressed(targets: list[str], ignore: list[str], weights: Any = INT4, inputs: Any = None, kind: str = "") -> Any:
    group = {"targets": targets, "weights": weights, "input_activations": inputs}
    found = {"quant_method": "compressed-tensors", "format": kind or "pack-quantized", "ignore": ignore}
    return found | {"config_groups": {"group_0": group}}


def formats(layers: str) -> dict[str, tuple[Any, dict[str, Any]]]:
    """(quantisation config, engine flags) by name, where the checkpoint's layers are named `layers`.N."""
    gdn = [f"{layers}.{index}.linear_attn" for index in GDN_LAYERS]
    ba = [f"{layer}.{name}" for layer in gdn for name in ("in_proj_b", "in_proj_a", "in_proj_ba")]
    qkvz = [f"{layer}.{name}" for layer in gdn for name in ("in_proj_qkv", "in_proj_z", "in_proj_qkvz")]
    attention = {f"{layers}.3.self_attn.{name}_proj": {"quant_algo": "FP8"} for name in "qkv"}
    mixed = {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION"}
    token, channel = FLOAT8 | {"strategy": "token", "dynamic": True}, FLOAT8 | {"strategy": "channel", "dynamic": False}
    return {
        "none": (None, {}),
        "none, in another dtype": (
            None,
            {"dtype": "float16", "enforce_eager": True, "mamba_ssm_cache_dtype": "float32"},
        ),
        "fp8": (FP8 | {"ignored_layers": ba}, {}),
        "fp8 in blocks": (FP8 | {"weight_block_size": [128, 128], "modules_to_not_convert": ba}, {}),
        "fp8 throughout": (FP8, {}),
        "fp8, one layer left out": (FP8 | {"modules_to_not_convert": qkvz[:3] + ba[:3]}, {}),
        "fbgemm_fp8": (
            {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0, "modules_to_not_convert": ba},
            {},
        ),
        "fp_quant": (
            {"quant_method": "fp_quant", "forward_dtype": "mxfp4", "forward_method": "abs_max"}
            | {"hadamard_group_size": 32, "pseudoquantization": False, "modules_to_not_convert": ["in_proj_ba"]},
            {},
        ),
        "awq, GDN left out": (AWQ | {"modules_to_not_convert": ["linear_attn"]}, {}),
        "awq, ba left out": (AWQ | {"modules_to_not_convert": ["in_proj_a", "in_proj_b", "in_proj_ba"]}, {}),
        "awq, by the headers": (AWQ, {}),
        "gptq, GDN left out": (GPTQ | {"dynamic": {"-:.*linear_attn.*": {}}}, {}),
        "gptq, in other groups": (
            GPTQ | {"dynamic": {"+:.*in_proj_qkv.*": {"group_size": 64}, "-:.*in_proj_[ab].*": {}}},
            {},
        ),
        "gptq, by the headers": (GPTQ, {}),
        "auto-round, regexes": (
            AUTOROUND | {"extra_config": {rf".*linear_attn\.in_proj_{name}": HALVES for name in ("a", "b", "ba")}},
            {},
        ),
        "auto-round, names": (AUTOROUND | {"extra_config": dict.fromkeys(ba, HALVES)}, {}),
        "auto-round throughout": (AUTOROUND, {}),
        "inc": (AUTOROUND | {"quant_method": "inc", "extra_config": dict.fromkeys(qkvz + ba, HALVES)}, {}),
        "modelopt fp8": ({"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["*in_proj_b*"]}, {}),
        "modelopt fp8, old": (
            {"quantization": {"quant_algo": "FP8", "exclude_modules": ["*linear_attn*"]}}
            | {"producer": {"name": "modelopt", "version": "0.29.0"}, "quant_method": "modelopt"},
            {},
        ),
        "modelopt nvfp4": (
            {
                "quant_method": "modelopt",
                "quant_algo": "NVFP4",
                "group_size": 16,
                "ignore": ["*linear_attn.in_proj_b*"],
            },
            {},
        ),
        "modelopt mxfp8": ({"quant_method": "modelopt", "quant_algo": "MXFP8", "ignore": ba}, {}),
        "modelopt mixed, GDN absent": (mixed | {"quantized_layers": attention}, {}),
        "modelopt mixed, ba absent": (
            mixed | {"quantized_layers": attention | {name: {"quant_algo": "FP8"} for name in qkvz}},
            {},
        ),
        "compressed-tensors, no GDN targets": (compressed(["re:.*mlp.*"], ["lm_head"]), {}),
        "compressed-tensors, ba ignored": (compressed(["Linear"], ["re:.*in_proj_(a|b|ba)$"]), {}),
        "compressed-tensors fp8": (compressed(["Linear"], ba, channel, token, "float-quantized"), {}),
        "compressed-tensors nvfp4": (
            compressed(["Linear"], ["re:.*linear_attn.*"], FLOAT4, None, "nvfp4-pack-quantized"),
            {},
        ),
        "quark": (QUARK | {"exclude": ba}, {}),
        "quark throughout": (QUARK | {"exclude": []}, {}),
        "mxfp4": ({"quant_method": "mxfp4"}, {}),
        "mxfp8": ({"quant_method": "mxfp8"}, {}),
        "experts_int8": ({"quant_method": "experts_int8"}, {}),
        "moe_wna16": (
            GPTQ | {"modules_in_block_to_quantize": ["mlp.gate_proj", "mlp.up_proj"]},
            {"quantization": "moe_wna16"},
        ),
        "humming": ({"quant_method": "humming", "dtype": "int4", "group_size": 128}, {}),
        "torchao": ({"quant_method": "torchao", "quant_type": {"default": {"_type": "Int8WeightOnlyConfig"}}}, {}),
        "bitsandbytes": (
            {"quant_method": "bitsandbytes", "load_in_4bit": True, "llm_int8_skip_modules": ["linear_attn"]},
            {},
        ),
        "gguf": ({"quant_method": "gguf"}, {}),
        "while loading: fp8": (None, {"quantization": "fp8"}),
        "while loading: fp8_per_tensor": (None, {"quantization": "fp8_per_tensor"}),
        "while loading: fp8_per_block": (None, {"quantization": "fp8_per_block"}),
        "while loading: mxfp8": (None, {"quantization": "mxfp8"}),
        "while loading: int8": (None, {"quantization": "int8_per_channel_weight_only"}),
        "while loading: bitsandbytes": (None, {"quantization": "bitsandbytes"}),
    }


FORMATS = tuple(formats(""))
MODELS = ("with vision", "text", "interleaved")
MOE = ("mixture of experts", "none")
"""A model for one format only: vLLM's experts ask for more of a GPU."""


def config_of(model: str) -> dict[str, Any] | None:
    """The config.json of a tiny model with its vision tower, or of its text part alone; None where vLLM has none."""
    from tiny_model import _COMMON, _DENSE, _LAYERS, _MOE, _VISION
    from transformers import Qwen3_5Config, Qwen3_5MoeConfig, Qwen3NextConfig
    from vllm import ModelRegistry

    sizes = _COMMON | {"num_hidden_layers": len(_LAYERS), "layer_types": _LAYERS}
    config: Any
    if model == "interleaved":
        architecture, config = "Qwen3NextForCausalLM", Qwen3NextConfig(**sizes, **_DENSE, num_experts=0)
    elif model in MOE:
        architecture = "Qwen3_5MoeForConditionalGeneration"
        states = {"mamba_ssm_dtype": "float32", "output_gate_type": "swish"}
        config = Qwen3_5MoeConfig(text_config=sizes | _MOE | states, vision_config=_VISION, dtype="bfloat16")
    else:
        architecture = "Qwen3_5ForConditionalGeneration"
        config = Qwen3_5Config(text_config=sizes | _DENSE, vision_config=_VISION, dtype="bfloat16")
    if model == "text":
        architecture, config = "Qwen3_5ForCausalLM", config.text_config
    if architecture not in ModelRegistry.models:
        return None
    model_class = ModelRegistry.models[architecture].load_model_cls()
    ModelRegistry.register_model(architecture, model_class)  # or vLLM starts a process to look at it
    if model == "interleaved":
        model_class.set_moe_parameters = lambda self: None  # it wants experts
    return config.to_dict() | {"architectures": [architecture]}


def write_weights(directory: Path, layers: str) -> None:
    """Weights by whose headers vLLM finds the quantised modules: in_proj_ba is in bf16, the rest in int32."""
    import torch
    from safetensors.torch import save_file

    weights = {}
    for index in GDN_LAYERS:
        for name in ("qkv", "z", "qkvz", "b", "a", "ba"):
            narrow = name in ("b", "a", "ba")
            linear = f"{layers}.{index}.linear_attn.in_proj_{name}.{'weight' if narrow else 'qweight'}"
            weights[linear] = torch.zeros(1, dtype=torch.bfloat16 if narrow else torch.int32)
    save_file(weights, directory / "model.safetensors")


def has_packed_branch() -> bool:
    """Whether this vLLM has what the decode kernel relies on."""
    from vllm_gdn_plugin.decide.decode_contract import why_no_decode_kernel
    from vllm_gdn_plugin.host.imports import package_directory

    return why_no_decode_kernel(package_directory()) is None


def constructed(directory: Path, flags: dict[str, Any]) -> Any:
    """(the facts about the layers by index, those about their decode) as vLLM constructs them."""
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
    from vllm.model_executor.model_loader.utils import initialize_model

    from vllm_gdn_plugin.host.facts import decode_facts, layer_facts

    config = EngineArgs(
        str(directory),
        allow_deprecated_quantization=True,
        language_model_only=True,
        load_format="dummy",
        skip_tokenizer_init=True,
        **flags,
    ).create_engine_config()
    if config.quant_config is not None:
        choose = config.quant_config.get_quant_method

        def get_quant_method(layer: Any, prefix: str) -> Any:
            method = choose(layer, prefix)
            unquantised = method is None or type(method).__name__.startswith("Unquantized")
            if isinstance(layer, (LinearBase, ParallelLMHead)) and not unquantised:
                method.create_weights = lambda *args, **kwargs: None
            return method

        config.quant_config.get_quant_method = get_quant_method
    torch.set_default_dtype(config.model_config.dtype)
    try:
        with set_current_vllm_config(config):
            with torch.device("meta"):
                model = initialize_model(config)
            found = [module for module in model.modules() if hasattr(module, "in_proj_ba")]
            layers = {index: layer_facts(layer, "cuda") for index, layer in zip(GDN_LAYERS, found, strict=True)}
            decode = {decode_facts(layer, layers[0]) for layer in found} if has_packed_branch() else {None}
            return layers, *decode
    finally:
        torch.set_default_dtype(torch.float32)


def told(directory: Path, flags: dict[str, Any]) -> Any:
    """The same as `check` tells it."""
    from vllm_gdn_plugin.host.model import model_facts

    found = model_facts(str(directory), directory, None, engine_flags(flags), "cuda", has_packed_branch())
    return found.layers, found.decode


def by_config(directory: Path, flags: dict[str, Any]) -> Any:
    """The same as `check` tells it where vLLM isn't installed."""
    from vllm_gdn_plugin.decide.checkpoint import unquantised_facts
    from vllm_gdn_plugin.host.model_files import load_config

    flags = {"mamba_ssm_cache_dtype": "float32"} | flags  # which vLLM's CPU platform sets
    found = unquantised_facts(load_config(directory), "", engine_flags(flags), "cuda", False)
    return found.layers, found.decode if has_packed_branch() else None


def engine_flags(flags: dict[str, Any]) -> Any:
    from vllm_gdn_plugin.decide.checkpoint import EngineFlags

    return EngineFlags(**{name: value for name, value in flags.items() if name in vars(EngineFlags())})


def answer(ask: Any, directory: Path, flags: dict[str, Any]) -> Any:
    from vllm_gdn_plugin.decide.plan import AUTO, plan

    try:
        found, decode = ask(directory, flags)
    except Exception as error:
        return {"error": " ".join(f"{type(error).__name__}: {error}".split())}
    # As on a GPU; and on the meta device no weight is in its place.
    alike = [replace(facts, cuda_graphs=True, weights_in_place=True) for facts in found.values()]
    return {
        "facts": [asdict(facts) for facts in alike],
        "strategies": [plan(facts, AUTO).strategy for facts in alike],
        "decode": decode and asdict(decode),
    }


def checked(config: Any) -> dict[str, tuple[int, str, str]]:
    """(exit status, stdout, stderr) of `check` with a Hub id in the local cache, its directory, and one that isn't."""
    from huggingface_hub import constants

    from vllm_gdn_plugin.cli.main import main as command

    cache = Path(constants.HF_HUB_CACHE) / "models--tiny--gdn"
    snapshot = cache / "snapshots" / "abc"
    snapshot.mkdir(parents=True, exist_ok=True)
    (snapshot / "config.json").write_text(json.dumps(config))
    (cache / "refs").mkdir(exist_ok=True)
    (cache / "refs" / "v2").write_text("abc")
    options = {
        "id": ["tiny/gdn", "--revision", "v2"],
        "directory": [str(snapshot)],
        "file": [str(snapshot / "config.json")],
        "unknown": ["tiny/unknown"],
        "refused": [str(snapshot), "--quantization", "brand_new"],
    }
    found = {}
    for name, model in options.items():
        with redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as errors:
            code = command(["check", "--json", "--dtype", "float16", "--model", *model])
        found[name] = code, out.getvalue(), errors.getvalue()
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("output", type=Path)
    args, _ = parser.parse_known_args()
    os.environ["VLLM_PLUGINS"] = ""
    sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
    from construct import prepare

    prepare(args.output.with_suffix(".rendezvous"))
    import torch
    import vllm

    if not hasattr(torch.ops._C, "silu_and_mul"):  # without vLLM's compiled part
        torch.library.define("_C::silu_and_mul", "(Tensor(a!) result, Tensor input) -> ()")
    answers: dict[str, Any] = {}
    for model in (*MODELS, MOE[0]):
        config = config_of(model)
        layers = "model.language_model.layers" if config and "text_config" in config else "model.layers"
        for number, (name, (quantization, flags)) in enumerate(formats(layers).items()):
            if config is None or (model in MOE and name not in MOE):
                continue
            directory = args.output.parent / "formats" / model.replace(" ", "_") / str(number)
            directory.mkdir(parents=True, exist_ok=True)
            whole = config | ({"quantization_config": quantization} if quantization else {})
            (directory / "config.json").write_text(json.dumps(whole))
            if name.startswith("gptq") or "headers" in name:
                write_weights(directory, layers)
            ways = (told, constructed, by_config) if name.startswith("none") else (told, constructed)
            answers[f"{name} | {model}"] = {way.__name__: answer(way, directory, flags) for way in ways}
    del os.environ["VLLM_PLUGINS"]
    os.environ["VLLM_GDN_PLUGIN_STRATEGY"] = "fused"
    commands = checked(config_of(MODELS[0]))
    versions = {"vllm": vllm.__version__, "torch": torch.__version__}
    args.output.write_text(json.dumps(versions | {"answers": answers, "commands": commands}))


if __name__ == "__main__":
    main()
