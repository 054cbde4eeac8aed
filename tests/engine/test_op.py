"""The ops in vLLM's and PyTorch's own terms: schema, fake, and what a compiled stack of layers is made of."""

import weakref
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from itertools import cycle
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_gdn_plugin.decide.plan import PADDED_TO

torch = pytest.importorskip("torch")
pytest.importorskip("vllm", reason="vllm isn't installed: run `python3.11 dev.py test`")

HIDDEN, QKVZ, BA, TOKENS = 32, 48, 4, 5
WIDE = 12344
"""Outputs of an ``in_proj_qkvz`` that leave room for every padded way."""


@pytest.fixture
def layers(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., list[str]]]:
    """`layers(n, qkvz, ways)` makes n layers with plain linear projections, known to the forward context by name."""
    import vllm_gdn_plugin.run.dual_stream  # noqa: F401
    from vllm_gdn_plugin import host
    from vllm_gdn_plugin.run.fused import FusedProjections

    class Projection(torch.nn.Linear):
        output_size_per_partition = property(lambda linear: linear.out_features)
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
            layer = SimpleNamespace(prefix=f"model.layers.{i}", in_proj_qkvz=qkvz, in_proj_ba=ba)
            layer.gdn_safe_pair, layer.gdn_max_tokens, layer.gdn_tuned = True, 64, {}
            layer.gdn_fused = FusedProjections(qkvz, ba, ways)
            layer.gdn_padding = layer.gdn_fused.padding
            known[layer.prefix] = layer
        return list(known)

    yield make
    torch._dynamo.reset()


def test_opcheck(layers: Callable[[int], list[str]]) -> None:
    from vllm.utils.torch_utils import _encode_layer_name

    (name,) = layers(1)
    x = torch.randn(TOKENS, HIDDEN)
    ops = torch.ops.vllm_gdn_plugin
    torch.library.opcheck(ops.gdn_in_proj_fork.default, (x, _encode_layer_name(name)))
    torch.library.opcheck(ops.gdn_in_proj_join.default, (x, torch.randn(TOKENS, QKVZ), BA, _encode_layer_name(name)))
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
    x, qkvz = torch.randn(num_tokens, HIDDEN), torch.randn(num_tokens, QKVZ)
    join = torch.ops.vllm_gdn_plugin.gdn_in_proj_join
    one = join(x, qkvz, BA, _encode_layer_name(name))
    with FakeTensorMode() as mode:
        other = join(mode.from_tensor(x), mode.from_tensor(qkvz), BA, _encode_layer_name(name))
    assert (one.shape, one.dtype, one.device, one.stride()) == (other.shape, other.dtype, other.device, other.stride())


def test_the_outputs_alias_nothing(layers: Callable[[int], list[str]]) -> None:
    (name,) = layers(1)
    x = torch.randn(TOKENS, HIDDEN)
    outputs = call("dual_stream", name, x)
    assert len({t.untyped_storage().data_ptr() for t in (x, *outputs)}) == 3


@pytest.fixture
def capturing(monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """`capturing()` has all calls from then on overlap, as on a GPU that captures a graph: what is done, in order."""

    def start() -> list[str]:
        from vllm_gdn_plugin.run import dual_stream as op

        done: list[str] = []
        names = cycle(("reached", "done"))

        def event() -> Any:
            name = next(names)
            return SimpleNamespace(
                record=lambda: done.append(f"{name}.record"), wait=lambda: done.append(f"{name}.wait")
            )

        monkeypatch.setattr(op, "why_serial", lambda *args: None)
        monkeypatch.setattr(op, "aux_stream", lambda: "the stream")
        monkeypatch.setattr(torch.cuda, "Event", event)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext(done.append(stream)))
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        return done

    return start


FAULTS: dict[str, tuple[str, str, str]] = {
    "why_serial": ("dual_stream", "vllm_gdn_plugin.run.dual_stream.why_serial", "dual_stream failed and runs serially"),
    "the stream": ("dual_stream", "vllm_gdn_plugin.run.dual_stream.aux_stream", "dual_stream failed and runs serially"),
    "the wait": ("dual_stream", "torch.cuda.stream", "dual_stream failed and runs serially"),
    "the weights' place": ("fused", "vllm_gdn_plugin.run.fused._whereabouts", "a GDN layer goes back to serial"),
}
"""A step of the plugin inside an op: the strategy, what fails, what is said."""


