"""The ops in vLLM's and PyTorch's own terms: schema, fake, and what a compiled stack of layers is made of."""

import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from itertools import cycle
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("vllm", reason="vllm isn't installed: run `python3.11 dev.py test`")

HIDDEN, QKVZ, BA, TOKENS = 32, 48, 4, 5


class Projection(torch.nn.Linear):  # type: ignore[misc,name-defined]
    output_size_per_partition = property(lambda linear: linear.out_features)
    input_size = property(lambda linear: linear.in_features)
    quant_method = SimpleNamespace()

    def forward(self, x: Any) -> Any:
        return super().forward(x), None


@pytest.fixture
def layers(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., list[Any]]]:
    """`layers(n, plain_gemm=True)` makes n dual_stream layers, known to the forward context by their names."""
    from vllm_gdn_plugin.run import dual_stream
    from vllm_gdn_plugin.run.layer import Gdn

    known: dict[str, Any] = {}
    monkeypatch.setattr(dual_stream, "layer_by_name", lambda name: known[getattr(name, "value", name)])

    def make(count: int, plain_gemm: bool = True) -> list[Any]:
        torch.manual_seed(0)
        for i in range(count):
            qkvz, ba = (Projection(HIDDEN, n, bias=False).requires_grad_(False) for n in (QKVZ, BA))
            layer = SimpleNamespace(prefix=f"model.layers.{i}", in_proj_qkvz=qkvz, in_proj_ba=ba)
            layer.gdn = Gdn("dual_stream", plain_gemm=plain_gemm)
            known[layer.prefix] = layer
        return list(known.values())

    yield make
    torch._dynamo.reset()


def project(layer: Any, x: Any) -> Any:
    from vllm_gdn_plugin.run.dual_stream import project_side_by_side

    return project_side_by_side(layer, x)


def serial(layer: Any, x: Any) -> Any:
    return layer.in_proj_qkvz(x)[0], layer.in_proj_ba(x)[0]


def arguments_of_join(layer: Any, x: Any, plain_gemm: bool = True) -> Any:
    from vllm.utils.torch_utils import _encode_layer_name

    weight = layer.in_proj_ba.weight.t() if plain_gemm else None
    return x, torch.randn(x.shape[0], QKVZ), weight, BA, _encode_layer_name(layer.prefix)


@pytest.mark.parametrize("plain_gemm", [True, False])
def test_opcheck(layers: Callable[..., list[Any]], plain_gemm: bool) -> None:
    (layer,) = layers(1)
    x = torch.randn(TOKENS, HIDDEN)
    ops, arguments = torch.ops.vllm_gdn_plugin, arguments_of_join(layer, x, plain_gemm)
    torch.library.opcheck(ops.gdn_in_proj_fork.default, (x, arguments[-1]))
    torch.library.opcheck(ops.gdn_in_proj_join.default, arguments)


@pytest.mark.parametrize("num_tokens", [2, 5, 64])
@pytest.mark.parametrize("plain_gemm", [True, False])
def test_the_fake_foretells_shape_dtype_device_and_strides(
    layers: Callable[..., list[Any]], num_tokens: int, plain_gemm: bool
) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    (layer,) = layers(1)
    arguments = arguments_of_join(layer, torch.randn(num_tokens, HIDDEN), plain_gemm)
    join = torch.ops.vllm_gdn_plugin.gdn_in_proj_join
    one = join(*arguments)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments]
        other = join(*fakes)
    assert (one.shape, one.dtype, one.device, one.stride()) == (other.shape, other.dtype, other.device, other.stride())


@pytest.mark.parametrize("plain_gemm", [True, False])
def test_the_projections_and_nothing_else(layers: Callable[..., list[Any]], plain_gemm: bool) -> None:
    (layer,) = layers(1, plain_gemm)
    x = torch.randn(TOKENS, HIDDEN)
    outputs = project(layer, x)
    assert all(torch.equal(one, other) for one, other in zip(outputs, serial(layer, x), strict=True))
    assert len({t.untyped_storage().data_ptr() for t in (x, *outputs)}) == 3, "outputs alias nothing"


