"""This process among vLLM's: who speaks, in which voice, with which peers, and what vLLM is told of our variables."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

LOGGER = "vllm.vllm_gdn_plugin"


def logger() -> logging.Logger:
    """A logger below vLLM's own, so that its format and level apply to our lines."""
    from vllm.logger import init_logger

    log: logging.Logger = init_logger(LOGGER)
    return log


def is_first_rank() -> bool:
    """Whether this process speaks for its engine, which is one data-parallel replica: its first rank."""
    return is_first_rank_of_stage() and not pipeline_stage()


def is_first_rank_of_stage() -> bool:
    """Whether this process speaks for the layers of its pipeline stage: the stage's other ranks have the same ones."""
    from vllm.distributed.parallel_state import get_pcp_group, get_tp_group, model_parallel_is_initialized

    return not model_parallel_is_initialized() or bool(get_tp_group().is_first_rank and get_pcp_group().is_first_rank)


def has_peers() -> bool:
    """Whether other ranks have parts of the same layers.

    They have to choose alike whatever vLLM compiles: while it does, it may wait for all of them (FlashInfer's workspace
    for fused all-reduces, say), and one that finds its compiled code in the cache would not come.
    """
    from vllm.distributed.parallel_state import get_pcp_group, get_tp_group, model_parallel_is_initialized

    several = model_parallel_is_initialized() and get_tp_group().world_size * get_pcp_group().world_size > 1
    return bool(several)


def pipeline_stage() -> int | None:
    """The pipeline stage of this process, counted from 0, or None where there is only one."""
    from vllm.distributed.parallel_state import get_pp_group, model_parallel_is_initialized

    several = model_parallel_is_initialized() and get_pp_group().world_size > 1
    return int(get_pp_group().rank_in_group) if several else None


def declare_variables(variables: dict[str, Callable[[], Any]]) -> None:
    """Make environment variables known to vLLM.

    vLLM hashes every known variable into its compile-cache keys (``vllm.envs.compile_factors``), so that an
    artifact compiled with other values, or without the plugin, is never loaded; and it warns of unknown ones.
    """
    from vllm import envs

    envs.environment_variables.update(variables)


def tuning_directory() -> Path:
    """Where the plugin keeps its times, below vLLM's cache root."""
    from vllm import envs

    return Path(envs.VLLM_CACHE_ROOT) / "vllm_gdn_plugin"
