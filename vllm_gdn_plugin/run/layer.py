"""The layer that takes the place of vLLM's GDN layer: the stock forward, on projections computed beforehand."""

from collections.abc import Callable
from typing import Any

import torch
from vllm.utils.torch_utils import _encode_layer_name

import vllm_gdn_plugin.run.dual_stream  # noqa: F401  registers torch.ops.vllm_gdn_plugin
from vllm_gdn_plugin.decide.plan import FUSED, SERIAL
from vllm_gdn_plugin.run.fused import release_replaced


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


def project(layer: Any, hidden_states: torch.Tensor) -> Any:
    """What the stock forward runs on: the layer itself where its plan is serial, else its stand-in."""
    if layer.gdn_strategy == SERIAL:
        return layer
    how = project_in_one if layer.gdn_strategy == FUSED else project_side_by_side
    return ProjectedLayer(layer, *how(layer, hidden_states))


def project_in_one(layer: Any, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both projections of ``hidden_states`` (num_tokens, hidden_size), as views of one result."""
    padding = layer.gdn_padding
    sizes = layer.in_proj_qkvz.output_size_per_partition, layer.in_proj_ba.output_size_per_partition
    both = torch.ops.vllm_gdn_plugin.gdn_fused_in_proj(
        hidden_states, sum(sizes) + padding, _encode_layer_name(layer.prefix)
    )
    qkvz, ba, _ = both.split([*sizes, padding], dim=-1)
    return qkvz, ba


def project_side_by_side(layer: Any, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both projections of ``hidden_states`` (num_tokens, hidden_size), ``in_proj_ba`` beside ``in_proj_qkvz``, which
    stays what it is in stock vLLM, a part of the compiled graph."""
    ops, name = torch.ops.vllm_gdn_plugin, _encode_layer_name(layer.prefix)
    ops.gdn_in_proj_fork(hidden_states, name)
    qkvz, _ = layer.in_proj_qkvz(hidden_states)
    ba = ops.gdn_in_proj_join(hidden_states, qkvz, layer.in_proj_ba.output_size_per_partition, name)
    return qkvz, ba


def make_layer_class(stock: Any, adopt: Callable[[Any], None]) -> Any:
    """A subclass of vLLM's GDN layer class ``stock``, for every supported release.

    Args:
        stock: the class whose source has passed the contract.
        adopt: called on each new layer; sets ``gdn_strategy`` and what that strategy needs.
    """

    class GdnPluginLayer(stock):  # type: ignore[misc]
        is_gdn_plugin = True

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            release_replaced()
            super().__init__(*args, **kwargs)
            adopt(self)

        # The stock function is called through its class: Dynamo does not trace super().forward_cuda.__func__.
        def forward_cuda(self, hidden_states: torch.Tensor, *output: torch.Tensor) -> Any:
            return stock.forward_cuda(project(self, hidden_states), hidden_states, *output)

        if hasattr(stock, "forward_cpu"):

            def forward_cpu(self, hidden_states: torch.Tensor, *output: torch.Tensor) -> Any:
                return stock.forward_cpu(project(self, hidden_states), hidden_states, *output)

    GdnPluginLayer.__qualname__ = GdnPluginLayer.__name__ = f"GdnPlugin{stock.__name__}"
    return GdnPluginLayer
