"""Load tiny models as vLLM does, with each strategy, and run their GDN layers' stock `forward_cuda` compiled.

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
from pathlib import Path
from typing import Any

import torch

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


def load(model: str, strategy: str) -> tuple[Any, Any]:
    """The configuration and the loaded model, built by vLLM with the plugin as it is registered now."""
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.custom_op import op_registry_oot
    from vllm.model_executor.model_loader import get_model
    from vllm.plugins import load_plugins_by_group

    op_registry_oot.clear()
    os.environ["VLLM_GDN_PLUGIN_STRATEGY"] = strategy
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


def run(layer: Any) -> dict[str, Any]:
    """Which of the plugin's ops the traced forward holds, and how far what it gives is from stock."""
    stock = type(layer).__base__
    writes_output = "output" in inspect.signature(stock.forward_cuda).parameters  # up to 0.25

    def forward(layer_class: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        if not writes_output:
            return layer_class.forward_cuda(layer, hidden_states)
        output = torch.empty_like(hidden_states)
        layer_class.forward_cuda(layer, hidden_states, output)
        return output

    graphs: list[Any] = []

    def backend(graph: Any, example_inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    stand_in_for_attention(layer)
    hidden_states = torch.randn(TOKENS, layer.hidden_size, dtype=torch.bfloat16)
    want = forward(stock, hidden_states).double()
    got = torch.compile(forward, backend=backend, fullgraph=True)(type(layer), hidden_states).double()
    nodes = [node for graph in graphs for node in graph.graph.nodes if node.op == "call_function"]
    return {
        "class": type(layer).__name__,
        "strategy": layer.gdn_strategy,
        "traced": [str(node.target) for node in nodes if str(node.target).startswith("vllm_gdn_plugin.")],
        "norm": float(want.norm()),
        "error": float((got - want).norm()),
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
    cases = {}
    for model in (args.model, *args.also):
        for strategy in ("dual_stream", "fused"):
            config, built = load(model, strategy)
            witness.calls.clear()
            with torch.inference_mode(), set_forward_context(None, config):
                layers = [run(layer) for layer in built.modules() if getattr(layer, "is_gdn_plugin", False)]
            cases[f"{strategy} {Path(model).name}"] = {"layers": layers, "op_calls": dict(witness.calls)}
    args.output.write_text(json.dumps({"vllm": vllm.__version__, "torch": torch.__version__, "cases": cases}))


if __name__ == "__main__":
    main()
