"""A model's GDN layers as vLLM builds them on a GPU, with random weights, and its functions that run them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from vllm_gdn_plugin.bench.errors import BadInput
from vllm_gdn_plugin.bench.layer import Model, ways
from vllm_gdn_plugin.bench.quantized import keep_vllm_quiet, one_rank
from vllm_gdn_plugin.bench.shapes import Shape, name_of
from vllm_gdn_plugin.decide.decode import why_no_kernel
from vllm_gdn_plugin.decide.decode_contract import why_no_decode_kernel
from vllm_gdn_plugin.decide.plan import AUTO, FUSED, plan
from vllm_gdn_plugin.host import facts
from vllm_gdn_plugin.host.imports import package_directory
from vllm_gdn_plugin.host.model import Configured, configured, in_short, layer_class, without_this_plugin
from vllm_gdn_plugin.host.model_files import find_directory


@contextmanager
def built(
    model: str, vllm_arguments: Sequence[str], tensor_parallel_size: int, tokens: Sequence[int]
) -> Iterator[Model]:
    """The layers of a model, with vLLM set up for as long as they are used.

    Args:
        model: a directory, its config.json, or a Hub id.
        vllm_arguments: of its engine.
        tensor_parallel_size: the layers are those of one of so many ranks.
        tokens: for which the one weight of a fused layer is to be fast.

    Raises:
        BadInput: vLLM does not build this model here, or its layers cannot have the decode kernel.
    """
    keep_vllm_quiet()
    why_not = why_no_decode_kernel(package_directory())
    if why_not:
        raise BadInput(f"there is no decode kernel with this vLLM, and nothing to compare: {why_not}")
    with without_this_plugin():
        try:
            directory = find_directory(model)
            found = configured(_engine_arguments(str(directory), vllm_arguments), tensor_parallel_size)
        except (Exception, SystemExit) as error:
            raise BadInput(f"--model {model}: vLLM does not take it here: {in_short(error)}") from error
        with one_rank(found.engine, found.engine.model_config.dtype):
            try:
                made = _model(name_of(model, directory), found, tensor_parallel_size, tokens)
            except BadInput:
                raise
            except Exception as error:
                raise BadInput(f"--model {model}: vLLM does not build its layers here: {in_short(error)}") from error
            yield made


def _engine_arguments(model: str, arguments: Sequence[str]) -> Any:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    given = ["--model", model, "--load-format", "dummy", *arguments]
    return EngineArgs.from_cli_args(parser.parse_args(given))


def _model(name: str, model: Configured, tensor_parallel_size: int, tokens: Sequence[int]) -> Model:
    from vllm_gdn_plugin.run.dual_stream import WAYS
    from vllm_gdn_plugin.run.fused import FusedWeight
    from vllm_gdn_plugin.run.layer import Gdn
    from vllm_gdn_plugin.run.proof import ScratchLayer
    from vllm_gdn_plugin.run.timing import rows_of

    text = model.engine.model_config.hf_text_config
    text.linear_num_key_heads //= tensor_parallel_size
    text.linear_num_value_heads //= tensor_parallel_size
    first = _constructed(model)
    layer_facts = facts.layer_facts(first, "cuda")
    decode_facts = facts.decode_facts(first, layer_facts)
    why_not = why_no_kernel(decode_facts, "1", AUTO)
    if why_not:
        raise BadInput(f"--model {name}: there is no decode kernel for its layers, and nothing to compare: {why_not}")
    if model.interleaved:
        raise BadInput(f"--model {name}: bench layer does not measure layers of Qwen3-Next")
    strategy = plan(layer_facts, AUTO).strategy
    outputs = layer_facts.qkvz.output_size, layer_facts.ba.output_size
    timed = tokens if tensor_parallel_size == 1 else ()  # as in an engine, where ranks have to choose alike
    rows = rows_of(first.in_proj_qkvz.weight.data, sum(outputs), timed) if strategy == FUSED else 0
    norm = first.norm

    def make() -> Any:
        layer = _constructed(model)
        fused = FusedWeight(layer.in_proj_qkvz, layer.in_proj_ba, rows) if strategy == FUSED else None
        layer.gdn = Gdn(strategy, fused)
        _load(layer, model.engine)
        return layer

    def batch(layer: Any, tokens: int) -> Any:
        scratch: Any = ScratchLayer(layer, tokens + 1, tokens)
        scratch.gdn = Gdn(strategy, layer.gdn.fused, decode=scratch.gdn.decode)
        scratch.norm.weight = norm.weight
        scratch.indices = 1 + torch.randperm(tokens, dtype=torch.int32, device=norm.weight.device)  # 0 is padding
        return scratch

    project = {**WAYS, FUSED: lambda layer, hidden_states: layer.gdn.fused.project(hidden_states)}
    compiled = torch.compile(norm.forward_native, dynamic=True)  # as in the engine's graph
    methods = f"{layer_facts.qkvz.linear_method} and {layer_facts.ba.linear_method}"
    return Model(
        Shape(name, model.shape.hidden_size, *outputs, tensor_parallel_size),
        f"{methods}, recurrent state in {decode_facts.dtypes[2]}",
        strategy,
        ways(strategy, project, layer_class(), compiled),
        make,
        batch,
    )


def _constructed(model: Configured) -> Any:
    model.engine.compilation_config.static_forward_context.clear()  # which has each name once
    with torch.device(model.engine.device_config.device):
        return layer_class()(
            config=model.engine.model_config.hf_text_config,
            vllm_config=model.engine,
            prefix=model.prefix(model.shape.layers[0]),
            gqa_interleaved_layout=model.interleaved,
        )


def _load(layer: Any, engine: Any) -> None:
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.model_executor.model_loader.utils import process_weights_after_loading

    get_model_loader(engine.load_config).load_weights(layer, engine.model_config)
    process_weights_after_loading(layer, engine.model_config, torch.device(engine.device_config.device))
