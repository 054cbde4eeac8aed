"""Real projections of vLLM on a real GPU: skipped, with the reason, where there is none."""

import importlib.util
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from gpu_layers import Layer, fill


def _missing() -> str | None:
    for name in ("torch", "vllm"):
        if importlib.util.find_spec(name) is None:
            return f"{name} is not installed"
    import torch

    return None if torch.cuda.is_available() and torch.version.hip is None else "there is no NVIDIA GPU"


MISSING = _missing()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if MISSING:
        for item in items:
            if "tests/gpu" in str(item.path):
                item.add_marker(pytest.mark.skip(reason=MISSING))


@pytest.fixture(scope="session")
def vllm_config(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A vLLM configuration in force, in a tensor-parallel group of one."""
    import torch
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel

    config = VllmConfig()
    rendezvous = tmp_path_factory.mktemp("rendezvous") / "file"
    with set_current_vllm_config(config):
        torch.accelerator.set_device_index(0)
        init_distributed_environment(1, 0, f"file://{rendezvous}", 0, "nccl")
        initialize_model_parallel()
        config.model_config = SimpleNamespace(dtype=torch.bfloat16)  # all that the FP8 method asks of a model
        yield config


@pytest.fixture
def make_layer(vllm_config: Any) -> Iterator[Callable[..., Layer]]:
    """Builds a layer of real vLLM linear layers with random weights, known to the forward context by its name."""
    import torch
    from vllm.model_executor.layers.linear import MergedColumnParallelLinear

    known = vllm_config.compilation_config.static_forward_context
    made = []

    def linear(hidden: int, size: int, dtype: Any, quant_config: Any, prefix: str) -> Any:
        torch.set_default_dtype(dtype)
        try:
            with torch.device("cuda"):
                built = MergedColumnParallelLinear(
                    hidden, [size], bias=False, quant_config=quant_config, params_dtype=dtype, prefix=prefix
                )
        finally:
            torch.set_default_dtype(torch.float32)
        for parameter in built.parameters():
            fill(parameter, hidden)
        built.quant_method.process_weights_after_loading(built)
        return built

    def make(shape: tuple[int, int, int], dtype: Any = None, quant_config: Any = None) -> Layer:
        dtype = dtype or torch.bfloat16
        name = f"layer.{len(made)}"
        hidden, qkvz, ba = shape
        layer = Layer(
            name,
            linear(hidden, qkvz, dtype, quant_config, f"{name}.in_proj_qkvz"),
            linear(hidden, ba, dtype, None, f"{name}.in_proj_ba"),
        )
        known[name] = layer
        made.append(name)
        return layer

    yield make
    for name in made:
        del known[name]
