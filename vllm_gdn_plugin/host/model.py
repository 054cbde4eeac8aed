"""What vLLM will build for a model, asked of its own configuration: without weights, and without using a GPU."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from textwrap import shorten
from types import SimpleNamespace
from typing import Any

from vllm_gdn_plugin.decide.checkpoint import EngineFlags, GdnShape, ModelFacts, Undecidable, Unreadable, gdn_shape
from vllm_gdn_plugin.decide.contract import GDN_CLASSES
from vllm_gdn_plugin.decide.decode import DecodeFacts
from vllm_gdn_plugin.decide.plan import LayerFacts
from vllm_gdn_plugin.host import facts, layers
from vllm_gdn_plugin.host.plugins import PLUGINS, plugins_without_ours

INTERLEAVED = "Qwen3NextForCausalLM"
"""The model class whose projections are one part each; in the others q, k, v, z, b and a are parts of their own."""

LAYERS_BELOW = {
    INTERLEAVED: "model",
    "Qwen3_5ForCausalLMBase": "model",
    "Qwen3_5ForConditionalGeneration": "language_model.model",
    "MiniCPMV4_6ForConditionalGeneration": "language_model.model",
}
"""Where the decoder layers are in the model classes that build vLLM's GDN layer, and in those derived from them.
Qwen4-Exp is left out: it swaps linear methods after construction, by GPU and shape."""


def model_facts(
    model: str, directory: Path, revision: str | None, flags: EngineFlags, platform: str, decode: bool
) -> ModelFacts:
    """The facts about the GDN layers of the model whose config.json is in ``directory``.

    vLLM makes the engine's configuration, resolves the model's class, and its quantisation config chooses the linear
    method of each projection, by the name the projection has in that class. Another plugin's models and formats count;
    this plugin is not loaded.

    Args:
        model: the directory, or the Hub id that it is a snapshot of: headers of weights that it lacks are asked for.
        decode: whether to tell of their decode, too; the contract of the decode kernel has to hold.

    Raises:
        Unreadable: it is no model with GDN layers, or its heads cannot be split so many ways.
        Undecidable: vLLM refuses the model here, or the plugin does not know the model's class.
    """
    try:
        with without_this_plugin(), _headers_of_weights(model, revision):
            return _model_facts(directory, flags, platform, decode)
    except (Unreadable, Undecidable):
        raise
    except (Exception, SystemExit) as error:
        raise Undecidable(f"vLLM does not take this model here: {in_short(error)}") from None


def _model_facts(directory: Path, flags: EngineFlags, platform: str, decode: bool) -> ModelFacts:
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs

    arguments = EngineArgs(
        model=str(directory),
        quantization=flags.quantization,
        dtype=flags.dtype,
        enforce_eager=flags.enforce_eager,
        mamba_ssm_cache_dtype=flags.mamba_ssm_cache_dtype,
        allow_deprecated_quantization=True,  # the engine says by itself that it wants this flag
        load_format="dummy",
    )
    model = configured(arguments, flags.tensor_parallel_size)
    config, shape = model.engine, model.shape
    found: dict[int, LayerFacts] = {}
    default_dtype = torch.get_default_dtype()
    torch.set_default_dtype(config.model_config.dtype)
    try:
        with set_current_vllm_config(config):
            for index in shape.layers:
                layer = _projections(config.quant_config, model.prefix(index), shape, model.interleaved, flags)
                asked = facts.layer_facts(layer, platform)
                found[index] = replace(
                    asked,
                    lora=flags.enable_lora,
                    offload=flags.offload,
                    ubatching=flags.enable_dbo,
                    weights_in_place=True,
                )
            decoding = _decode_facts(config, shape, model.interleaved, found[index], flags) if decode else None
    finally:
        torch.set_default_dtype(default_dtype)
    return ModelFacts(shape, found, decoding, layers.holder_of(GDN_CLASSES.values()))


@dataclass(frozen=True)
class Configured:
    """A model as vLLM takes it, before anything of it is built."""

    engine: Any
    """vLLM's configuration."""
    shape: GdnShape
    interleaved: bool
    below: str

    def prefix(self, layer: int) -> str:
        """The name by which vLLM builds the GDN layer of that index."""
        return f"{self.below}.layers.{layer}.linear_attn"


def configured(arguments: Any, tensor_parallel_size: int) -> Configured:
    """The model of an engine with these ``EngineArgs``; its quantisation config knows the names of its modules then.

    Raises:
        Unreadable: it is no model with GDN layers, or its heads cannot be split so many ways.
        Undecidable: the plugin does not know the model's class.

    and what vLLM raises for a model that it does not take.
    """
    from vllm.model_executor.model_loader.utils import configure_quant_config, get_model_architecture

    config = arguments.create_engine_config()
    shape = gdn_shape(config.model_config.hf_text_config.to_dict(), tensor_parallel_size)
    model_class, _ = get_model_architecture(config.model_config)
    bases = {base.__name__ for base in model_class.__mro__}
    below = next((place for name, place in LAYERS_BELOW.items() if name in bases), None)
    if below is None:
        raise Undecidable(f"the plugin does not know how {model_class.__name__} builds its layers")
    if config.quant_config is not None:
        configure_quant_config(config.quant_config, model_class)
    return Configured(config, shape, INTERLEAVED in bases, below)


