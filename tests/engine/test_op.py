"""The ops in vLLM's and PyTorch's own terms: schema, fake, and what a compiled stack of layers is made of."""

import weakref
from collections.abc import Callable, Collection, Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_gdn_plugin.plan import PADDED_TO

torch = pytest.importorskip("torch")
pytest.importorskip("vllm", reason="vllm isn't installed: run `python3.11 dev.py test`")

HIDDEN, QKVZ, BA, TOKENS = 32, 48, 4, 5
WIDE = 12344
"""Outputs of an ``in_proj_qkvz`` that leave room for every padded way."""


@pytest.fixture
def layers(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., list[str]]]:
    """`layers(n, qkvz, ways)` makes n layers with plain linear projections, known to the forward context by name."""
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

    def make(count: int, qkvz_size: int = QKVZ, ways: Collection[str] = ()) -> list[str]:
        torch.manual_seed(0)
        for i in range(count):
            qkvz, ba = (Projection(HIDDEN, n, bias=False).requires_grad_(False) for n in (qkvz_size, BA))
            layer = SimpleNamespace(
                in_proj_qkvz=qkvz, in_proj_ba=ba, gdn_safe_pair=True, gdn_max_tokens=64, gdn_tuned={}
            )
            layer.gdn_fused = FusedProjections(qkvz, ba, ways)
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


def test_opcheck_of_a_layer_that_is_padded(layers: Callable[..., list[str]]) -> None:
    """Without the tests that compare results: the padding holds anything."""
    from vllm.utils.torch_utils import _encode_layer_name

    (name,) = layers(1, WIDE, PADDED_TO)
    arguments = torch.randn(TOKENS, HIDDEN), 12800, _encode_layer_name(name)
    op = torch.ops.vllm_gdn_plugin.gdn_fused_in_proj.default
    torch.library.opcheck(op, arguments, test_utils=["test_schema", "test_faketensor"])


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


FAULTS: dict[str, tuple[str, str, str]] = {
    "why_serial": ("dual_stream", "vllm_gdn_plugin.op.why_serial", "dual_stream failed and runs serially"),
    "the stream": ("dual_stream", "vllm_gdn_plugin.op.aux_stream", "dual_stream failed and runs serially"),
    "the weights' place": ("fused", "vllm_gdn_plugin.fused._whereabouts", "a GDN layer goes back to serial"),
}
"""A step of the plugin inside an op: the strategy, what fails, what is said."""


def call(strategy: str, name: str, x: Any) -> Any:
    """Both projections by an op, without fused's padding."""
    from vllm.utils.torch_utils import _encode_layer_name

    ops = torch.ops.vllm_gdn_plugin
    if strategy == "dual_stream":
        return ops.gdn_in_proj(x, QKVZ, BA, _encode_layer_name(name))
    both = ops.gdn_fused_in_proj(x, -(QKVZ + BA) % 16 + QKVZ + BA, _encode_layer_name(name))
    return both.split([QKVZ, BA, both.shape[1] - QKVZ - BA], dim=-1)[:2]


