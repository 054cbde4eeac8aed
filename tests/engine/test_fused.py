"""Fused on the CPU: as exact as the two projections, never on a stale weight, only where its conditions hold."""

import copy
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from gpu_layers import SHAPES, TOKENS, Layer
from quantize import quantize
from safetensors.torch import load_file
from tiny_model import make_model

from vllm_gdn_plugin.decide.plan import FUSED as ONE_GEMM
from vllm_gdn_plugin.decide.plan import PADDED_TO, ROW_ALIGNMENT, rows_by_way

torch = pytest.importorskip("torch")
pytest.importorskip("vllm", reason="vllm isn't installed: run `python3.11 dev.py test`")

HERE = Path(__file__).parent
TOLERANCE = 1.05
"""The error against float64 may be at most this many times that of the two separate projections."""
SAMPLED_COLUMNS = 512
"""Of in_proj_qkvz's outputs, so many are computed in float64; of in_proj_ba's all."""
HIDDEN, QKVZ, BA, LAYERS = 32, 48, 4, 3
ROWS = 64
"""Of the one weight."""
WIDE = 12344
"""Outputs of an ``in_proj_qkvz`` that leave room for every padded way."""
MIB = 2**20
FUSED = {"VLLM_GDN_PLUGIN_STRATEGY": "fused"}
BACK_TO_SERIAL = "a GDN layer goes back to serial"


# Real linear layers of vLLM, without an engine


