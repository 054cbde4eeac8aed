"""How vLLM builds, loads and finds a GDN layer, and how the plugin takes part in it."""

import sys
import weakref
from collections.abc import Callable, Iterable
from typing import Any


def build_in_place_of(stock: Any, ours: Any, taken: Callable[[Any], None]) -> None:
    """Have vLLM build ``ours``, a subclass of its layer class ``stock``, wherever it builds ``stock``.

    vLLM has a registry for this, ``PluggableLayer.register_oot``, which allows one replacement for a name and raises
    for a second one. A plugin that registers after this one would end the engine. So the name is left to others:
    ``stock`` gets a ``__new__`` of its own, and each construction decides. Where somebody holds the name by then, they
    keep it, and ``taken`` is told their class. Deletable once vLLM lets several plugins ask for one layer.

    Raises TypeError where ``stock`` has a ``__new__`` of its own already.
    """
    from vllm.model_executor.custom_op import PluggableLayer, op_registry_oot

    if "__new__" in vars(stock):
        raise TypeError(f"{stock.__module__}.{stock.__qualname__} has a __new__ of its own")

    def __new__(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if not args and not kwargs:  # a copy, which keeps its class
            return object.__new__(cls)
        holder = op_registry_oot.get(cls.__name__)
        if cls is not stock or holder is not None:
            if cls is stock:
                taken(holder)
            return PluggableLayer.__new__(cls, *args, **kwargs)
        return object.__new__(ours)

    __new__.is_gdn_plugin = True  # type: ignore[attr-defined]
    stock.__new__ = __new__


def holder_of(names: Iterable[str]) -> str:
    """The full name of the class that is registered to be built in place of one of these; empty for none."""
    from vllm.model_executor.custom_op import op_registry_oot

    held = [op_registry_oot[name] for name in names if name in op_registry_oot]
    return f"{held[0].__module__}.{held[0].__qualname__}" if held else ""


def is_built_in_place_of(stock: Any) -> bool:
    """Whether :func:`build_in_place_of` has changed this class."""
    new = vars(stock).get("__new__")
    return bool(getattr(getattr(new, "__func__", new), "is_gdn_plugin", False))


def withdraw_from(stock: Any) -> None:
    """Take back what :func:`build_in_place_of` has done."""
    if is_built_in_place_of(stock):
        del stock.__new__


def after_loading(layer: Any, action: Callable[[Any], None]) -> Any:
    """A module for ``layer`` to hold, whose ``quant_method`` vLLM's loaders call once the weights are in place.

    All but tensorizer's, after which a layer runs as planned and the report is left out. It has no parameters: vLLM
    excuses those below a module with such a method where a checkpoint lacks them, so the layer itself must have none.
    """
    import torch
    from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

    class AfterLoading(QuantizeMethodBase):  # type: ignore[misc]
        supports_pre_processed_weights = True
        requires_device_loading = False

        def create_weights(self, layer: Any, *args: Any, **kwargs: Any) -> None:
            """The layer itself has no weights of ours."""

        def apply(self, layer: Any, *args: Any, **kwargs: Any) -> Any:
            raise NotImplementedError("a GDN layer is called by its forward")

        def process_weights_after_loading(self, layer: Any) -> None:
            holder = known()
            if holder is not None and vars(holder).get("gdn_after_loading", layer) is layer:
                action(holder)

    known = weakref.ref(layer)  # the layer holds the module, which must not hold the layer
    module = torch.nn.Module()
    module.quant_method = AfterLoading()
    return module


def hold_first(layer: Any, module: Any) -> None:
    """Have ``layer`` hold the module of :func:`after_loading` before all others: in this order vLLM comes to them, and
    a projection that it has come to may have its weight packed."""
    layer.gdn_after_loading = module
    modules = vars(layer).get("_modules", {})
    for name in [name for name in modules if modules[name] is not module]:
        modules[name] = modules.pop(name)


def attention_metadata(layer: Any) -> Any | None:
    """The layer's metadata in the current forward pass; None in a dry run."""
    metadata = sys.modules["vllm.forward_context"].get_forward_context().attn_metadata
    return metadata.get(layer.prefix) if isinstance(metadata, dict) else None


def in_piecewise_graph() -> bool:
    """Whether this forward pass captures or replays piecewise CUDA graphs. One that is captured as a whole is known by
    FULL or, in the V2 model runner, by NONE."""
    context = sys.modules["vllm.forward_context"].get_forward_context()
    return getattr(context.cudagraph_runtime_mode, "name", "") == "PIECEWISE"


def layer_by_name(layer_name: Any) -> Any:
    """The layer that a custom op was given the name of, in the current forward pass, for which vLLM has imported both
    modules: to import from them at each call would cost more than all the rest of it."""
    name = sys.modules["vllm.utils.torch_utils"]._resolve_layer_name(layer_name)
    return sys.modules["vllm.forward_context"].get_forward_context().no_compile_layers[name]