def test_where_vllm_does_not_multiply_by_linear_its_own_module_is_called(layers: Callable[..., list[Any]]) -> None:
    """A CPU that packs, and batch invariance."""
    x = torch.randn(TOKENS, HIDDEN)
    for plain_gemm in (True, False):
        layer = layers(1, plain_gemm)[0]
        called: list[bool] = []
        layer.in_proj_ba.register_forward_hook(lambda *_, called=called: called.append(True))
        project(layer, x)
        assert bool(called) == (not plain_gemm)


# As on a GPU that captures a graph


@pytest.fixture
def capturing(monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """`capturing()` has all calls from then on be captured, as on a GPU: what is done, in order."""

    def start() -> list[str]:
        from vllm_gdn_plugin.run import dual_stream

        done: list[str] = []
        names = cycle(("reached", "done"))

        def event() -> Any:
            name = next(names)
            return SimpleNamespace(
                record=lambda: done.append(f"{name}.record"), wait=lambda: done.append(f"{name}.wait")
            )

        monkeypatch.setattr(dual_stream, "is_captured", lambda hidden_states: True)
        monkeypatch.setattr(dual_stream, "_thread", dual_stream._Thread())
        monkeypatch.setattr(dual_stream._Thread, "is_prepared", True)
        monkeypatch.setattr(dual_stream, "aux_stream", lambda: "the stream")
        monkeypatch.setattr(torch.cuda, "Event", event)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext(done.append(stream)))
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        return done

    return start


OVERLAPPED = ["reached.record", "qkvz", "the stream", "reached.wait", "the stream", "ba", "done.record", "done.wait"]


@pytest.mark.parametrize("ways", [{}, {TOKENS: "dual_stream"}, {TOKENS: "serial"}, {TOKENS + 1: "serial"}], ids=str)
@pytest.mark.parametrize("breakable", [False, True])
def test_overlapped_in_a_graph_unless_the_size_was_timed_as_slower_or_the_graph_may_break(
    layers: Callable[..., list[Any]],
    capturing: Callable[[], list[str]],
    monkeypatch: pytest.MonkeyPatch,
    ways: dict[int, str],
    breakable: bool,
) -> None:
    from vllm_gdn_plugin.run import dual_stream

    layer = layers(1, plain_gemm=False)[0]
    layer.gdn.ways = ways
    monkeypatch.setattr(dual_stream, "breakable_capture", lambda: breakable)
    done = capturing()
    layer.in_proj_qkvz.register_forward_hook(lambda *_: done.append("qkvz"))
    layer.in_proj_ba.register_forward_hook(lambda *_: done.append("ba"))
    project(layer, torch.randn(TOKENS, HIDDEN))
    assert done == (["qkvz", "ba"] if breakable or "serial" in ways.values() else OVERLAPPED)


def test_a_batch_that_fills_the_gpu_is_not_overlapped(
    layers: Callable[..., list[Any]], capturing: Callable[[], list[str]]
) -> None:
    from vllm_gdn_plugin.run.dual_stream import MOST_OVERLAPPED

    layer = layers(1)[0]
    done = capturing()
    project(layer, torch.randn(MOST_OVERLAPPED + 1, HIDDEN))
    assert done == []
    project(layer, torch.randn(MOST_OVERLAPPED, HIDDEN))
    assert "done.wait" in done


FAULTS = {
    "the lookup of its size": "vllm_gdn_plugin.run.layer.Gdn.overlaps",
    "the stream": "vllm_gdn_plugin.run.dual_stream.aux_stream",
    "the wait": "torch.cuda.stream",
}
"""A step of the plugin inside an op."""