@pytest.fixture(scope="module")
def vllm_config(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A vLLM configuration in force, in a tensor-parallel group of one."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import cleanup_dist_env_and_memory, init_distributed_environment, initialize_model_parallel

    config = VllmConfig()
    rendezvous = tmp_path_factory.mktemp("rendezvous") / "file"
    with set_current_vllm_config(config):
        init_distributed_environment(1, 0, f"file://{rendezvous}", 0, "gloo")
        initialize_model_parallel()
        config.model_config = SimpleNamespace(dtype=torch.bfloat16, enforce_eager=True)
        yield config
        config.model_config = None
        cleanup_dist_env_and_memory()


@pytest.fixture
def make_layer(vllm_config: Any) -> Callable[[tuple[int, int, int]], Layer]:
    """`make_layer((hidden, qkvz, ba))` has two real bf16 projections, before their weights are loaded and packed."""
    from vllm.model_executor.layers.linear import MergedColumnParallelLinear

    def linear(hidden: int, size: int) -> Any:
        built = MergedColumnParallelLinear(hidden, [size], bias=False, params_dtype=torch.bfloat16)
        built.weight.data.normal_(std=hidden**-0.5)
        return built

    return lambda shape: Layer("layer", linear(shape[0], shape[1]), linear(shape[0], shape[2]), 0)


def load(layer: Any, fused: Any) -> None:
    """What vLLM's loaders do once the weights are written: parents first. On a CPU it packs each weight."""
    assert fused.is_loaded()
    for projection in (layer.in_proj_qkvz, layer.in_proj_ba):
        projection.quant_method.process_weights_after_loading(projection)


@pytest.mark.parametrize("model", SHAPES)
def test_as_exact_as_the_two_projections(make_layer: Callable[..., Layer], model: str) -> None:
    from vllm_gdn_plugin.run.fused import FusedProjections

    torch.manual_seed(0)
    hidden, *sizes = SHAPES[model]
    layer = make_layer(SHAPES[model])
    fused = FusedProjections(layer.in_proj_qkvz, layer.in_proj_ba)
    columns = torch.randperm(sizes[0])[:SAMPLED_COLUMNS]
    exact_weights = layer.in_proj_qkvz.weight[columns].double(), layer.in_proj_ba.weight.double()
    load(layer, fused)
    for num_tokens in TOKENS:
        x = torch.randn(num_tokens, hidden, dtype=torch.bfloat16)
        assert fused.why_broken(layer, x) is None
        qkvz, ba, _ = fused.apply(x).split([*sizes, fused.padding], dim=-1)
        ours = qkvz[:, columns], ba
        theirs = layer.in_proj_qkvz(x)[0][:, columns], layer.in_proj_ba(x)[0]
        for got, stock, weight in zip(ours, theirs, exact_weights, strict=True):
            want = x.double() @ weight.T
            error, allowed = (got - want).norm(), (stock - want).norm()
            assert 0 < error <= TOLERANCE * allowed, f"{num_tokens} tokens: {error} against {allowed}"


def test_one_storage_holds_both_weights_and_nothing_else_is_kept(make_layer: Callable[..., Layer]) -> None:
    from torch.multiprocessing.reductions import StorageWeakRef

    from vllm_gdn_plugin.run.fused import FusedProjections, release_replaced

    hidden, qkvz, ba = SHAPES["27B"]
    ba -= 8  # so that there is padding
    layer = make_layer((hidden, qkvz, ba))
    projections = (layer.in_proj_qkvz, layer.in_proj_ba)
    old = [StorageWeakRef(p.weight.untyped_storage()) for p in projections]
    fused = FusedProjections(*projections)
    release_replaced()
    assert all(storage.expired() for storage in old)
    weights = (fused.weight, *(p.weight for p in projections))
    assert len({w.untyped_storage().data_ptr() for w in weights}) == 1
    rows = (qkvz + ba + ROW_ALIGNMENT - 1) // ROW_ALIGNMENT * ROW_ALIGNMENT
    assert rows == qkvz + ba + 8
    assert fused.weight.untyped_storage().nbytes() == rows * hidden * fused.weight.itemsize
    assert not fused.weight[qkvz + ba :].any()
    del weights
    one = StorageWeakRef(fused.weight.untyped_storage())
    load(layer, fused)
    packed = not layer.in_proj_qkvz.weight.numel()  # which oneDNN can't on a CPU without AVX-512
    assert one.expired() == packed, "the storage the weights were loaded into stays as long as they do"


@pytest.mark.parametrize("when", ["the next layer is constructed", "the next storage is made", "its layer is loaded"])
def test_a_replaced_weight_is_kept_until(make_layer: Callable[..., Layer], when: str) -> None:
    """So that the next layer finds all of its bytes free, and not what another kind of layer has left of them."""
    from torch.multiprocessing.reductions import StorageWeakRef

    from vllm_gdn_plugin.run.fused import FusedProjections
    from vllm_gdn_plugin.run.layer import make_layer_class

    layers = [make_layer(SHAPES["9B"]) for _ in range(2)]
    old = [StorageWeakRef(layer.in_proj_qkvz.weight.untyped_storage()) for layer in layers]
    gone = []

    class Stock:
        def __init__(self) -> None:
            gone.append([storage.expired() for storage in old])

    made = make_layer_class(Stock, lambda _: None)
    fused = []
    for layer in layers:
        made()
        fused.append(FusedProjections(layer.in_proj_qkvz, layer.in_proj_ba))
    assert gone == [[False, False], [True, False]]
    assert [storage.expired() for storage in old] == [True, False]
    if when == "its layer is loaded":
        load(layers[0], fused[0])
        assert not old[1].expired(), "another layer may still be constructed"
        load(layers[1], fused[1])
    elif when == "the next storage is made":
        another = make_layer(SHAPES["9B"])
        fused.append(FusedProjections(another.in_proj_qkvz, another.in_proj_ba))
    else:
        made()
    assert [storage.expired() for storage in old] == [True, True]


@pytest.mark.parametrize("reason", ["VLLM_BATCH_INVARIANT", "cpu_offload_gb", "offload_group_size"])
def test_not_planned_where(
    make_layer: Callable[..., Layer], vllm_config: Any, monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    """From the facts as vLLM has them, without an engine: on a CPU vLLM itself refuses batch-invariant GDN layers."""
    from vllm_gdn_plugin import host
    from vllm_gdn_plugin.decide.plan import plan

    monkeypatch.delenv("VLLM_BATCH_INVARIANT", raising=False)
    layer = make_layer((HIDDEN, QKVZ, BA))
    assert plan(host.layer_facts(layer, "cuda"), "auto").strategy == "fused"
    if reason == "VLLM_BATCH_INVARIANT":
        monkeypatch.setenv(reason, "1")
    else:
        offload = vllm_config.offload_config
        monkeypatch.setattr(offload.uva if reason == "cpu_offload_gb" else offload.prefetch, reason, 1)
    why = "promises bit-equal results" if reason == "VLLM_BATCH_INVARIANT" else "the weights are offloaded"
    for platform, request in (("cuda", "auto"), ("cuda", "fused"), ("cpu", "fused")):
        chosen = plan(host.layer_facts(layer, platform), request)
        assert chosen.strategy != "fused"
        assert why in chosen.reason


# Never stale, by hand: linear layers whose weights stay as they are


class Projection(torch.nn.Linear):  # type: ignore[misc,name-defined]
    quant_method = SimpleNamespace(
        apply=lambda layer, x: torch.nn.functional.linear(x, layer.weight),
        process_weights_after_loading=lambda layer: None,
    )

    def forward(self, x: Any) -> Any:
        return super().forward(x), None


@pytest.fixture
def layers(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """Fused layers by the names that the op knows them by."""
    import vllm_gdn_plugin.run.dual_stream  # noqa: F401
    from vllm_gdn_plugin import host
    from vllm_gdn_plugin.run.fused import FusedProjections

    torch.manual_seed(0)
    known: dict[Any, Any] = {}
    for i in range(LAYERS):
        qkvz, ba = (Projection(HIDDEN, n, bias=False).requires_grad_(False) for n in (QKVZ, BA))
        fused = FusedProjections(qkvz, ba)
        assert fused.is_loaded()
        layer = SimpleNamespace(in_proj_qkvz=qkvz, in_proj_ba=ba, gdn_fused=fused, gdn_tuned={})
        known[f"model.layers.{i}"] = layer
    monkeypatch.setattr(host, "layer_by_name", lambda name: known[getattr(name, "value", name)])
    yield known
    torch._dynamo.reset()


def project(name: str, x: Any) -> Any:
    """Both projections by the op, without the padding."""
    from vllm.utils.torch_utils import _encode_layer_name

    padded = QKVZ + BA + -(QKVZ + BA) % 16
    return torch.ops.vllm_gdn_plugin.gdn_fused_in_proj(x, padded, _encode_layer_name(name))[:, : QKVZ + BA]


def all_layers(x: Any) -> Any:
    return torch.stack([project(f"model.layers.{i}", x) for i in range(LAYERS)])


def two_projections(layers: dict[str, Any], x: Any) -> Any:
    return torch.stack([torch.cat([layer.in_proj_qkvz(x)[0], layer.in_proj_ba(x)[0]], -1) for layer in layers.values()])


def changed(weight: Any) -> Any:
    return weight.data + torch.randn_like(weight)


def replace_data(layer: Any, name: str) -> None:
    weight = getattr(layer, name).weight
    weight.data = changed(weight)


def replace_parameter(layer: Any, name: str) -> None:
    linear = getattr(layer, name)
    linear.weight = torch.nn.Parameter(changed(linear.weight), requires_grad=False)


def move_then_write(layer: Any, name: str) -> None:
    weight = getattr(layer, name).weight
    weight.data = weight.data.clone()
    weight.data.mul_(2)


def move_to_the_neighbour(layer: Any, name: str) -> None:
    """Each parameter moves on by one row within the one storage: same storage, same shape, other rows."""
    weight = getattr(layer, name).weight
    weight.data = layer.gdn_fused.weight.data[1 : 1 + weight.shape[0]]


def swap(layer: Any, name: str) -> None:
    qkvz, ba = layer.in_proj_qkvz, layer.in_proj_ba
    qkvz.weight, ba.weight = ba.weight, qkvz.weight


def resize(layer: Any, name: str) -> None:
    qkvz, ba = layer.in_proj_qkvz.weight, layer.in_proj_ba.weight
    qkvz.data, ba.data = qkvz.data[:-1], torch.cat([qkvz.data[-1:] + 1, ba.data])


def restride(layer: Any, name: str) -> None:
    """The same bytes at the same place in the same shape, read in another order."""
    weight = getattr(layer, name).weight
    weight.data = weight.data.as_strided(weight.shape, (1, weight.shape[0]))


def replace_projection(layer: Any, name: str) -> None:
    old = getattr(layer, name)
    setattr(layer, name, Projection(HIDDEN, old.out_features, bias=False).requires_grad_(False))


def give_a_bias(layer: Any, name: str) -> None:
    linear = getattr(layer, name)
    linear.bias = torch.nn.Parameter(torch.randn(linear.out_features), requires_grad=False)


MOVES = [
    *((move, name) for move in (replace_data, replace_parameter, move_then_write) for name in ("qkvz", "ba")),
    *((move, name) for move in (restride, replace_projection, give_a_bias) for name in ("qkvz", "ba")),
    *((move, "qkvz") for move in (move_to_the_neighbour, swap, resize)),
]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize(("move", "name"), MOVES, ids=lambda value: getattr(value, "__name__", value))
def test_a_moved_weight_is_never_stale(
    layers: dict[str, Any], warnings: list[str], move: Callable[..., None], name: str, compiled: bool
) -> None:
    function = all_layers
    if compiled:  # as vLLM compiles: every guard dropped
        function = torch.compile(
            all_layers, fullgraph=True, options={"guard_filter_fn": lambda guards: [False for _ in guards]}
        )
    x = torch.randn(5, HIDDEN)
    before = function(x)
    torch.testing.assert_close(before, two_projections(layers, x))
    assert warnings == []
    for layer in layers.values():
        move(layer, f"in_proj_{name}")
    want = two_projections(layers, x)
    for _ in range(2):
        got = function(x)
        assert torch.equal(got, want)
    assert not torch.allclose(got, before)
    assert len(warnings) == 1
    assert BACK_TO_SERIAL in warnings[0]


@pytest.mark.parametrize("name", ["in_proj_qkvz", "in_proj_ba"])
def test_a_weight_written_in_place_is_seen(layers: dict[str, Any], warnings: list[str], name: str) -> None:
    x = torch.randn(5, HIDDEN)
    before = all_layers(x)
    for layer in layers.values():
        weight = getattr(layer, name).weight
        weight.data.copy_(changed(weight))
    got = all_layers(x)
    torch.testing.assert_close(got, two_projections(layers, x))
    assert not torch.allclose(got, before)
    assert warnings == []
    assert not any(layer.gdn_fused.broken for layer in layers.values())


def test_weights_are_left_alone_where_they_cannot_be_fused(
    layers: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm_gdn_plugin.run import fused

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("planted by the test")

    def weights() -> list[tuple[int, Any]]:
        return [(linear.weight.data_ptr(), linear.weight.clone()) for linear in linears]

    linears = [Projection(HIDDEN, size, bias=False) for size in (QKVZ, BA)]
    before = weights()
    for owner, step in ((fused, "_whereabouts"), (torch.Tensor, "copy_"), (torch.nn, "Parameter")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, step, fail)
            with pytest.raises(torch.OutOfMemoryError):
                fused.FusedProjections(*linears)
        for (where, value), (was_where, was_value) in zip(weights(), before, strict=True):
            assert where == was_where
            assert torch.equal(value, was_value)


# Several layers' weights in one allocation, as on a GPU


@pytest.mark.parametrize(
    ("size", "beyond", "device", "layers"),
    [
        (20 * MIB + 1, 0, "cpu", 1),
        (20 * MIB + 1, MIB, "cpu", 1),
        (9 * MIB, 0, "cuda", 1),  # allocated with others, by 512 bytes
        (11 * MIB, 0, "cuda", 2),
        (32 * MIB, 0, "cuda", 1),
        (16480 * 5120 * 2, 0, "cuda", 2),  # 27B: 160.9 MiB
        (4128 * 5120 * 2, 0, "cuda", 6),  # at tensor-parallel size 4, padded
        (12352 * 4096 * 2, 0, "cuda", 4),  # 9B: 96.5 MiB
        (511 * MIB, 0, "cuda", 2),
        (1023 * MIB, 0, "cuda", 2),
        (9 * MIB, MIB, "cuda", 7),  # 8 would lose 1 MiB more
        (32 * MIB, MIB, "cuda", 8),
        (7 * MIB + MIB // 2, 2 * MIB + MIB // 2, "cuda", 5),  # 6 to 8 would lose as much
        (16480 * 5120 * 2, (16896 - 16480) * 5120 * 2, "cuda", 8),
        (12352 * 4096 * 2, (12800 - 12352) * 4096 * 2, "cuda", 8),
    ],
)
def test_what_rounding_and_padding_lose_is_shared(size: int, beyond: int, device: str, layers: int) -> None:
    from vllm_gdn_plugin.run.fused import layers_per_allocation

    assert layers_per_allocation(size, beyond, torch.device(device)) == layers


@pytest.fixture
def projections(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Any, Any]]:
    """`projections(qkvz)` makes a pair with weights of its own; three fused ones of a shape share an allocation."""
    from vllm_gdn_plugin.run import fused

    monkeypatch.setattr(fused, "layers_per_allocation", lambda size, beyond, device: 3)
    monkeypatch.setattr(fused, "_latest", None)

    def make(qkvz: int = QKVZ) -> tuple[Any, Any]:
        return tuple(Projection(HIDDEN, n, bias=False).requires_grad_(False) for n in (qkvz, BA))

    return make


def layers_held(weight: Any) -> int:
    """For how many layers of the usual shape there is room behind ``weight``."""
    return rows_held(weight) // ROWS


def rows_held(weight: Any) -> int:
    """Of all layers that share the storage of ``weight``, and behind them."""
    rows, rest = divmod(weight.untyped_storage().nbytes(), HIDDEN * weight.itemsize)
    assert rest == 0
    return int(rows)


def storages(fused: list[Any]) -> list[int]:
    return [one.weight.untyped_storage().data_ptr() for one in fused]


def test_layers_share_an_allocation_and_none_is_kept_for_layers_that_never_came(
    projections: Callable[..., tuple[Any, Any]],
) -> None:
    from torch.multiprocessing.reductions import StorageWeakRef

    from vllm_gdn_plugin.run.fused import FusedProjections

    pairs = [projections() for _ in range(5)]
    fused = [FusedProjections(*pair) for pair in pairs]
    a, _, _, b, _ = storages(fused)
    assert storages(fused) == [a, a, a, b, b]
    assert len({one.weight.data_ptr() for one in fused}) == 5
    assert [layers_held(one.weight) for one in fused] == [3] * 5
    for pair in pairs:  # what a loader does
        for linear in pair:
            linear.weight.data.normal_()
    want = [torch.cat([linear.weight for linear in pair]) for pair in pairs]
    partial = StorageWeakRef(fused[3].weight.untyped_storage())
    for one, pair, rows in zip(fused, pairs, want, strict=True):
        assert one.is_loaded()
        assert torch.equal(one.weight[: len(rows)], rows)
        assert not one.weight[len(rows) :].any()
        assert pair[0].weight.data_ptr() == one.weight.data_ptr()
        assert pair[1].weight.data_ptr() == one.weight[QKVZ].data_ptr()
    assert storages(fused)[:3] == [a, a, a]
    assert [layers_held(one.weight) for one in fused] == [3, 3, 3, 2, 2]
    assert partial.expired()
    late = FusedProjections(*projections())
    assert late.weight.untyped_storage().data_ptr() not in storages(fused), "another model's"


def test_a_shape_has_allocations_of_its_own(projections: Callable[..., tuple[Any, Any]]) -> None:
    from vllm_gdn_plugin.run.fused import FusedProjections

    fused = [FusedProjections(*projections(qkvz)) for qkvz in (QKVZ, QKVZ, 2 * QKVZ, QKVZ)]
    fused.append(FusedProjections(*(linear.bfloat16() for linear in projections())))
    a, _, b, c, d = storages(fused)
    assert storages(fused) == [a, a, b, c, d]
    assert len({a, b, c, d}) == 4
    different = [(), PADDED_TO, ["fused_to_128", "fused_to_512"], ["fused_to_256"]]
    padded = [FusedProjections(*projections(WIDE), ways) for ways in different]
    a, b, _, c = storages(padded)
    assert storages(padded) == [a, b, b, c]
    assert len({a, b, c}) == 3


@pytest.mark.parametrize("replaced", [0, 1])
def test_a_layer_whose_weight_the_loader_replaced_keeps_no_place(
    projections: Callable[..., tuple[Any, Any]], replaced: int
) -> None:
    from torch.multiprocessing.reductions import StorageWeakRef

    from vllm_gdn_plugin.run.fused import FusedProjections

    pairs = [projections() for _ in range(3)]
    fused = [FusedProjections(*pair) for pair in pairs]
    old = StorageWeakRef(fused[0].weight.untyped_storage())
    other = 1 - replaced
    theirs, kept = torch.nn.Parameter(torch.ones_like(pairs[1][replaced].weight)), pairs[1][other].weight
    content = kept.clone()
    pairs[1][replaced].weight = theirs
    assert [one.is_loaded() for one in fused] == [True, False, True]
    assert [layers_held(fused[i].weight) for i in (0, 2)] == [2, 2]
    assert storages(fused)[0] == storages(fused)[2]
    del fused[1]  # as the layer does
    assert old.expired()
    assert pairs[1][replaced].weight is theirs
    assert pairs[1][other].weight is kept
    assert torch.equal(kept, content)


def test_layers_that_all_have_one_weight_replaced_or_deleted_keep_no_allocation(
    projections: Callable[..., tuple[Any, Any]],
) -> None:
    from torch.multiprocessing.reductions import StorageWeakRef

    from vllm_gdn_plugin.run.fused import FusedProjections

    pairs = [projections() for _ in range(3)]
    fused = [FusedProjections(*pair) for pair in pairs]
    old = StorageWeakRef(fused[0].weight.untyped_storage())
    for qkvz, _ in pairs[:2]:
        qkvz.weight = torch.nn.Parameter(torch.ones_like(qkvz.weight))
    del pairs[2][0].weight
    want = [ba.weight.clone() for _, ba in pairs]
    assert not any(one.is_loaded() for one in fused)
    fused.clear()
    assert old.expired()
    assert all(torch.equal(ba.weight, rows) for (_, ba), rows in zip(pairs, want, strict=True))


def test_a_layer_that_is_gone_keeps_no_place(projections: Callable[..., tuple[Any, Any]]) -> None:
    from vllm_gdn_plugin.run.fused import FusedProjections

    fused = [FusedProjections(*projections()) for _ in range(3)]
    del fused[0]
    assert all(one.is_loaded() for one in fused)
    assert [layers_held(one.weight) for one in fused] == [2, 2]


def out_of_memory_for(patch: pytest.MonkeyPatch, *layers: int) -> None:
    """Have an allocation for so many layers fail."""
    actual = torch.zeros

    def fail(rows: int, hidden: int, **options: Any) -> Any:
        if rows in [count * ROWS for count in layers]:
            raise torch.OutOfMemoryError("planted by the test")
        return actual(rows, hidden, **options)

    patch.setattr(torch, "zeros", fail)


def test_where_there_is_no_memory_to_give_room_back_it_is_kept(
    projections: Callable[..., tuple[Any, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm_gdn_plugin.run.fused import FusedProjections

    fused = [FusedProjections(*projections()) for _ in range(2)]
    before = [(one.weight, one.weight.clone(), one.qkvz.weight.data_ptr()) for one in fused]
    out_of_memory_for(monkeypatch, 2)
    assert all(one.is_loaded() for one in fused)
    for one, (weight, content, where) in zip(fused, before, strict=True):
        assert one.weight is weight
        assert torch.equal(one.weight, content)
        assert one.qkvz.weight.data_ptr() == where


@pytest.mark.parametrize("fitting", [0, 1])
def test_where_there_is_no_memory_for_several_layers_each_has_its_own(
    projections: Callable[..., tuple[Any, Any]], monkeypatch: pytest.MonkeyPatch, fitting: int
) -> None:
    from vllm_gdn_plugin.run.fused import FusedProjections

    out_of_memory_for(monkeypatch, 3, *([] if fitting else [1]))
    if fitting:
        fused = [FusedProjections(*projections()) for _ in range(2)]
        assert [layers_held(one.weight) for one in fused] == [1, 1]
        assert all(one.is_loaded() for one in fused)
    else:
        with pytest.raises(torch.OutOfMemoryError):
            FusedProjections(*projections())


def test_a_layer_at_work_is_not_moved_though_no_loader_told_that_it_is_loaded(
    projections: Callable[..., tuple[Any, Any]],
) -> None:
    from vllm_gdn_plugin.run.fused import FusedProjections

    qkvz, ba = projections()
    at_work = FusedProjections(qkvz, ba)
    before = at_work.weight.data_ptr()
    assert at_work.why_broken(SimpleNamespace(in_proj_qkvz=qkvz, in_proj_ba=ba), torch.empty(0)) is None
    late = FusedProjections(*projections())
    assert late.is_loaded()
    assert at_work.weight.data_ptr() == before


def test_a_copy_takes_no_place(projections: Callable[..., tuple[Any, Any]]) -> None:
    from vllm_gdn_plugin.run.fused import FusedProjections

    one = FusedProjections(*projections())
    other = copy.deepcopy(one)
    assert torch.equal(other.weight, one.weight)
    assert layers_held(other.weight) == 1
    assert other.allocation is one.allocation, "or all of it would be there twice"
    assert one.is_loaded()
    assert layers_held(one.weight) == 1


@pytest.mark.parametrize("room", [3, 4])
def test_a_layer_that_is_loaded_is_not_moved(
    projections: Callable[..., tuple[Any, Any]], monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    from vllm_gdn_plugin.run import fused as module
    from vllm_gdn_plugin.run.fused import FusedProjections

    monkeypatch.setattr(module, "layers_per_allocation", lambda size, beyond, device: room)
    fused = [FusedProjections(*projections()) for _ in range(3)]
    assert fused[0].is_loaded()
    before = fused[0].weight.data_ptr()
    del fused[1]
    assert fused[1].is_loaded()
    assert fused[0].weight.data_ptr() == before
    assert storages(fused)[0] == storages(fused)[1]


def test_nothing_joins_an_allocation_that_loaders_have_left(projections: Callable[..., tuple[Any, Any]]) -> None:
    from vllm_gdn_plugin.run.fused import FusedProjections

    pair = projections()
    fused = FusedProjections(*pair)
    pair[0].weight = torch.nn.Parameter(pair[0].weight.clone(), requires_grad=False)
    assert not fused.is_loaded()
    late = FusedProjections(*projections())
    assert storages([fused]) != storages([late])


# With more rows for the one GEMM: those of the next weight in the allocation, or some behind the last


ROWS_OF = rows_by_way(WIDE + BA)
BEYOND = max(ROWS_OF.values()) - ROWS_OF[ONE_GEMM]


@pytest.fixture
def padded(projections: Callable[..., tuple[Any, Any]]) -> Callable[[], Any]:
    """`padded()` is a layer that can be run in every padded way; three share an allocation."""
    from vllm_gdn_plugin.run.fused import FusedProjections

    assert list(ROWS_OF) == [ONE_GEMM, *PADDED_TO]

    def make() -> Any:
        qkvz, ba = projections(WIDE)
        fused = FusedProjections(qkvz, ba, PADDED_TO)
        return SimpleNamespace(in_proj_qkvz=qkvz, in_proj_ba=ba, gdn_fused=fused, gdn_tuned={})

    return make


def used(fused: Any, x: Any, way: str = ONE_GEMM) -> Any:
    """What the one GEMM gives, without the padding."""
    return fused.apply(x, way)[:, : WIDE + BA]


def test_a_layer_has_the_ways_that_it_was_asked_for_and_always_fused(
    projections: Callable[..., tuple[Any, Any]],
) -> None:
    from vllm_gdn_plugin.run.fused import FusedProjections

    def rows(*ways: str) -> dict[str, int]:
        fused = FusedProjections(*projections(WIDE), ways)
        assert fused.padding == max(fused.rows.values()) - WIDE - BA
        return fused.rows

    assert rows() == rows("dual_stream", "serial") == {ONE_GEMM: 12352}
    assert rows("fused_to_256", "serial") == {ONE_GEMM: 12352, "fused_to_256": 12544}
    assert rows(ONE_GEMM, *PADDED_TO) == ROWS_OF
    assert FusedProjections(*projections(), PADDED_TO).rows == {ONE_GEMM: ROWS}, "padded it would be too much"


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_more_rows_give_the_same_results(padded: Callable[[], Any], count: int) -> None:
    """Also of what is written after loading, when layers may have moved to an allocation of their number."""
    layers = [padded() for _ in range(count)]
    x = torch.randn(5, HIDDEN)
    for written in (False, True, True):
        for layer in layers:
            fused = layer.gdn_fused
            if written:
                assert fused.is_loaded()
                for linear in (layer.in_proj_qkvz, layer.in_proj_ba):
                    linear.weight.data.normal_()
                assert fused.why_broken(layer, x) is None
            want = torch.cat([layer.in_proj_qkvz(x)[0], layer.in_proj_ba(x)[0]], -1)
            for way in ROWS_OF:
                assert fused.apply(x, way).shape == (5, WIDE + BA + fused.padding)
                torch.testing.assert_close(used(fused, x, way), want)


def test_only_behind_the_last_layer_is_there_room_for_the_rows_of_none(padded: Callable[[], Any]) -> None:
    from torch.multiprocessing.reductions import StorageWeakRef

    rows = ROWS_OF[ONE_GEMM]
    layers = [padded() for _ in range(5)]
    fused = [layer.gdn_fused for layer in layers]
    assert [rows_held(one.weight) for one in fused] == 5 * [3 * rows + BEYOND]
    partial = StorageWeakRef(fused[3].weight.untyped_storage())
    assert all(one.is_loaded() for one in fused)
    assert [rows_held(one.weight) for one in fused] == [*3 * [3 * rows + BEYOND], *2 * [2 * rows + BEYOND]]
    assert len({*storages(fused)}) == 2
    assert partial.expired(), "also what the padded ways read has moved"


def test_what_lies_behind_a_weight_does_not_change_its_results(padded: Callable[[], Any]) -> None:
    neighbour, layer = padded(), padded()
    x = torch.randn(5, HIDDEN)
    before = {way: used(layer.gdn_fused, x, way).clone() for way in ROWS_OF}
    for linear in (neighbour.in_proj_qkvz, neighbour.in_proj_ba):
        linear.weight.data.fill_(float("nan"))
    rows = ROWS_OF[ONE_GEMM]
    for way, more in ROWS_OF.items():
        both = layer.gdn_fused.apply(x, way)
        assert torch.equal(both[:, : WIDE + BA], before[way])
        assert bool(both[:, rows:more].isnan().all()), "or the neighbour's rows were not read"


@pytest.mark.parametrize(("move", "name"), MOVES, ids=lambda value: getattr(value, "__name__", value))
def test_a_weight_that_more_rows_are_read_behind_is_never_stale_either(
    padded: Callable[[], Any],
    warnings: list[str],
    move: Callable[..., None],
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from vllm.utils.torch_utils import _encode_layer_name

    import vllm_gdn_plugin.run.dual_stream  # noqa: F401
    from vllm_gdn_plugin import host

    layer = padded()
    fused, x = layer.gdn_fused, torch.randn(5, HIDDEN)
    layer.gdn_tuned = {5: "fused_to_256"}
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(host, "layer_by_name", lambda name: layer)
    assert fused.is_loaded()
    before = used(fused, x)
    assert fused.why_broken(layer, x) is None
    move(layer, f"in_proj_{name}")
    assert fused.why_broken(layer, x) is not None
    width = WIDE + BA + fused.padding
    got = torch.ops.vllm_gdn_plugin.gdn_fused_in_proj(x, width, _encode_layer_name("any"))
    assert got.shape == (5, width)
    assert torch.equal(got[:, : WIDE + BA], two_projections({"any": layer}, x)[0])
    assert not torch.allclose(got[:, : WIDE + BA], before)
    assert len(warnings) == 1
    assert BACK_TO_SERIAL in warnings[0]


def test_a_copied_layer_has_its_own_weights_and_no_allocation(padded: Callable[[], Any]) -> None:
    layers = [padded() for _ in range(2)]
    other = copy.deepcopy(layers[0])
    fused, copied = layers[0].gdn_fused, other.gdn_fused
    x = torch.randn(5, HIDDEN)
    before = used(fused, x)
    for linear in (other.in_proj_qkvz, other.in_proj_ba):
        assert linear.weight.untyped_storage().nbytes() == linear.weight.nbytes
        linear.weight.data.mul_(2)
    assert copied.weight.untyped_storage().nbytes() == copied.weight.nbytes
    assert copied.allocation is fused.allocation
    assert not copied._read_by, "or all of the allocation would be there twice, or as long as the copy"
    assert copied.why_broken(other, x) is not None, "or it would read the weights of the first"
    torch.testing.assert_close(copied.apply_serially(other, x)[:, : WIDE + BA], 2 * before)
    assert torch.equal(used(fused, x), before)


def test_weights_repacked_before_the_first_call_are_noticed(make_layer: Callable[..., Layer]) -> None:
    from vllm_gdn_plugin.run.fused import FusedProjections

    layer = make_layer(SHAPES["9B"])
    fused = FusedProjections(layer.in_proj_qkvz, layer.in_proj_ba)
    changed_a_little = layer.in_proj_ba.weight.detach() * 1.03
    load(layer, fused)
    layer.in_proj_ba.weight = torch.nn.Parameter(changed_a_little, requires_grad=False)
    layer.in_proj_ba.quant_method.process_weights_after_loading(layer.in_proj_ba)
    assert fused.why_broken(layer, torch.randn(5, SHAPES["9B"][0], dtype=torch.bfloat16)) is not None


def test_a_copy_can_be_made(layers: dict[str, Any]) -> None:
    fused = copy.deepcopy(layers["model.layers.0"].gdn_fused)
    assert torch.equal(fused.weight, layers["model.layers.0"].gdn_fused.weight)


# Real engines


@pytest.fixture(scope="module")
def run(run_generate: Callable[..., Any], witness: Callable[..., Any]) -> Callable[..., Any]:
    """`run(kind, env, script=...)` with the plugin as `env` says, and `run(kind)` without it; op calls are counted."""

    def generate(kind: str, env: dict[str, str] | None = None, **options: Any) -> Any:
        extra, _ = witness()
        return run_generate(kind, env=extra | (env or {}), **options)

    return generate


OFF = {"VLLM_PLUGINS": "witness"}


def said(answer: dict[str, Any]) -> tuple[Any, Any]:
    return answer["token_ids"], answer["logprobs"]


@pytest.mark.parametrize(
    ("eager", "only"),
    [
        pytest.param(True, None, id="eager"),
        pytest.param(True, r"in_proj_[ba]\.", id="eager-only-ba", marks=pytest.mark.slow),
        pytest.param(True, r"in_proj_(qkv|z)\.", id="eager-only-qkvz", marks=pytest.mark.slow),
        pytest.param(False, None, id="compiled", marks=pytest.mark.slow),
    ],
)
def test_reloaded_weights_are_used(run: Callable[..., Any], scratch: Path, eager: bool, only: str | None) -> None:
    other = scratch / "models" / "qwen3_5_reloaded"
    if not other.exists():
        make_model("qwen3_5", other, seed=1)
    how = {"RELOAD_FROM": str(other)} | ({"RELOAD_ONLY": only} if only else {})
    stock, fused = (run("qwen3_5", how | env, eager=eager, script=HERE / "reload.py") for env in (OFF, FUSED))
    assert said(stock["before"]) != said(stock["after"]), "stock vLLM itself has not taken the other weights"
    for when in ("before", "after"):
        assert fused[when]["token_ids"] == stock[when]["token_ids"]
        for ours, theirs in zip(fused[when]["logprobs"], stock[when]["logprobs"], strict=True):
            assert ours == pytest.approx(theirs, abs=0.05)
    assert list(fused["before"]["op_calls"]) == ["fused"]
    assert fused["log"].count(BACK_TO_SERIAL) <= 1


@pytest.mark.slow
def test_sharded_state(run: Callable[..., Any], models: Callable[[str], Path], scratch: Path) -> None:
    """The shared storage is saved as two weights, like stock vLLM's, and the loader of such files writes into it.

    vLLM's loaders that replace parameters do not run here: see CONTRIBUTING.
    """
    saved = {}
    for name, env in {"stock": OFF, "fused": FUSED}.items():
        directory = scratch / "models" / f"sharded_{name}"
        shutil.copytree(models("qwen3_5"), directory, ignore=shutil.ignore_patterns("*.safetensors"))
        answer = run("qwen3_5", env | {"SAVE_TO": str(directory)}, script=HERE / "save_sharded.py")
        saved[name] = (answer["token_ids"], load_file(directory / "model-rank-0-part-0.safetensors"))
    assert saved["fused"][0] == saved["stock"][0]
    assert saved["fused"][1].keys() == saved["stock"][1].keys()
    assert all(torch.equal(weight, saved["stock"][1][name]) for name, weight in saved["fused"][1].items())

    how = {"ENGINE_ARGUMENTS": json.dumps({"load_format": "sharded_state"})}
    stock, fused = (run("sharded_stock", env | how) for env in (OFF, FUSED))
    assert fused["token_ids"] == stock["token_ids"]
    assert list(fused["op_calls"]) == ["fused"]
    assert "fused on 3 of 3 GDN layers" in fused["log"]
    assert BACK_TO_SERIAL not in fused["log"]


def test_offloaded_weights_are_refused(run: Callable[..., Any]) -> None:
    offload = {"ENGINE_ARGUMENTS": json.dumps({"cpu_offload_gb": 0.005})}
    stock, fused = (run("qwen3_5", env | offload) for env in (OFF, FUSED))
    assert "Offloader set to UVAOffloader" in fused["log"]
    assert said(fused) == said(stock)
    assert fused["op_calls"] == {}
    assert fused["log"].count("steps aside, vLLM runs as it is: the weights are offloaded") == 1


@pytest.fixture(scope="module")
def mixed(models: Callable[[str], Path], scratch: Path) -> str:
    """The kind of a checkpoint with int8 in_proj_qkvz and bf16 in_proj_ba."""
    quantize(models("qwen3_5"), scratch / "models" / "qwen3_5_w8a8")
    return "qwen3_5_w8a8"


def test_mixed_precision(run: Callable[..., Any], mixed: str) -> None:
    stock, dual_stream, fused = (run(mixed, env) for env in (OFF, {"VLLM_GDN_PLUGIN_STRATEGY": "dual_stream"}, FUSED))
    assert said(dual_stream) == said(stock)
    assert list(dual_stream["op_calls"]) == ["dual_stream"]
    assert "dual_stream on 3 of 3 GDN layers" in dual_stream["log"]
    assert said(fused) == said(stock)
    assert fused["op_calls"] == {}
    assert fused["log"].count("one GEMM cannot serve CompressedTensorsLinearMethod and UnquantizedLinearMethod") == 1