def call(strategy: str, name: str, x: Any) -> Any:
    """Both projections by the ops, without fused's padding."""
    from vllm_gdn_plugin import host
    from vllm_gdn_plugin.run.layer import project_in_one, project_side_by_side

    project = project_side_by_side if strategy == "dual_stream" else project_in_one
    return project(host.layer_by_name(name), x)


@pytest.mark.parametrize("good_calls", [0, 3], ids=["first call", "later call"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_ours_in_an_op_is_serial_and_said_once(
    layers: Callable[[int], list[str]],
    warnings: list[str],
    fault: str,
    good_calls: int,
    capturing: Callable[[], list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from vllm_gdn_plugin.run import dual_stream as op

    strategy, step, said = FAULTS[fault]
    names = layers(2)
    known = [op.host.layer_by_name(name) for name in names]
    if fault in ("the stream", "the wait"):  # which come up only while a graph is captured
        capturing()
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
    from vllm_gdn_plugin.run import dual_stream as op

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

    from vllm_gdn_plugin.run import dual_stream as op
    from vllm_gdn_plugin.run.fused import FusedProjections

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
    from vllm_gdn_plugin.decide.scratch import StaysSerial
    from vllm_gdn_plugin.run import dual_stream as op

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
    capturing: Callable[[], list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """``in_proj_ba`` is enqueued on the auxiliary stream, after ``in_proj_qkvz``, and fork and join are around both."""
    from vllm_gdn_plugin.run import dual_stream as op

    (name,) = layers(1)
    layer = op.host.layer_by_name(name)
    layer.gdn_tuned = tuned
    if not runs:
        monkeypatch.setattr(narrow, "linear", lambda x, weight: int("no"))
    x = torch.randn(TOKENS, HIDDEN)
    want = layer.in_proj_qkvz(x)[0], layer.in_proj_ba(x)[0]
    done = capturing() if overlaps else []
    for linear in ("qkvz", "ba"):
        getattr(layer, f"in_proj_{linear}").register_forward_hook(lambda *args, linear=linear: done.append(linear))
    qkvz, ba = call("dual_stream", name, x)
    taken = overlaps and tuned.get(TOKENS) == "narrow_kernel"
    assert torch.equal(qkvz, want[0])
    assert torch.equal(ba, 2 * want[1] if taken and runs else want[1])
    inside = [] if taken and runs else ["ba"]
    on_two_streams = ["the stream", "reached.wait", "the stream", *inside, "done.record", "done.wait"]
    assert done == (["reached.record", "qkvz", *on_two_streams] if overlaps else ["qkvz", "ba"])


def test_a_narrow_kernel_that_fails_is_replaced_by_the_projection_and_said_once(
    layers: Callable[[int], list[str]], warnings: list[str], narrow: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm_gdn_plugin.run import dual_stream as op

    (name,) = layers(1)
    layer = op.host.layer_by_name(name)
    x = torch.randn(TOKENS, HIDDEN)

    def fail(*args: Any) -> Any:
        raise ZeroDivisionError("planted")

    monkeypatch.setattr(narrow, "linear", fail)
    for _ in range(3):
        assert torch.equal(op.project_ba_narrow_or_not(layer, x), layer.in_proj_ba(x)[0])
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
    from vllm_gdn_plugin.run import dual_stream as op

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
    (name,) = layers(1)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        call("dual_stream", name, torch.randn(TOKENS, HIDDEN + 1))


IN_VAIN: dict[str, Callable[[Any, Any, Any, Any], Any]] = {
    "no fork": lambda fork, join, names, x: join(names[0], x),
    "a copy": lambda fork, join, names, x: (fork(names[0], x), join(names[0], x.clone())),
    "another layer": lambda fork, join, names, x: (fork(names[1], x), join(names[0], x)),
    "joined before": lambda fork, join, names, x: (fork(names[0], x), join(names[0], x), join(names[0], x)),
    "another thread": lambda fork, join, names, x: (
        ThreadPoolExecutor(1).submit(fork, names[0], x).result(),
        join(names[0], x),
    ),
}


@pytest.mark.parametrize("case", IN_VAIN)
def test_a_join_without_its_fork_runs_serially(
    layers: Callable[[int], list[str]], warnings: list[str], capturing: Callable[[], list[str]], case: str
) -> None:
    """Its ``hidden_states`` may be newer than what was there at the fork."""
    from vllm.utils.torch_utils import _encode_layer_name

    ops, names = torch.ops.vllm_gdn_plugin, layers(2)
    x, qkvz = torch.randn(TOKENS, HIDDEN), torch.randn(TOKENS, QKVZ)
    want = call("dual_stream", names[0], x)[1]
    done = capturing()

    def fork(name: str, hidden_states: Any) -> None:
        ops.gdn_in_proj_fork(hidden_states, _encode_layer_name(name))

    def join(name: str, hidden_states: Any) -> None:
        done.clear()
        assert torch.equal(ops.gdn_in_proj_join(hidden_states, qkvz, BA, _encode_layer_name(name)), want)

    fork(names[0], x)
    join(names[0], x)
    assert "done.wait" in done
    IN_VAIN[case](fork, join, names, x)
    assert done == []
    said = ["dual_stream runs serially in a CUDA graph: the compiler gave a join not what its fork was given"]
    assert [line[line.index("dual") :] for line in warnings] == (said if case in ("a copy", "another layer") else [])


def test_a_fork_of_another_graph_is_not_waited_for(
    layers: Callable[[int], list[str]],
    warnings: list[str],
    capturing: Callable[[], list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The auxiliary stream is then in no capture: what ran there would run once, and never with the graph."""
    (name,) = layers(1)
    x = torch.randn(TOKENS, HIDDEN)
    want = call("dual_stream", name, x)
    done = capturing()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    for one, other in zip(call("dual_stream", name, x), want, strict=True):
        assert torch.equal(one, other)
    assert done == ["reached.record", "the stream", "reached.wait"]
    (line,) = warnings
    assert line.endswith("the fork is not in the CUDA graph that is being captured")


wide_calls: list[str] = []


@torch.library.custom_op("vllm_gdn_plugin_test::wide", mutates_args=())
def wide(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """A kernel of a quantised ``in_proj_qkvz``."""
    wide_calls.append("qkvz")
    return torch.nn.functional.linear(x, weight)


wide.register_fake(lambda x, weight: x.new_empty((x.shape[0], weight.shape[0])))


@pytest.mark.parametrize("v2", [True, False], ids=["functionalization v2", "v1, which vLLM takes"])
@pytest.mark.parametrize("blocks", [2, 3])
def test_the_compiler_leaves_each_projection_between_fork_and_join(
    layers: Callable[[int], list[str]],
    capturing: Callable[[], list[str]],
    blocks: int,
    v2: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And the join gets the very buffer that the fork was given, with norms before and products after, in buffers of
    the same size, which could be put in its place."""
    from torch._inductor.utils import fresh_cache

    from vllm_gdn_plugin.run import dual_stream as op
    from vllm_gdn_plugin.run.layer import project_side_by_side

    known = [op.host.layer_by_name(name) for name in layers(blocks)]
    for layer in known:
        layer.in_proj_qkvz.forward = lambda x, weight=layer.in_proj_qkvz.weight: (wide(x, weight), None)
    mix = [torch.randn(HIDDEN, HIDDEN) for _ in known]

    def stack(x: Any) -> Any:
        for layer, weight in zip(known, mix, strict=True):
            h = (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)
            qkvz, ba = project_side_by_side(layer, h)
            x = x + torch.tanh(qkvz[:, :HIDDEN] * ba.sum(-1, keepdim=True)) @ weight
        return x

    with torch.inference_mode(), fresh_cache():
        x = torch.randn(TOKENS, HIDDEN)
        want = stack(x)
        options: dict[str, Any] = {"enable_auto_functionalized_v2": v2}
        compiled = torch.compile(stack, fullgraph=True, dynamic=True, options=options)
        done = capturing()
        monkeypatch.setitem(globals(), "wide_calls", done)
        for tokens in (TOKENS, TOKENS, 2 * TOKENS):
            done.clear()
            got = compiled(torch.cat([x, x])[:tokens])
            torch.testing.assert_close(got[:TOKENS], want)
            once = ["reached.record", "qkvz", "the stream", "reached.wait", "the stream", "done.record", "done.wait"]
            assert done == blocks * once


def test_the_join_depends_on_both_that_must_come_before(layers: Callable[[int], list[str]]) -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    from vllm_gdn_plugin.run import dual_stream as op
    from vllm_gdn_plugin.run.layer import project_side_by_side

    (name,) = layers(1)
    graph = make_fx(partial(project_side_by_side, op.host.layer_by_name(name)))(torch.randn(TOKENS, HIDDEN)).graph
    (hidden_states,) = graph.find_nodes(op="placeholder")
    qkvz, ba = graph.output_node().args[0]
    assert ba.target == torch.ops.vllm_gdn_plugin.gdn_in_proj_join.default
    assert ba.args[:2] == (hidden_states, qkvz)
    (fork,) = [node for node in graph.nodes if node.target == torch.ops.vllm_gdn_plugin.gdn_in_proj_fork.default]
    assert fork.args[0] is hidden_states
    assert fork.target._schema.arguments[0].alias_info.is_write


@torch.library.custom_op("vllm_gdn_plugin_test::attention", mutates_args=())
def attention(x: torch.Tensor) -> torch.Tensor:
    """Where vLLM splits the graph."""
    return x.sin()


attention.register_fake(torch.empty_like)


def distinct_pieces(known: list[Any], encode: Callable[[str], Any]) -> int:
    """How many different pieces vLLM's graph splitting leaves of a stack of layers whose names are encoded so.

    Like vLLM's piecewise compilation, where attention ends each piece; two pieces count as one when their code is
    the same, constants included, because then they share an artifact.
    """
    from vllm.compilation.backends import split_graph

    from vllm_gdn_plugin.run import layer as layer_module

    def stack(x: Any) -> Any:
        for layer in known:
            qkvz, ba = layer_module.project_side_by_side(layer, x)
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
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer_module, "_encode_layer_name", encode)
        torch.compile(stack, backend=backend, fullgraph=True)(torch.randn(TOKENS, HIDDEN))
    return len(pieces)


def test_layers_share_their_artifacts(layers: Callable[[int], list[str]]) -> None:
    """Constant in the number of layers with a LayerName, growing with a string: the regression of vLLM #36795."""
    from vllm.utils.torch_utils import _encode_layer_name

    from vllm_gdn_plugin.run import dual_stream as op

    known = [op.host.layer_by_name(name) for name in layers(8)]
    counts = {n: [distinct_pieces(known[:n], encode) for encode in (_encode_layer_name, str)] for n in (4, 8)}
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
    from vllm_gdn_plugin.tune import ways

    monkeypatch.setattr(ways, "CudaTimer", Stopwatch)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=1))
    monkeypatch.setattr(ways.host, "unchanged_stream", nullcontext)
    for name in ("prepare_aux_stream", "release_workspaces"):
        monkeypatch.setattr(ways.host, name, lambda: None)
    return ways


def case_planned(strategy: str) -> Any:
    from vllm_gdn_plugin.decide.plan import ProjectionFacts
    from vllm_gdn_plugin.tune.times import Case

    one = ProjectionFacts("UnquantizedLinearMethod", "float32", 1)
    return Case("a GPU", "", "", "", "", HIDDEN, one, one, "", False, (strategy, "serial"))


@pytest.mark.parametrize(("planned", "turns"), [("dual_stream", 16), ("fused", 8)])
def test_what_is_timed_is_as_many_layers_as_a_graph_needs_each_at_other_addresses(
    layers: Callable[[int], list[str]], timing: Any, monkeypatch: pytest.MonkeyPatch, planned: str, turns: int
) -> None:
    from vllm_gdn_plugin.run import dual_stream as op

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
    from vllm_gdn_plugin.run import dual_stream as op

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
    from vllm_gdn_plugin.run import dual_stream as op

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
