"""``in_proj_qkvz`` as vLLM's own block-quantised FP8 layer beside a bfloat16 ``in_proj_ba``: official FP8 checkpoints.

This module and ``vllm_layer.py`` are those of the bench that know vLLM's names.
"""

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F

from vllm_gdn_plugin.bench.errors import BadInput
from vllm_gdn_plugin.bench.results import QKVZ
from vllm_gdn_plugin.bench.shapes import Shape
from vllm_gdn_plugin.bench.strategies import Projections, random_weight
from vllm_gdn_plugin.decide.plan import DUAL_STREAM, SERIAL

BLOCK = 128
"""Rows and columns that share one scale."""

DTYPE = torch.bfloat16


def require_blocks(shape: Shape) -> None:
    """Raises BadInput where the weight is no whole number of blocks."""
    if shape.hidden % BLOCK or shape.qkvz % BLOCK:
        raise BadInput(
            f"--quantization fp8: hidden {shape.hidden} and qkvz {shape.qkvz} of {shape.name}"
            f" (TP {shape.tensor_parallel_size}) are not multiples of {BLOCK}"
        )


@contextmanager
def vllm_layers() -> Iterator[Callable[[Shape], Projections]]:
    """A maker of projections, with vLLM set up for one rank for as long as it is used."""
    keep_vllm_quiet()
    try:
        from vllm.config import VllmConfig
    except ImportError as error:
        raise BadInput(f"--quantization fp8 needs vLLM, and it cannot be imported: {error}") from error
    config = VllmConfig()
    with one_rank(config, DTYPE):
        # All that the FP8 method asks of a model; set any earlier, the set-up would ask it for more.
        config.model_config = SimpleNamespace(dtype=DTYPE)
        yield _maker()


def keep_vllm_quiet() -> None:
    """Have vLLM, once it is imported, log warnings alone, and not to where the report goes."""
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")


@contextmanager
def one_rank(config: Any, dtype: torch.dtype) -> Iterator[None]:
    """vLLM set up in this process for an engine of this configuration and one rank, with ``dtype`` as the default."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import (
        destroy_distributed_environment,
        destroy_model_parallel,
        init_distributed_environment,
        initialize_model_parallel,
    )

    default_dtype = torch.get_default_dtype()
    with tempfile.TemporaryDirectory() as rendezvous, set_current_vllm_config(config):
        init_distributed_environment(1, 0, f"file://{rendezvous}/file", 0, "nccl")
        try:
            initialize_model_parallel()
            torch.set_default_dtype(dtype)
            yield
        finally:
            torch.set_default_dtype(default_dtype)
            destroy_model_parallel()
            destroy_distributed_environment()


def _maker() -> Callable[[Shape], Projections]:
    from vllm.model_executor.layers.linear import MergedColumnParallelLinear
    from vllm.model_executor.layers.quantization.fp8 import Fp8Config

    made = 0

    def make(shape: Shape) -> Projections:
        nonlocal made
        made += 1
        quant_config = Fp8Config(True, "dynamic", weight_block_size=[BLOCK, BLOCK])
        with torch.device("cuda"):
            qkvz = MergedColumnParallelLinear(
                shape.hidden,
                [shape.qkvz],
                bias=False,
                quant_config=quant_config,
                params_dtype=DTYPE,
                prefix=f"layers.{made}.in_proj_qkvz",
            )
        for parameter in qkvz.parameters():
            if parameter.dtype == torch.float8_e4m3fn:
                parameter.data.copy_(torch.randn(parameter.shape, device="cuda").clamp_(-3, 3))
            else:
                parameter.data.fill_(shape.hidden**-0.5)
        qkvz.quant_method.process_weights_after_loading(qkvz)
        ba = random_weight(shape.ba, shape.hidden, DTYPE, "cuda")
        wide = sum(parameter.nbytes for parameter in qkvz.parameters())
        both = wide + ba.nbytes
        return Projections(
            lambda x: qkvz(x)[0],
            lambda x: F.linear(x, ba),
            {SERIAL: both, DUAL_STREAM: both, QKVZ: wide},
        )

    return make