@pytest.mark.parametrize("good_calls", [0, 3], ids=["first call", "later call"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_ours_in_an_op_is_serial_and_said_once(
    layers: Callable[[int], list[str]],
    warnings: list[str],
    fault: str,
    good_calls: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from vllm_gdn_plugin import op

    strategy, step, said = FAULTS[fault]
    names = layers(2)
    known = [op.host.layer_by_name(name) for name in names]
    if fault == "the stream":  # it is only asked for while a graph is captured
        monkeypatch.setattr(op, "why_serial", lambda *args: None)
        monkeypatch.setattr(torch.cuda, "Event", lambda: None)
        monkeypatch.setattr(op, "maybe_execute_in_parallel", lambda one, other, *events: (one(), other()))
    x = torch.randn(TOKENS, HIDDEN)
    for name in names[:good_calls]:
        call(strategy, name, x)

    def fail(*args: Any) -> Any:
        raise ZeroDivisionError(f"planted\n{len(calls)}")

    calls: list[str] = []
    monkeypatch.setattr(step, fail)
    for _ in range(3):
        for name, layer in zip(names, known, strict=True):
            calls.append(name)
            want = (layer.in_proj_qkvz(x)[0], layer.in_proj_ba(x)[0])
            for one, other in zip(call(strategy, name, x), want, strict=True):
                assert torch.equal(one, other)
    (line,) = warnings
    assert said in line
    assert line.endswith("unexpected ZeroDivisionError: planted 1")


@pytest.mark.parametrize("tuned", ["fused", "dual_stream", "serial", None])
@pytest.mark.parametrize("capturing", [False, True])
def test_a_fused_layer_takes_two_gemms_only_in_a_graph_of_a_size_that_was_timed_so(
    layers: Callable[[int], list[str]], capturing: bool, tuned: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm_gdn_plugin import op

    (name,) = layers(1)
    layer = op.host.layer_by_name(name)
    layer.gdn_tuned = {TOKENS: tuned} if tuned else {TOKENS + 1: "serial"}
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    x = torch.randn(TOKENS, HIDDEN)
    want = (layer.in_proj_qkvz(x)[0], layer.in_proj_ba(x)[0])
    apart: list[bool] = []
    project = op.project_fused_apart
    monkeypatch.setattr(op, "project_fused_apart", lambda *call: apart.append(True) or project(*call))
    for one, other in zip(call("fused", name, x), want, strict=True):
        torch.testing.assert_close(one, other)
    assert bool(apart) == (capturing and tuned in ("dual_stream", "serial"))
    layer.in_proj_ba.weight.data = layer.in_proj_ba.weight.data * 2
    for one, other in zip(call("fused", name, x), (want[0], want[1] * 2), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("tuned", ["fused", *PADDED_TO, "serial", None])
@pytest.mark.parametrize("capturing", [False, True])
def test_a_padded_gemm_is_run_only_in_a_graph_of_a_size_that_was_timed_so(
    layers: Callable[..., list[str]], capturing: bool, tuned: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The result is as wide in each case: it is one graph that vLLM compiles."""
    from vllm.utils.torch_utils import _encode_layer_name

    from vllm_gdn_plugin import op
    from vllm_gdn_plugin.fused import FusedProjections

    (name,) = layers(1, WIDE, PADDED_TO)
    layer = op.host.layer_by_name(name)
    layer.gdn_tuned = {TOKENS: tuned} if tuned else {TOKENS + 1: "fused_to_128"}
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    ran: list[str] = []
    apply = FusedProjections.apply
    monkeypatch.setattr(
        FusedProjections, "apply", lambda fused, x, way="fused": ran.append(way) or apply(fused, x, way)
    )
    x = torch.randn(TOKENS, HIDDEN)
    width = WIDE + BA + layer.gdn_fused.padding
    both = torch.ops.vllm_gdn_plugin.gdn_fused_in_proj(x, width, _encode_layer_name(name))
    assert both.shape == (TOKENS, width) == (TOKENS, 12800)
    taken = tuned if capturing and tuned else "fused"
    assert ran == ([] if taken == "serial" else [taken])
    want = torch.cat([layer.in_proj_qkvz(x)[0], layer.in_proj_ba(x)[0]], -1)
    torch.testing.assert_close(both[:, : WIDE + BA], want)


@pytest.mark.parametrize("tuned", [{TOKENS: "serial"}, {TOKENS: "dual_stream"}, {TOKENS + 1: "serial"}, {}], ids=str)
def test_side_by_side_unless_this_very_size_was_timed_as_slower(
    layers: Callable[[int], list[str]], tuned: dict[int, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm_gdn_plugin import op
    from vllm_gdn_plugin.overlap import StaysSerial

    (name,) = layers(1)
    layer = op.host.layer_by_name(name)
    layer.gdn_tuned = tuned
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    on_a_gpu: Any = SimpleNamespace(is_cuda=True, size=torch.empty(TOKENS, HIDDEN).size)
    slower = tuned.get(TOKENS) == "serial"
    assert op.why_serial(layer, on_a_gpu) is (StaysSerial.TIMED_SLOWER if slower else None)


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Stands in for the module of the narrow kernel, which needs Triton: its results are twice what they should be."""
    import vllm_gdn_plugin

    module = SimpleNamespace(linear=lambda x, weight: 2 * torch.nn.functional.linear(x, weight))
    monkeypatch.setattr(vllm_gdn_plugin, "narrow", module, raising=False)
    return module


@pytest.mark.parametrize("runs", [True, False])
@pytest.mark.parametrize("overlaps", [True, False])
@pytest.mark.parametrize("tuned", [{TOKENS: "narrow_kernel"}, {TOKENS: "dual_stream"}, {TOKENS + 1: "narrow_kernel"}])
def test_the_narrow_kernel_is_taken_where_it_was_timed_as_faster_and_the_call_overlaps(
    layers: Callable[[int], list[str]],
    narrow: Any,
    tuned: dict[int, str],
    overlaps: bool,
    runs: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is enqueued first, on the auxiliary stream, and fork and join are where they belong."""
    from vllm_gdn_plugin import op

    (name,) = layers(1)
    layer = op.host.layer_by_name(name)
    layer.gdn_tuned = tuned
    done: list[str] = []

    def event(name: str) -> Any:
        return SimpleNamespace(record=lambda: done.append(f"{name}.record"), wait=lambda: done.append(f"{name}.wait"))

    if overlaps:
        monkeypatch.setattr(op, "fork_and_join", lambda *args: (event("fork"), event("join"), "the stream"))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext(done.append(stream)))
    monkeypatch.setattr(op, "maybe_execute_in_parallel", lambda one, other, *events: (one(), other()))
    if not runs:
        monkeypatch.setattr(narrow, "linear", lambda x, weight: int("no"))
    x = torch.randn(TOKENS, HIDDEN)
    want = layer.in_proj_qkvz(x)[0], layer.in_proj_ba(x)[0]
    for linear in ("qkvz", "ba"):
        getattr(layer, f"in_proj_{linear}").register_forward_hook(lambda *args, linear=linear: done.append(linear))
    qkvz, ba = call("dual_stream", name, x)
    taken = overlaps and tuned.get(TOKENS) == "narrow_kernel"
    assert torch.equal(qkvz, want[0])
    assert torch.equal(ba, 2 * want[1] if taken and runs else want[1])
    inside = [] if runs else ["ba"]
    order = ["fork.record", "the stream", "fork.wait", *inside, "join.record", "qkvz", "join.wait"]
    assert done == (order if taken else ["qkvz", "ba"])


def test_a_narrow_kernel_that_fails_is_replaced_by_the_projection_and_said_once(
    layers: Callable[[int], list[str]], warnings: list[str], narrow: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm_gdn_plugin import op

    (name,) = layers(1)
    layer = op.host.layer_by_name(name)
    x = torch.randn(TOKENS, HIDDEN)

    def fail(*args: Any) -> Any:
        raise ZeroDivisionError("planted")

    monkeypatch.setattr(narrow, "linear", fail)
    for _ in range(3):
        qkvz, ba = op.project_narrow(layer, x, op.SERIALLY)
        assert torch.equal(qkvz, layer.in_proj_qkvz(x)[0])
        assert torch.equal(ba, layer.in_proj_ba(x)[0])
    (line,) = warnings
    assert line.endswith("narrow_kernel failed and is left out: unexpected ZeroDivisionError: planted")


@pytest.mark.parametrize("projection", ["in_proj_qkvz", "in_proj_ba"])
@pytest.mark.parametrize(
    ("strategy", "fault"),
    [("dual_stream", None), ("dual_stream", "why_serial"), ("fused", None), ("fused", "the weights' place")],
)
def test_what_a_projection_raises_is_the_host_s(
    layers: Callable[[int], list[str]], warnings: list[str], strategy: str, fault: str | None, projection: str
) -> None:
    """The very error, also where a step of ours fails besides; the next call is right again."""
    from vllm_gdn_plugin import op

    (name,) = layers(1)
    linear = getattr(op.host.layer_by_name(name), projection)
    # fused computes both projections with the linear method of in_proj_qkvz
    owner, step = (linear.quant_method, "apply") if (strategy, fault) == ("fused", None) else (linear, "forward")
    error = torch.OutOfMemoryError("planted by the test")
    x = torch.randn(TOKENS, HIDDEN)
    want = call(strategy, name, x)

    def run_out(*args: Any) -> Any:
        raise error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, step, run_out)
        if fault is not None:
            patch.setattr(FAULTS[fault][1], lambda *args: 1 / 0)
        with pytest.raises(torch.OutOfMemoryError) as caught:
            call(strategy, name, x)
    assert caught.value is error
    assert len(warnings) == (fault is not None)
    for one, other in zip(call(strategy, name, x), want, strict=True):
        torch.testing.assert_close(one, other)


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


class Stopwatch:
    """In place of CudaTimer: runs the work once, and says that it took 256 us."""

    min_layers = 16

    def prepare(self, work: Callable[[], Any]) -> tuple[Any, Any]:
        return None, work()

    def measure(self, prepared: dict[str, Any], rounds: int, warm_up: int) -> dict[str, list[float]]:
        return {name: [256.0] * rounds for name in prepared}


@pytest.fixture
def timing(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module that times, on a CPU."""
    from vllm_gdn_plugin import ways

    monkeypatch.setattr(ways, "CudaTimer", Stopwatch)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=1))
    monkeypatch.setattr(ways.host, "unchanged_stream", nullcontext)
    for name in ("prepare_aux_stream", "release_workspaces"):
        monkeypatch.setattr(ways.host, name, lambda: None)
    return ways


def case_planned(strategy: str) -> Any:
    from vllm_gdn_plugin.plan import ProjectionFacts
    from vllm_gdn_plugin.tuning import Case

    one = ProjectionFacts("UnquantizedLinearMethod", "float32", 1)
    return Case("a GPU", "", "", "", "", HIDDEN, one, one, "", False, (strategy, "serial"))


@pytest.mark.parametrize(("planned", "turns"), [("dual_stream", 16), ("fused", 8)])
def test_what_is_timed_is_as_many_layers_as_a_graph_needs_each_at_other_addresses(
    layers: Callable[[int], list[str]], timing: Any, monkeypatch: pytest.MonkeyPatch, planned: str, turns: int
) -> None:
    from vllm_gdn_plugin import op

    made = [op.host.layer_by_name(name) for name in layers(6)]
    ran: list[tuple[Any, int]] = []

    def record(layer: Any, hidden_states: torch.Tensor) -> None:
        ran.append((layer, torch.empty_like(hidden_states, dtype=torch.uint8).data_ptr()))

    monkeypatch.setitem(timing.WAYS, planned, {planned: record, "serial": lambda layer, x: None})
    times = timing.timed(made, case_planned(planned), [4, 64])
    assert times == {tokens: {planned: 256 / turns, "serial": 256 / turns} for tokens in (4, 64)}
    assert len(ran) == 2 * turns
    for graph in (ran[:turns], ran[turns:]):
        assert [layer for layer, _ in graph] == turns // 4 * [made[n] for n in (0, 2, 1, 3)], (
            "in turn, neighbours apart"
        )
        addresses = {address for _, address in graph}
        assert len(addresses) > turns // 2, "a CPU's malloc may give one out again before all are used"


@pytest.mark.parametrize(("count", "fills", "turns"), [(12, 10, 10), (12, 100, 12), (20, 100, 16), (2, 100, 8)])
def test_so_many_layers_are_timed_that_a_large_cache_does_not_hold_them(
    layers: Callable[[int], list[str]], timing: Any, monkeypatch: pytest.MonkeyPatch, count: int, fills: int, turns: int
) -> None:
    from vllm_gdn_plugin import op

    made = [op.host.layer_by_name(name) for name in layers(count)]
    size = made[0].in_proj_qkvz.weight.nbytes
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=fills * size // 4)
    )
    ran: list[Any] = []
    monkeypatch.setitem(timing.WAYS, "fused", {"fused": lambda layer, x: ran.append(layer), "serial": lambda *_: None})
    timing.timed(made, case_planned("fused"), [4])
    assert len(ran) == turns
    assert {id(layer) for layer in ran} == {id(layer) for layer in made[:turns]}


def test_timing_that_fails_gives_back_its_memory(
    layers: Callable[[int], list[str]], timing: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm_gdn_plugin import op

    class Graph:
        """What is captured, and takes memory as long as anything refers to it."""

    graphs: list[Any] = []
    held: list[bool] = []

    def prepare(timer: Any, work: Callable[[], Any]) -> tuple[Any, Any]:
        graph = Graph()
        graphs.append(weakref.ref(graph))
        return graph, None

    def measure(timer: Any, prepared: dict[str, Any], rounds: int, warm_up: int) -> Any:
        raise ZeroDivisionError("planted")

    monkeypatch.setattr(Stopwatch, "prepare", prepare)
    monkeypatch.setattr(Stopwatch, "measure", measure)
    monkeypatch.setattr(timing.host, "release_workspaces", lambda: held.extend(graph() is not None for graph in graphs))
    made = [op.host.layer_by_name(name) for name in layers(2)]
    with pytest.raises(ZeroDivisionError, match="planted"):
        timing.timed(made, case_planned("dual_stream"), [4])
    assert held == [False, False]