def _projections(
    quant_config: Any, prefix: str, shape: GdnShape, interleaved: bool, flags: EngineFlags
) -> SimpleNamespace:
    """A GDN layer's two projections as vLLM begins to build them: with their linear methods, before their weights."""
    whole_ba = _keeps_ba_whole(quant_config, interleaved)
    linears = {}
    for name, outputs, parts in (
        ("in_proj_qkvz", shape.qkvz, flags.tensor_parallel_size),
        ("in_proj_ba", shape.ba, 1 if whole_ba else flags.tensor_parallel_size),
    ):
        sizes = [sum(outputs)] if interleaved else list(outputs)
        linears[name] = _linear(quant_config, f"{prefix}.{name}", shape.hidden_size, sizes, parts)
    return SimpleNamespace(**linears)


def _linear(quant_config: Any, prefix: str, hidden_size: int, output_sizes: list[int], parts: int) -> Any:
    from vllm.model_executor.layers.linear import LinearBase, MergedColumnParallelLinear

    linear = MergedColumnParallelLinear.__new__(MergedColumnParallelLinear)
    # What the subclasses' constructors set before and after LinearBase's, which chooses the linear method.
    vars(linear).update(
        output_sizes=output_sizes,
        input_size_per_partition=hidden_size,
        output_size_per_partition=sum(output_sizes) // parts,
        output_partition_sizes=[size // parts for size in output_sizes],
        gather_output=False,
        bias=None,
    )
    # disable_tp: there are no process groups here to ask for ranks.
    LinearBase.__init__(
        linear, hidden_size, sum(output_sizes), quant_config=quant_config, prefix=prefix, disable_tp=True
    )
    return linear


def _keeps_ba_whole(quant_config: Any, interleaved: bool) -> bool:
    """Whether every tensor-parallel rank has all of ``in_proj_ba``, as vLLM's layer class decides; 0.20's doesn't."""
    rule = getattr(layer_class(), "maybe_disable_tp", None)
    return bool(rule and rule(SimpleNamespace(gqa_interleaved_layout=interleaved), quant_config))


def layer_class() -> Any:
    """vLLM's class of the layer, which the model's module has imported."""
    return next(filter(None, (getattr(sys.modules.get(module), name, None) for module, name in GDN_CLASSES.items())))


def _decode_facts(
    config: Any, shape: GdnShape, interleaved: bool, facts_of_layer: LayerFacts, flags: EngineFlags
) -> DecodeFacts:
    """Asked of what the constructor of vLLM's layer, in 0.28 and later, would set and the decode depends on."""
    from vllm import envs

    text = config.model_config.hf_text_config
    gate = getattr(text, "output_gate_type", "silu")
    norm = SimpleNamespace(
        activation="silu" if gate == "swish" else gate,
        group_size=None,
        norm_before_gate=True,
        weight=SimpleNamespace(dtype=config.model_config.dtype),
    )
    layer = SimpleNamespace(
        model_config=config.model_config,
        cache_config=config.cache_config,
        gqa_interleaved_layout=interleaved,
        head_k_dim=shape.key_dim,
        head_v_dim=shape.value_dim,
        conv_kernel_size=text.linear_conv_kernel_dim,
        conv1d=SimpleNamespace(bias=None),
        activation=text.hidden_act,
        norm=norm,
        enable_packed_recurrent_decode=envs.VLLM_ENABLE_FLA_PACKED_RECURRENT_DECODE,
    )
    layer.get_state_dtype = partial(layer_class().get_state_dtype, layer)
    found = facts.decode_facts(layer, facts_of_layer)
    return replace(found, speculation=flags.speculative_config is not None)


@contextmanager
def without_this_plugin() -> Iterator[None]:
    """vLLM's configuration loads the general plugins: let it be all but this one, whose part is told by its rules."""
    before = os.environ.get(PLUGINS)
    os.environ[PLUGINS] = plugins_without_ours(os.environ)
    try:
        yield
    finally:
        del os.environ[PLUGINS]
        if before is not None:
            os.environ[PLUGINS] = before


@contextmanager
def _headers_of_weights(model: str, revision: str | None) -> Iterator[None]:
    """For formats (AWQ, GPTQ) whose config does not list the quantised modules, vLLM looks for them in the headers of
    the weights; where it finds none it takes all for quantised, silently. Here that is an error.

    Raises:
        Undecidable: they were needed, and could not be read.
    """
    from vllm.model_executor.layers.quantization import get_quantization_config

    get_quantization_config("awq")  # imports the modules of all formats
    name = "get_safetensors_params_metadata"
    formats = get_quantization_config.__module__
    modules = [m for n, m in list(sys.modules.items()) if n.startswith(formats) and name in vars(m)]
    originals = [getattr(module, name) for module in modules]

    def read(directory: str, **revisions: Any) -> Any:
        local = Path(model).exists()
        headers = originals[0](directory, **revisions) if local else originals[0](model, revision=revision)
        if not headers:
            raise Undecidable(
                "its configuration does not list the quantised modules, and there are no headers of weights to tell"
                f" them by: name a directory that has the weights ({model} gives none)"
            )
        return headers

    for module in modules:
        setattr(module, name, read)
    try:
        yield
    finally:
        for module, original in zip(modules, originals, strict=True):
            setattr(module, name, original)


def in_short(error: BaseException) -> str:
    """Why vLLM raised it, in one line; pydantic puts a class before it and a link behind it."""
    errors = getattr(error, "errors", None)
    text = errors()[0]["msg"] if callable(errors) else f"{type(error).__name__}: {error}"
    return shorten(text.removeprefix("Value error, "), 300, placeholder=" ...")
