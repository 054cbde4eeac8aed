"""The ops in vLLM's and PyTorch's own terms: schema, fake, and what a compiled stack of layers is made of."""

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("vllm", reason="vllm isn't installed: run `python3.11 dev.py test`")

HIDDEN, QKVZ, BA, TOKENS = 32, 48, 4, 5


@pytest.fixture
def layers(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], list[str]]]:
    """`layers(n)` makes n layers with plain linear projections, known to the forward context by name."""
    import vllm_gdn_plugin.op  # noqa: F401
    from vllm_gdn_plugin import host
    from vllm_gdn_plugin.fused import FusedProjections

    class Projection(torch.nn.Linear):
        quant_method = SimpleNamespace(
            apply=lambda layer, x: torch.nn.functional.linear(x, layer.weight),
            process_weights_after_loading=lambda layer: None,
        )

        def forward(self, x: Any) -> Any:
            return super().forward(x), None

    known: dict[str, Any] = {}

    def layer_by_name(name: Any) -> Any:
        return known[getattr(name, "value", name)]

    monkeypatch.setattr(host, "layer_by_name", layer_by_name)

    def make(count: int) -> list[str]:
        torch.manual_seed(0)
        for i in range(count):
            qkvz, ba = (Projection(HIDDEN, n, bias=False).requires_grad_(False) for n in (QKVZ, BA))
            layer = SimpleNamespace(in_proj_qkvz=qkvz, in_proj_ba=ba, gdn_safe_pair=True, gdn_max_tokens=64)
            layer.gdn_fused = FusedProjections(qkvz, ba)
            known[f"model.layers.{i}"] = layer
        return list(known)

    yield make
    torch._dynamo.reset()


def test_opcheck(layers: Callable[[int], list[str]]) -> None:
    from vllm.utils.torch_utils import _encode_layer_name

    (name,) = layers(1)
    x = torch.randn(TOKENS, HIDDEN)
    ops = torch.ops.vllm_gdn_plugin
    torch.library.opcheck(ops.gdn_in_proj.default, (x, QKVZ, BA, _encode_layer_name(name)))
    padded = -(QKVZ + BA) % 16 + QKVZ + BA
    torch.library.opcheck(ops.gdn_fused_in_proj.default, (x, padded, _encode_layer_name(name)))


@pytest.mark.parametrize("num_tokens", [2, 5, 64])
def test_the_fake_foretells_shape_dtype_device_and_strides(layers: Callable[[int], list[str]], num_tokens: int) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from vllm.utils.torch_utils import _encode_layer_name

    (name,) = layers(1)
    x = torch.randn(num_tokens, HIDDEN)
    real = torch.ops.vllm_gdn_plugin.gdn_in_proj(x, QKVZ, BA, _encode_layer_name(name))
    with FakeTensorMode() as mode:
        fake = torch.ops.vllm_gdn_plugin.gdn_in_proj(mode.from_tensor(x), QKVZ, BA, _encode_layer_name(name))
    for one, other in zip(real, fake, strict=True):
        assert (one.shape, one.dtype, one.device, one.stride()) == (
            other.shape,
            other.dtype,
            other.device,
            other.stride(),
        )


def test_the_outputs_alias_nothing(layers: Callable[[int], list[str]]) -> None:
    from vllm.utils.torch_utils import _encode_layer_name

    (name,) = layers(1)
    x = torch.randn(TOKENS, HIDDEN)
    outputs = torch.ops.vllm_gdn_plugin.gdn_in_proj(x, QKVZ, BA, _encode_layer_name(name))
    assert len({t.untyped_storage().data_ptr() for t in (x, *outputs)}) == 3


def test_an_error_of_the_projection_passes_through(layers: Callable[[int], list[str]]) -> None:
    from vllm.utils.torch_utils import _encode_layer_name

    (name,) = layers(1)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        torch.ops.vllm_gdn_plugin.gdn_in_proj(torch.randn(TOKENS, HIDDEN + 1), QKVZ, BA, _encode_layer_name(name))


@torch.library.custom_op("vllm_gdn_plugin_test::attention", mutates_args=())
def attention(x: torch.Tensor) -> torch.Tensor:
    """Where vLLM splits the graph."""
    return x.sin()


attention.register_fake(torch.empty_like)


def distinct_pieces(names: list[str], encode: Callable[[str], Any], op: Any) -> int:
    """How many different pieces vLLM's graph splitting leaves of a stack with one op a layer.

    Like vLLM's piecewise compilation, where attention ends each piece; two pieces count as one when their code is
    the same, constants included, because then they share an artifact.
    """
    from vllm.compilation.backends import split_graph

    class Stack(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            for name in names:
                qkvz, ba = op(x, QKVZ, BA, encode(name))
                x = attention(qkvz[:, :HIDDEN] + ba.sum(-1, keepdim=True))
            return x

    pieces: set[str] = set()

    def backend(graph: Any, example_inputs: Any) -> Any:
        _, items = split_graph(graph, ["vllm_gdn_plugin_test::attention"])
        for item in items:
            if not item.is_splitting_graph:
                nodes = item.graph.graph.nodes
                number = {node.name: f"v{i}" for i, node in enumerate(nodes)}
                code = [f"{n.op} {n.target if n.op != 'placeholder' else ''}" for n in nodes]
                code += [str([number.get(str(a), a) for a in n.args]) for n in nodes if n.op == "call_function"]
                pieces.add("\n".join(code))
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(Stack(), backend=backend, fullgraph=True)
    compiled(torch.randn(TOKENS, HIDDEN))
    return len(pieces)


def test_layers_share_their_artifacts(layers: Callable[[int], list[str]]) -> None:
    """Constant in the number of layers with a LayerName, growing with a string: the regression of vLLM #36795."""
    from vllm.utils.torch_utils import _encode_layer_name

    names = layers(8)
    by_name = torch.ops.vllm_gdn_plugin.gdn_in_proj

    @torch.library.custom_op("vllm_gdn_plugin_test::by_string", mutates_args=())
    def by_string(x: torch.Tensor, qkvz_size: int, ba_size: int, layer_name: str) -> tuple[torch.Tensor, torch.Tensor]:
        return by_name(x, qkvz_size, ba_size, _encode_layer_name(layer_name))

    by_string.register_fake(lambda x, q, b, n: (x.new_empty((x.size(0), q)), x.new_empty((x.size(0), b))))
    counts = {
        count: (
            distinct_pieces(names[:count], _encode_layer_name, by_name),
            distinct_pieces(names[:count], str, by_string),
        )
        for count in (4, 8)
    }
    assert counts[4][0] == counts[8][0]
    assert counts[8][1] - counts[4][1] == 4
