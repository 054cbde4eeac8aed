"""A vLLM plugin for benchmarks: vLLM's CPU engine compiles piecewise, as it does on GPUs.

On a CPU, vLLM compiles the whole model as one graph, so nothing can be seen there of how many pieces share a compiled
artifact. This keeps the piecewise mode that the platform takes away, and declares the schemas of the CUDA ops whose
names vLLM's passes look up. The engine still computes, but nobody has tuned it: its seconds say nothing about GPUs.
"""

import inspect
import re

import torch

SCHEMAS = torch.library.Library("_C", "FRAGMENT")


def register() -> None:
    """The entry point."""
    from vllm.compilation.passes.utility import fix_functionalization
    from vllm.config import CompilationMode
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    for name in set(re.findall(r"torch\.ops\._C\.(\w+)\.default", inspect.getsource(fix_functionalization))):
        if not hasattr(torch.ops._C, name):
            SCHEMAS.define(f"{name}(Tensor x) -> ()")

    platform = type(current_platform)
    check = platform.check_and_update_config

    def keep_mode(vllm_config):
        compilation = vllm_config.compilation_config
        wanted = compilation.mode
        check(vllm_config)
        if wanted == CompilationMode.VLLM_COMPILE:
            compilation.mode = wanted
            compilation.compile_sizes = compilation.compile_sizes or []

    platform.check_and_update_config = staticmethod(keep_mode)
