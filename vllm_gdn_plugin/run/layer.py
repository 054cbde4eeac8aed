"""The layer that vLLM builds in place of its GDN layer: the stock forward, on projections computed beforehand."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from vllm_gdn_plugin.decide.plan import DUAL_STREAM, FUSED, SERIAL
from vllm_gdn_plugin.report import warn_once
from vllm_gdn_plugin.run.decode import Decode, forward_packed, run_core
from vllm_gdn_plugin.run.dual_stream import MOST_OVERLAPPED, project_side_by_side
from vllm_gdn_plugin.run.fused import FusedWeight
from vllm_gdn_plugin.tune.choose import at

NOT_IN_PLACE = "a GDN layer is no longer fused and runs as in stock vLLM; restart to fuse it again"


@dataclass
class Gdn:
    """What the plugin keeps on a layer, as ``layer.gdn``."""

    strategy: str = SERIAL
    fused: FusedWeight | None = None
    """Of a layer that is fused, or was when it was constructed."""
    plain_gemm: bool = False
    """vLLM runs ``in_proj_ba`` by ``F.linear``, with the weight as it was loaded."""
    ways: Mapping[int, str] = field(default_factory=dict)
    """By captured number of tokens dual_stream or serial, where these were timed."""

    decode: Decode | None = None
    """The decode kernel of this layer, where it is on."""

    def overlaps(self, num_tokens: int) -> bool:
        """Whether dual_stream overlaps a captured batch of this size."""
        return num_tokens <= MOST_OVERLAPPED and at(self.ways, num_tokens, DUAL_STREAM) == DUAL_STREAM

    def __deepcopy__(self, memo: Any) -> "Gdn":
        return Gdn()  # a copied layer has weights of its own, and runs as in stock vLLM


class ProjectedLayer:
    """Stands in for a GDN layer whose two projections of ``hidden_states`` are already computed.

    Every other attribute is the layer's own, so vLLM's forward body runs on it unchanged, in every release.
    """

    def __init__(self, layer: Any, qkvz: torch.Tensor, ba: torch.Tensor) -> None:
        self._layer = layer
        self._qkvz = qkvz
        self._ba = ba

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)

    def in_proj_qkvz(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, None]:
        return self._qkvz, None

    def in_proj_ba(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, None]:
        return self._ba, None


def projected(layer: Any, hidden_states: torch.Tensor) -> Any:
    """``(qkvz, ba)``, by the layer's strategy."""
    gdn = layer.gdn
    if gdn.strategy == FUSED and not torch.compiler.is_compiling() and not gdn.fused.is_of(layer):
        warn_once(NOT_IN_PLACE, "a weight of its projections was replaced or moved after loading")
        gdn.strategy = SERIAL
    if gdn.strategy == FUSED:
        return gdn.fused.project(hidden_states)
    if gdn.strategy == DUAL_STREAM:
        return project_side_by_side(layer, hidden_states)
    return layer.in_proj_qkvz(hidden_states)[0], layer.in_proj_ba(hidden_states)[0]


def stand_in(layer: Any, hidden_states: torch.Tensor) -> Any:
    """What the stock forward runs on: the layer itself where its strategy is serial."""
    return layer if layer.gdn.strategy == SERIAL else ProjectedLayer(layer, *projected(layer, hidden_states))


def make_layer_class(stock: Any, adopt: Callable[[Any], None]) -> Any:
    """A subclass of vLLM's GDN layer class ``stock``, for every supported release.

    It keeps the name of ``stock``, by which other plugins look for the layer; ``is_gdn_plugin`` tells it apart.

    Args:
        stock: the class whose source has passed the contract.
        adopt: called on each new layer; sets ``gdn``, or makes the layer one of ``stock``.
    """

    class GdnPluginLayer(stock):  # type: ignore[misc]
        is_gdn_plugin = True

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            adopt(self)

        # The stock function is called through its class: Dynamo does not trace super().forward_cuda.__func__.
        def forward_cuda(self, hidden_states: torch.Tensor, *output: torch.Tensor) -> Any:
            if self.gdn.decode is not None:
                return forward_packed(self, *projected(self, hidden_states))
            return stock.forward_cuda(stand_in(self, hidden_states), hidden_states, *output)

        if hasattr(stock, "forward_cpu"):

            def forward_cpu(self, hidden_states: torch.Tensor, *output: torch.Tensor) -> Any:
                return stock.forward_cpu(stand_in(self, hidden_states), hidden_states, *output)

        if hasattr(stock, "_forward_core_fused_norm_packed"):

            def _forward_core_fused_norm_packed(self, mixed_qkvz: Any, ba: Any, core_attn_out: Any) -> None:
                run = run_core if self.gdn.decode is not None else _stock_core
                run(stock, self, mixed_qkvz, ba, core_attn_out)

    GdnPluginLayer.__name__, GdnPluginLayer.__qualname__ = stock.__name__, stock.__qualname__
    return GdnPluginLayer


def _stock_core(stock: Any, layer: Any, mixed_qkvz: Any, ba: Any, core_attn_out: Any) -> None:
    stock._forward_core_fused_norm_packed(layer, mixed_qkvz, ba, core_attn_out)


def become(layer: Any, layer_class: Any) -> None:
    """Make a layer one of ``layer_class``; vLLM's constructor has bound one of the forward methods to it."""
    layer.__class__ = layer_class
    bound = vars(layer).get("_forward_method")
    if bound is not None:
        layer._forward_method = getattr(layer, bound.__name__)
