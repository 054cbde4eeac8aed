"""Load tiny models as vLLM does, with each strategy; run their GDN layers' stock `forward_cuda` compiled; reload them.

    python construct.py MODEL OUTPUT.json [--also MODEL...]

Needs only the Python files of a vLLM release, so it also shows what holds where there is no CPU engine; and no engine
on a CPU takes `forward_cuda`. vLLM makes the configuration, loads the plugins, picks the layer class and loads the
weights. Stood in for is what only its compiled part can do: packing weights, and the attention after the projections.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

TOKENS = 5


def prepare(rendezvous: Path) -> None:
    """Make this a process of a CPU engine that has one rank and no kernels of its own."""
    import vllm.platforms
    from vllm import _custom_ops
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.model_executor.layers import utils
    from vllm.platforms.cpu import CpuPlatform

    vllm.platforms._current_platform = CpuPlatform()  # what is detected depends on the metadata of the installed build
    utils.dispatch_cpu_unquantized_gemm = leave_unpacked
    _custom_ops.cpu_prepack_moe_weight = lambda weight, *args: weight
    torch.accelerator.empty_cache = lambda: None  # as vLLM's CPU worker does

    from vllm.config import VllmConfig, set_current_vllm_config

    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, f"file://{rendezvous}", 0, "gloo")
        initialize_model_parallel()


def load(model: str, strategy: str | None) -> tuple[Any, Any]:
    """The configuration and the loaded model, built by vLLM with the plugin registered anew, or without it."""
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model
    from vllm.plugins import load_plugins_by_group

    from vllm_gdn_plugin.decide.contract import GDN_CLASSES
    from vllm_gdn_plugin.host.layers import withdraw_from

    for module, name in GDN_CLASSES.items():
        if module in sys.modules:
            withdraw_from(getattr(sys.modules[module], name))
    os.environ["VLLM_GDN_PLUGIN_STRATEGY"] = strategy or "serial"
    for register in load_plugins_by_group("vllm.general_plugins").values():
        register()
    config = EngineArgs(
        model, enforce_eager=True, language_model_only=True, mamba_ssm_cache_dtype="float32", max_model_len=256
    ).create_engine_config()
    with set_current_vllm_config(config):
        return config, get_model(vllm_config=config)


def leave_unpacked(layer: Any, remove_weight: bool) -> None:
    layer.cpu_linear = torch.nn.functional.linear


def stand_in_for_attention(layer: Any) -> None:
    """A function of all that the projections gave to the attention, in place of the attention."""

    def forward_core(mixed_qkv: torch.Tensor, b: torch.Tensor, a: torch.Tensor, core_attn_out: torch.Tensor) -> None:
        tokens, heads, dim = core_attn_out.shape
        qkv = mixed_qkv.reshape(tokens, -1, heads, dim)
        core_attn_out.copy_(qkv.sum(1) * b.unsqueeze(-1) + qkv.amax(1) * a.unsqueeze(-1))

    layer._forward_core = forward_core


def forward_of(layer: Any, layer_class: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """What `forward_cuda` of this class, the plugin's or stock's, computes of the layer."""
    stock = layer_class.__base__ if getattr(layer_class, "is_gdn_plugin", False) else layer_class
    writes_output = "output" in inspect.signature(stock.forward_cuda).parameters  # up to 0.25

    def forward(hidden_states: torch.Tensor) -> torch.Tensor:
        if not writes_output:
            return layer_class.forward_cuda(layer, hidden_states)
        output = torch.empty_like(hidden_states)
        layer_class.forward_cuda(layer, hidden_states, output)
        return output

    return forward


def run(layer: Any, hidden_states: torch.Tensor) -> dict[str, Any]:
    """What the traced forward holds, and how far what it gives is from stock."""
    stock = type(layer).__base__
    graphs: list[Any] = []
    inputs: list[torch.Tensor] = []

    def backend(graph: Any, example_inputs: Any) -> Any:
        def call(*given: Any) -> Any:
            graphs.append(graph)
            inputs.extend(given)
            return graph.forward(*given)

        return call

    torch._dynamo.reset()
    stand_in_for_attention(layer)
    want = forward_of(layer, stock)(hidden_states).double()
    compiled = torch.compile(forward_of(layer, type(layer)), backend=backend, fullgraph=True)
    got = compiled(hidden_states).double()
    (graph,) = graphs
    nodes = [node for node in graph.graph.nodes if node.op == "call_function"]
    return {
        "class": type(layer).__name__,
        "stock class": stock.__name__,
        "strategy": layer.gdn.strategy,
        "ops": [str(node.target) for node in nodes if str(node.target).startswith("vllm_gdn_plugin.")],
        "linears": linears(layer, graph, inputs),
        "norm": float(want.norm()),
        "error": float((got - want).norm()),
    }


def linears(layer: Any, graph: Any, inputs: list[torch.Tensor]) -> list[str]:
    """The weights by which a traced forward multiplies."""
    weights = {name: getattr(layer, name).weight for name in ("in_proj_qkvz", "in_proj_ba", "out_proj")}
    if layer.gdn.fused:
        weights["the one weight"] = layer.gdn.fused.weight
    given = dict(zip((node for node in graph.graph.nodes if node.op == "placeholder"), inputs, strict=True))
    used = [given[node.args[1]] for node in graph.graph.nodes if node.target == torch.nn.functional.linear]
    return [
        name
        for weight in used
        for name, known in weights.items()
        if (weight.data_ptr(), weight.shape) == (known.data_ptr(), known.shape)
    ]


def names(model: Any) -> dict[str, list[str]]:
    return {
        "parameters": [name for name, _ in model.named_parameters()],
        "buffers": [name for name, _ in model.named_buffers()],
        "state": list(model.state_dict()),
    }


def reload(config: Any, model: Any, layers: list[Any], hidden_states: torch.Tensor) -> dict[str, Any]:
    """Give a running model other weights, layer by layer as vLLM does, and say what has become of its GDN layers."""
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    def parameters() -> list[Any]:
        return [getattr(layer, name).weight for layer in layers for name in ("in_proj_qkvz", "in_proj_ba")]

    def results(layer_class: Any) -> list[torch.Tensor]:
        return [forward_of(layer, layer_class)(hidden_states).double() for layer in layers]

    hooks: list[Any] = []
    for layer in layers:
        layer.gdn_after_loading.quant_method.process_weights_after_loading = hooks.append
    kept, where, before = parameters(), [p.data_ptr() for p in parameters()], results(type(layers[0]))
    checkpoint = load_file(Path(config.model_config.model) / "model.safetensors")
    initialize_layerwise_reload(model)
    model.load_weights((name, -weight if "in_proj" in name else weight) for name, weight in checkpoint.items())
    finalize_layerwise_reload(model, config.model_config)
    after, stock = results(type(layers[0])), results(type(layers[0]).__base__)
    return {
        "same parameters": all(one is other for one, other in zip(parameters(), kept, strict=True)),
        "same addresses": [p.data_ptr() for p in parameters()] == where,
        "hooks called": len(hooks),
        "changed by": [float((one - other).norm()) for one, other in zip(after, before, strict=True)],
        "errors": [float((one - other).norm()) for one, other in zip(after, stock, strict=True)],
        "norms": [float(one.norm()) for one in stock],
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("output", type=Path)
    parser.add_argument("--also", nargs="*", default=[])
    args, _ = parser.parse_known_args()

    prepare(args.output.with_suffix(".rendezvous"))
    import vllm
    import witness
    from vllm.forward_context import set_forward_context

    torch.manual_seed(0)
    cases, stock = {}, {}
    for model in (args.model, *args.also):
        kind = Path(model).name
        # All of a kind before the first reload: in 0.20 that makes buffers persistent which models share.
        built = {strategy: load(model, strategy) for strategy in (None, "dual_stream", "fused")}
        stock[kind], *others = [names(one) for _, one in built.values()]
        del built[None]
        for (strategy, (config, one)), its_names in zip(built.items(), others, strict=True):
            witness.calls.clear()
            layers = [layer for layer in one.modules() if getattr(layer, "is_gdn_plugin", False)]
            hidden_states = torch.randn(TOKENS, layers[0].hidden_size, dtype=torch.bfloat16)
            with torch.inference_mode(), set_forward_context(None, config):
                case = {"names": its_names, "layers": [run(layer, hidden_states) for layer in layers]}
                case["ran"] = dict(witness.calls)
                case["reloaded"] = reload(config, one, layers, hidden_states)
            cases[f"{strategy} {kind}"] = case
    found = {"vllm": vllm.__version__, "torch": torch.__version__, "cases": cases, "stock": stock}
    args.output.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