@pytest.mark.parametrize("good_calls", [0, 3], ids=["first call", "later call"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_ours_in_an_op_is_serial_and_said_once(
    layers: Callable[..., list[Any]],
    warnings: list[str],
    capturing: Callable[[], list[str]],
    monkeypatch: pytest.MonkeyPatch,
    fault: str,
    good_calls: int,
) -> None:
    known = layers(2)
    capturing()
    x = torch.randn(TOKENS, HIDDEN)
    for layer in known[:good_calls]:
        project(layer, x)
    assert warnings == []

    def fail(*args: Any) -> Any:
        raise ZeroDivisionError(f"planted\n{len(calls)}")

    calls: list[Any] = []
    monkeypatch.setattr(FAULTS[fault], fail)
    for layer in (*known, *known):
        calls.append(layer)
        for one, other in zip(project(layer, x), serial(layer, x), strict=True):
            assert torch.equal(one, other)
    (line,) = warnings
    assert line.endswith("dual_stream runs serially in a CUDA graph: unexpected ZeroDivisionError: planted 1")


@pytest.mark.parametrize("projection", ["in_proj_qkvz", "in_proj_ba"])
@pytest.mark.parametrize("captured", [False, True])
def test_what_a_projection_raises_is_the_host_s(
    layers: Callable[..., list[Any]],
    warnings: list[str],
    capturing: Callable[[], list[str]],
    captured: bool,
    projection: str,
) -> None:
    """The very error; the next call is right again."""
    layer = layers(1, plain_gemm=False)[0]
    error = torch.OutOfMemoryError("planted by the test")
    x = torch.randn(TOKENS, HIDDEN)
    if captured:
        capturing()

    def run_out(*args: Any) -> Any:
        raise error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(getattr(layer, projection), "forward", run_out)
        with pytest.raises(torch.OutOfMemoryError) as caught:
            project(layer, x)
    assert caught.value is error
    for one, other in zip(project(layer, x), serial(layer, x), strict=True):
        assert torch.equal(one, other)
    assert warnings == []


IN_VAIN: dict[str, Callable[[Any, Any, Any], Any]] = {
    "no fork": lambda fork, join, x: join(x),
    "a copy": lambda fork, join, x: (fork(x), join(x.clone())),
    "joined before": lambda fork, join, x: (fork(x), join(x), join(x)),
    "another thread": lambda fork, join, x: (ThreadPoolExecutor(1).submit(fork, x).result(), join(x)),
}


@pytest.mark.parametrize("case", IN_VAIN)
def test_a_join_without_its_fork_runs_serially(
    layers: Callable[..., list[Any]], warnings: list[str], capturing: Callable[[], list[str]], case: str
) -> None:
    """Its ``hidden_states`` may be newer than what was there at the fork."""
    ops, layer = torch.ops.vllm_gdn_plugin, layers(1)[0]
    x = torch.randn(TOKENS, HIDDEN)
    want = serial(layer, x)[1]
    done = capturing()

    def fork(hidden_states: Any) -> None:
        ops.gdn_in_proj_fork(hidden_states, arguments_of_join(layer, x)[-1])

    def join(hidden_states: Any) -> None:
        done.clear()
        assert torch.equal(ops.gdn_in_proj_join(*arguments_of_join(layer, hidden_states)), want)

    fork(x)
    join(x)
    assert "done.wait" in done
    IN_VAIN[case](fork, join, x)
    assert done == []
    said = ["dual_stream runs serially in a CUDA graph: the compiler gave a join not what its fork was given"]
    assert [line[line.index("dual") :] for line in warnings] == (said if case == "a copy" else [])


def test_a_thread_that_captures_before_it_has_run_a_layer_does_so_serially(
    layers: Callable[..., list[Any]],
    warnings: list[str],
    capturing: Callable[[], list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """cuBLAS's workspace for the second stream would be memory of the graph, and used when that is gone."""
    from vllm_gdn_plugin.run import dual_stream

    layer = layers(1)[0]
    x = torch.randn(TOKENS, HIDDEN)
    done = capturing()
    monkeypatch.setattr(dual_stream._Thread, "is_prepared", False)
    with ThreadPoolExecutor(1) as thread:
        outputs = thread.submit(project, layer, x).result()
    assert all(torch.equal(one, other) for one, other in zip(outputs, serial(layer, x), strict=True))
    assert done == []
    (line,) = warnings
    assert line.endswith("this thread captures a layer before it has run one")


def test_the_first_call_of_a_thread_prepares_it_and_the_first_after_a_release(
    layers: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not the import: CUDA may not be up by then."""
    from vllm_gdn_plugin.host import streams
    from vllm_gdn_plugin.run import dual_stream

    layer = layers(1)[0]
    prepared: list[bool] = []
    monkeypatch.setattr(dual_stream, "_thread", dual_stream._Thread())
    monkeypatch.setattr(streams, "prepare_aux_stream", lambda: prepared.append(True) or True)
    for count in (1, 1, 2, 2):
        if count > len(prepared):
            monkeypatch.setattr(streams, "times_released", streams.times_released + 1)
        project(layer, torch.randn(TOKENS, HIDDEN))
        assert len(prepared) == count
    assert dual_stream._thread.is_prepared


def test_a_workspace_that_cannot_be_had_is_said_once(
    layers: Callable[..., list[Any]], warnings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm_gdn_plugin.host import streams
    from vllm_gdn_plugin.run import dual_stream

    def fail() -> bool:
        tried.append(True)
        raise RuntimeError("CUBLAS_STATUS_ALLOC_FAILED")

    layer = layers(1)[0]
    tried: list[bool] = []
    monkeypatch.setattr(dual_stream, "_thread", dual_stream._Thread())
    monkeypatch.setattr(streams, "prepare_aux_stream", fail)
    for _ in range(2):
        project(layer, torch.randn(TOKENS, HIDDEN))
    (line,) = warnings
    assert "CUBLAS_STATUS_ALLOC_FAILED" in line
    assert tried == [True]
    assert not dual_stream._thread.is_prepared


def test_what_is_timed_runs_outside_a_capture_without_a_word(
    layers: Callable[..., list[Any]], warnings: list[str]
) -> None:
    """Once, before it is captured."""
    from vllm_gdn_plugin.run.dual_stream import WAYS

    layer = layers(1)[0]
    x = torch.randn(TOKENS, HIDDEN)
    for run in WAYS.values():
        assert all(torch.equal(one, other) for one, other in zip(run(layer, x), serial(layer, x), strict=True))
    assert warnings == []


def test_a_fork_of_another_graph_is_not_waited_for(
    layers: Callable[..., list[Any]],
    warnings: list[str],
    capturing: Callable[[], list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The auxiliary stream is then in no capture: what ran there would run once, and never with the graph."""
    layer = layers(1)[0]
    x = torch.randn(TOKENS, HIDDEN)
    done = capturing()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    for one, other in zip(project(layer, x), serial(layer, x), strict=True):
        assert torch.equal(one, other)
    assert done == ["reached.record", "the stream", "reached.wait"]
    (line,) = warnings
    assert line.endswith("the fork is not in the CUDA graph that is being captured")


# Compiled


@pytest.fixture
def compiled_graphs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What Inductor has made of each graph when nothing but the generation of code is left to do."""
    from torch._inductor import compile_fx

    graphs: list[Any] = []
    passes = compile_fx.post_grad_passes

    def noting(graph: Any, *args: Any, **kwargs: Any) -> None:
        passes(graph, *args, **kwargs)
        graphs.append(graph)

    monkeypatch.setattr(compile_fx, "post_grad_passes", noting)
    return graphs


wide_calls: list[str] = []


@torch.library.custom_op("vllm_gdn_plugin_test::wide", mutates_args=())
def wide(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """A kernel of a quantised ``in_proj_qkvz``."""
    wide_calls.append("qkvz")
    return torch.nn.functional.linear(x, weight)


wide.register_fake(lambda x, weight: x.new_empty((x.shape[0], weight.shape[0])))


@pytest.mark.parametrize("v2", [True, False], ids=["functionalization v2", "v1, which vLLM takes"])
def test_the_compiler_leaves_each_projection_between_fork_and_join(
    layers: Callable[..., list[Any]],
    capturing: Callable[[], list[str]],
    compiled_graphs: list[Any],
    v2: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And the join gets the very buffer that the fork was given, with norms before and products after, in buffers of
    the same size, which could be put in its place. Though the fork's schema says that it changes ``hidden_states``, no
    copy of it is made."""
    from torch._inductor.utils import fresh_cache

    known = layers(2)
    for layer in known:
        layer.in_proj_qkvz.forward = lambda x, weight=layer.in_proj_qkvz.weight: (wide(x, weight), None)
    mix = [torch.randn(HIDDEN, HIDDEN) for _ in known]

    def stack(x: Any) -> Any:
        for layer, weight in zip(known, mix, strict=True):
            h = (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)
            qkvz, ba = project(layer, h)
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
            assert done == 2 * [step for step in OVERLAPPED if step != "ba"]
    nodes = [node for graph in compiled_graphs for node in graph.graph.nodes if node.op == "call_function"]
    forks = [node for node in nodes if node.target == torch.ops.vllm_gdn_plugin.gdn_in_proj_fork.default]
    assert len(forks) == 2
    assert not [node for node in nodes if "clone" in str(node.target) or "copy" in str(node.target)]


def test_the_join_depends_on_both_that_must_come_before(layers: Callable[..., list[Any]]) -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    graph = make_fx(partial(project, layers(1)[0]))(torch.randn(TOKENS, HIDDEN)).graph
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


def distinct_pieces(known: list[Any]) -> int:
    """How many different pieces vLLM's graph splitting leaves of a stack of these layers.

    Like vLLM's piecewise compilation, where attention ends each piece; two pieces count as one when their code is
    the same, constants included, because then they share an artifact.
    """
    from vllm.compilation.backends import split_graph

    from vllm_gdn_plugin.run import layer as layer_module

    def stack(x: Any) -> Any:
        for layer in known:
            qkvz, ba = serial(layer_module.stand_in(layer, x), x)
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
    torch.compile(stack, backend=backend, fullgraph=True)(torch.randn(TOKENS, HIDDEN))
    return len(pieces)


@pytest.mark.parametrize("strategy", ["dual_stream", "fused"])
def test_layers_share_their_artifacts(layers: Callable[..., list[Any]], strategy: str) -> None:
    from vllm_gdn_plugin.run.fused import FusedWeight

    known = layers(8)
    for layer in known:
        layer.gdn.strategy = strategy
        if strategy == "fused":
            layer.gdn.fused = FusedWeight(layer.in_proj_qkvz, layer.in_proj_ba, QKVZ + BA)
    assert distinct_pieces(known[:4]) == distinct_pieces(known)


def test_a_name_that_is_a_string_would_make_an_artifact_for_each_layer(
    layers: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The regression of vLLM #36795, which shows that what is counted above can grow."""
    from vllm_gdn_plugin.run import dual_stream

    monkeypatch.setattr(dual_stream, "_encode_layer_name", str)
    known = layers(8)
    assert distinct_pieces(known) - distinct_pieces(known[:4]) == 4


# What is timed


class Stopwatch:
    """In place of CudaTimer: runs the work once, and says that it took 256 us."""

    min_layers = 16

    def prepare(self, work: Callable[[], Any]) -> tuple[Any, Any]:
        return None, work()

    def measure(self, prepared: dict[str, Any], rounds: int, warm_up: int) -> dict[str, list[float]]:
        return {name: [256.0] * rounds for name in prepared}


@pytest.fixture
def timing(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module that says what there is to time, on a CPU; nothing is kept."""
    from vllm_gdn_plugin.run import timing
    from vllm_gdn_plugin.tune import settle, timer

    for module in (timing, timer):
        monkeypatch.setattr(module, "CudaTimer", Stopwatch)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=1))
    monkeypatch.setattr(timer, "unchanged_stream", nullcontext)
    monkeypatch.setattr(timer, "release_workspaces", lambda: None)
    monkeypatch.setattr(settle, "gpu", lambda: "a GPU")
    monkeypatch.setattr(settle, "recall", lambda case, directory: {})
    monkeypatch.setattr(settle, "keep", lambda case, times, directory: None)
    monkeypatch.setattr(torch, "empty", lambda *size, empty=torch.empty, **how: empty(*size, **how | {"device": "cpu"}))
    return timing


def facts() -> Any:
    from vllm_gdn_plugin.decide.plan import LayerFacts, ProjectionFacts

    one = ProjectionFacts("UnquantizedLinearMethod", "float32", 1)
    return LayerFacts("cuda", one, one, "float32")


@pytest.mark.parametrize(("count", "fills", "turns"), [(6, 1, 16), (12, 10, 16), (20, 100, 20)])
def test_as_many_layers_are_timed_as_a_graph_needs_and_a_large_cache_does_not_hold(
    layers: Callable[..., list[Any]],
    timing: Any,
    monkeypatch: pytest.MonkeyPatch,
    count: int,
    fills: int,
    turns: int,
) -> None:
    made = layers(count)
    size = made[0].in_proj_qkvz.weight.nbytes
    cache = SimpleNamespace(L2_cache_size=fills * size // timing.CACHE_FILLS)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: cache)
    ran: list[Any] = []
    ways = {"dual_stream": lambda layer, x: ran.append(layer), "serial": lambda layer, x: None}
    monkeypatch.setattr(timing, "WAYS", ways)
    chosen, phrase = timing.ways_of(made, made, facts(), [4, 2048])
    assert chosen == {4: "dual_stream"}
    assert phrase.startswith("dual_stream at 4 tokens (timed in ")
    assert len(ran) == turns
    assert len({id(layer) for layer in ran}) == min(count, max(2, fills))


@pytest.mark.parametrize(("times", "rows"), [((5.0, 4.0, 6.0), 12416), ((4.0, 4.0, 4.0), 12352)])
def test_the_rows_of_a_weight_are_those_timed_as_fastest(
    timing: Any, monkeypatch: pytest.MonkeyPatch, times: tuple[float, ...], rows: int
) -> None:
    from vllm_gdn_plugin.run.fused import rows_to_choose_from

    outputs, hidden = 12344, 8
    candidates = rows_to_choose_from(outputs, hidden * 4)
    assert candidates == [12352, 12416, 12544, 12800]

    def measure(timer: Any, prepared: dict[str, Any], rounds: int, warm_up: int) -> dict[str, list[float]]:
        return {way: [each] * rounds for way, each in zip(prepared, (*times, 9.0), strict=True)}

    monkeypatch.setattr(Stopwatch, "measure", measure)
    like = torch.empty(outputs, hidden)
    assert timing.rows_of(like, outputs, [1, 2, 3, 4, 512]) == rows
    assert timing.rows_of(like, outputs, []) == candidates[0], "as few as possible where nothing may be timed"


def test_timing_that_fails_gives_back_its_memory(
    layers: Callable[..., list[Any]], timing: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm_gdn_plugin.tune import timer

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
    monkeypatch.setattr(timer, "release_workspaces", lambda: held.extend(graph() is not None for graph in graphs))
    made = layers(2)
    with pytest.raises(ZeroDivisionError, match="planted"):
        timing.ways_of(made, made, facts(), [4])
    assert held == [False, False]
