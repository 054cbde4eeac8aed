"""Facts about vLLM's configuration, its GDN layers and the GPU, as the plans and the times need them."""

import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from vllm_gdn_plugin.decide.checkpoint import digest
from vllm_gdn_plugin.decide.decode import DecodeFacts
from vllm_gdn_plugin.decide.decode_contract import PACKED_OP
from vllm_gdn_plugin.decide.plan import LayerFacts, ProjectionFacts


def platform() -> str:
    """vLLM's platform: ``cuda``, ``cpu``, ``rocm``, ``xpu`` or the name that an out-of-tree one gives itself."""
    from vllm.platforms import current_platform

    for name in ("cuda", "rocm", "xpu", "cpu"):
        if getattr(current_platform, f"is_{name}")():
            return name
    return str(current_platform.device_name or current_platform.device_type or "unspecified")


def layer_facts(layer: Any, requested_platform: str) -> LayerFacts:
    """The facts about a GDN layer that vLLM has just constructed."""
    from vllm import envs
    from vllm.config.vllm import get_current_vllm_config

    config = get_current_vllm_config()
    graphs = getattr(config.compilation_config, "cudagraph_mode", None)
    offload = config.offload_config
    return LayerFacts(
        platform=requested_platform,
        qkvz=projection_facts(getattr(layer, "in_proj_qkvz", None)),
        ba=projection_facts(getattr(layer, "in_proj_ba", None)),
        activation_dtype=_dtype_name(config.model_config.dtype),
        lora=config.lora_config is not None,
        cuda_graphs=not config.model_config.enforce_eager and getattr(graphs, "name", "NONE") != "NONE",
        batch_invariant=bool(envs.VLLM_BATCH_INVARIANT),
        offload=offload.uva.cpu_offload_gb > 0 or offload.prefetch.offload_group_size > 0,
        weights_in_place=_on_one_device(layer),
        ubatching=bool(getattr(config.parallel_config, "use_ubatching", False)),
        quantization=_quantization(config.model_config),
    )


def _quantization(model: Any) -> str:
    checkpoint = getattr(model, "hf_config", None)
    text = getattr(checkpoint, "text_config", None)
    return digest(getattr(checkpoint, "quantization_config", None) or getattr(text, "quantization_config", None))


def _on_one_device(layer: Any) -> bool:
    weights = [getattr(getattr(layer, name, None), "weight", None) for name in ("in_proj_qkvz", "in_proj_ba")]
    devices = {str(getattr(weight, "device", None)) for weight in weights}
    return len(devices) == 1 and not devices & {"meta", "None"}


def decode_facts(layer: Any, facts: LayerFacts) -> DecodeFacts:
    """The facts on which the decode kernel depends, about a layer of vLLM 0.28 or later."""
    from vllm import envs
    from vllm.config.vllm import get_current_vllm_config
    from vllm.model_executor.layers.mamba.mamba_utils import is_conv_state_dim_first

    config = get_current_vllm_config()
    mode = getattr(config.compilation_config, "cudagraph_mode", None)
    split_at = getattr(config.compilation_config, "splitting_ops", None) or ()
    conv_state, ssm_state, *_ = layer.get_state_dtype()
    chosen = os.environ.get("VLLM_GDN_DECODE_KERNEL", "").strip().lower()
    turned_off = f"VLLM_GDN_DECODE_KERNEL={chosen}" if chosen not in ("", "cuda") else ""
    if not layer.enable_packed_recurrent_decode:
        turned_off = "VLLM_ENABLE_FLA_PACKED_RECURRENT_DECODE=0"
    return DecodeFacts(
        platform=facts.platform,
        interleaved=layer.gqa_interleaved_layout,
        head_dims=(layer.head_k_dim, layer.head_v_dim),
        conv=(layer.conv_kernel_size, layer.conv1d.bias is not None, layer.activation),
        gate=layer.norm.activation,
        norm=(layer.norm.group_size, layer.norm.norm_before_gate),
        dtypes=(facts.activation_dtype, *map(_dtype_name, (conv_state, ssm_state, layer.norm.weight.dtype))),
        conv_state_dim_first=bool(is_conv_state_dim_first()),
        lora=facts.lora,
        batch_invariant=facts.batch_invariant,
        speculation=config.speculative_config is not None,
        offload=facts.offload,
        ubatching=facts.ubatching,
        breakable_graphs=bool(envs.VLLM_USE_BREAKABLE_CUDAGRAPH),
        piecewise_decode=facts.cuda_graphs and mode is not None and mode.decode_mode().name == "PIECEWISE",
        core_within_graph=facts.cuda_graphs and bool(split_at) and f"vllm::{PACKED_OP}" not in split_at,
        turned_off=turned_off,
    )


def projection_facts(linear: Any) -> ProjectionFacts:
    """The facts about one projection, as it is now: vLLM may give it another linear method later."""
    from vllm.model_executor.layers.linear import MergedColumnParallelLinear

    plain = (
        type(linear) is MergedColumnParallelLinear
        and linear.bias is None
        and not linear.gather_output
        and linear.return_bias
    )
    method = getattr(linear, "quant_method", None)
    return ProjectionFacts(
        linear_method=_linear_method(method),
        dtype=_dtype_name(getattr(linear, "params_dtype", None)),
        output_size=int(getattr(linear, "output_size_per_partition", 0)),
        plain=plain,
    )


def _linear_method(method: Any) -> str:
    """Class name of a linear method, and the GEMM that an unquantised one was told to use if it is not torch's."""
    gemm = getattr(method, "_gemm_impl", None)
    gemm = getattr(gemm, "func", gemm)
    default = ("default_unquantized_gemm", "cpu_unquantized_gemm")
    suffix = "" if gemm is None or gemm.__name__ in default else f" with {gemm.__name__}"
    return type(method).__name__ + suffix


def _dtype_name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def captured_sizes() -> tuple[int, ...]:
    """The numbers of tokens for which vLLM will capture a CUDA graph, as far as its configuration tells: speculation
    adds some, rounded to whole requests. None where the model's memory is vLLM's own allocator's (sleep mode), in which
    nothing else should be captured meanwhile."""
    from vllm.config.vllm import get_current_vllm_config

    config = get_current_vllm_config()
    # A draft model has a configuration of its own, and is loaded into the memory of its target.
    target = getattr(getattr(config, "speculative_config", None), "target_model_config", None)
    if any(
        getattr(m, "enable_sleep_mode", False) or getattr(m, "enable_cumem_allocator", False)
        for m in (config.model_config, target)
    ):
        return ()
    return tuple(sorted(set(getattr(config.compilation_config, "cudagraph_capture_sizes", None) or ())))


def gpu() -> str:
    """The name of this process's GPU, or of the first one where CUDA is not initialised; this does not do it."""
    import torch
    from vllm.platforms import current_platform

    # vLLM counts the devices of this engine, one data-parallel replica, and torch those of the machine.
    return str(torch.cuda.get_device_name() if torch.cuda.is_initialized() else current_platform.get_device_name())


NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")


def driver() -> str:
    """The version of NVIDIA's driver; empty where neither /proc nor NVML tells, as on a machine without one."""
    with suppress(OSError):
        found = re.search(r"\b\d+\.\d+(\.\d+)?\b", NVIDIA_DRIVER.read_text())
        if found:
            return found[0]
    try:  # WSL has no such file
        from vllm.utils.import_utils import import_pynvml

        nvml = import_pynvml()
        nvml.nvmlInit()
        return str(nvml.nvmlSystemGetDriverVersion())
    except Exception:
        return ""
