"""Fused on the CPU: as exact as the two projections, never on a stale weight, only where its conditions hold."""

import copy
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from answered import assert_same_but_for_rounding, our_lines, said
from gpu_layers import SHAPES
from quantize import quantize
from safetensors.torch import load_file
from tiny_model import make_model

torch = pytest.importorskip("torch")
pytest.importorskip("vllm", reason="vllm isn't installed: run `python3.11 dev.py test`")

HERE = Path(__file__).parent
TOLERANCE = 1.05
"""The error against float64 may be at most this many times that of the two separate projections."""
SAMPLED_COLUMNS = 512
"""Of in_proj_qkvz's outputs, so many are computed in float64; of in_proj_ba's all."""
HIDDEN, QKVZ, BA, ROWS = 32, 48, 4, 64
FUSED = {"VLLM_GDN_PLUGIN_STRATEGY": "fused"}
OFF = {"VLLM_PLUGINS": "witness"}
NOT_IN_PLACE = "a GDN layer is no longer fused and runs as in stock vLLM"


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
def make_layer(vllm_config: Any) -> Callable[[tuple[int, int, int]], Any]:
    """`make_layer((hidden, qkvz, ba))` has two real bf16 projections, before their weights are loaded and packed."""
    from vllm.model_executor.layers.linear import MergedColumnParallelLinear

    def linear(hidden: int, size: int) -> Any:
        built = MergedColumnParallelLinear(hidden, [size], bias=False, params_dtype=torch.bfloat16)
        built.weight.data.normal_(std=hidden**-0.5)
        return built

    return lambda shape: SimpleNamespace(in_proj_qkvz=linear(shape[0], shape[1]), in_proj_ba=linear(shape[0], shape[2]))


def load(layer: Any) -> None:
    """What vLLM's loaders do once the weights are written. On a CPU it packs each weight."""
    for projection in (layer.in_proj_qkvz, layer.in_proj_ba):
        projection.quant_method.process_weights_after_loading(projection)


@pytest.mark.parametrize("model", ["35B-A3B", "27B"])
def test_as_exact_as_the_two_projections(make_layer: Callable[..., Any], model: str) -> None:
    from vllm_gdn_plugin.run.fused import FusedWeight, rows_to_choose_from

    torch.manual_seed(0)
    hidden, qkvz_size, ba_size = SHAPES[model]
    columns = torch.randperm(qkvz_size)[:SAMPLED_COLUMNS]
    for rows in rows_to_choose_from(qkvz_size + ba_size, hidden * 2):
        layer = make_layer(SHAPES[model])
        fused = FusedWeight(layer.in_proj_qkvz, layer.in_proj_ba, rows)
        exact_weights = layer.in_proj_qkvz.weight[columns].double(), layer.in_proj_ba.weight.double()
        load(layer)
        assert fused.is_of(layer), "the CPU must not pack them, or a reload would not be seen"
        for num_tokens in (1, 5, 64):
            x = torch.randn(num_tokens, hidden, dtype=torch.bfloat16)
            qkvz, ba = fused.project(x)
            assert (qkvz.shape, ba.shape) == ((num_tokens, qkvz_size), (num_tokens, ba_size))
            ours = qkvz[:, columns], ba
            theirs = layer.in_proj_qkvz(x)[0][:, columns], layer.in_proj_ba(x)[0]
            for got, stock, weight in zip(ours, theirs, exact_weights, strict=True):
                want = x.double() @ weight.T
                error, allowed = (got - want).norm(), (stock - want).norm()
                assert 0 < error <= TOLERANCE * allowed, f"{rows} rows, {num_tokens} tokens: {error} against {allowed}"


def test_one_storage_holds_both_weights_and_nothing_else_is_kept(make_layer: Callable[..., Any]) -> None:
    from torch.multiprocessing.reductions import StorageWeakRef

    from vllm_gdn_plugin.run.fused import FusedWeight

    hidden, qkvz, ba = SHAPES["9B"]
    layer = make_layer(SHAPES["9B"])
    projections = layer.in_proj_qkvz, layer.in_proj_ba
    before = [(p.weight, StorageWeakRef(p.weight.untyped_storage()), p.weight.clone()) for p in projections]
    rows = qkvz + ba + 16
    fused = FusedWeight(*projections, rows)
    for projection, (parameter, storage, content) in zip(projections, before, strict=True):
        assert projection.weight is parameter
        assert storage.expired()
        assert torch.equal(parameter, content)
    assert len({w.untyped_storage().data_ptr() for w in (fused.weight, *(p.weight for p in projections))}) == 1
    assert fused.weight.untyped_storage().nbytes() == rows * hidden * fused.weight.itemsize
    assert not fused.weight[qkvz + ba :].any()
    assert fused.is_of(layer)


def test_a_weight_that_is_not_in_place_is_packed_as_in_stock_vllm(make_layer: Callable[..., Any]) -> None:
    from vllm_gdn_plugin.run.fused import FusedWeight

    stock, layer = make_layer(SHAPES["9B"]), make_layer(SHAPES["9B"])
    fused = FusedWeight(layer.in_proj_qkvz, layer.in_proj_ba, SHAPES["9B"][1] + SHAPES["9B"][2])
    layer.in_proj_ba.weight.data = layer.in_proj_ba.weight.data[:-1]
    assert not fused.take_back(layer)
    for one in (stock, layer):
        load(one)
    for name in ("in_proj_qkvz", "in_proj_ba"):
        ours, theirs = (bool(getattr(one, name).weight.numel()) for one in (layer, stock))
        assert ours == theirs


def test_layers_are_left_as_they_are_where_there_is_no_memory(
    make_layer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm_gdn_plugin.run.fused import FusedWeight

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("planted by the test")

    layer = make_layer((HIDDEN, QKVZ, BA))
    weights = layer.in_proj_qkvz.weight, layer.in_proj_ba.weight
    before = [weight.data_ptr() for weight in weights]
    monkeypatch.setattr(torch, "zeros", fail)
    with pytest.raises(torch.OutOfMemoryError):
        FusedWeight(layer.in_proj_qkvz, layer.in_proj_ba, ROWS)
    assert [weight.data_ptr() for weight in weights] == before


@pytest.mark.parametrize("reason", ["VLLM_BATCH_INVARIANT", "cpu_offload_gb", "offload_group_size"])
def test_not_planned_where(
    make_layer: Callable[..., Any], vllm_config: Any, monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    """From the facts as vLLM has them, without an engine: on a CPU vLLM itself refuses batch-invariant GDN layers."""
    from vllm_gdn_plugin.decide.plan import plan
    from vllm_gdn_plugin.host import facts

    monkeypatch.delenv("VLLM_BATCH_INVARIANT", raising=False)
    layer = make_layer((HIDDEN, QKVZ, BA))
    assert plan(facts.layer_facts(layer, "cuda"), "auto").strategy == "fused"
    if reason == "VLLM_BATCH_INVARIANT":
        monkeypatch.setenv(reason, "1")
    else:
        offload = vllm_config.offload_config
        monkeypatch.setattr(offload.uva if reason == "cpu_offload_gb" else offload.prefetch, reason, 1)
    why = "promises bit-equal results" if reason == "VLLM_BATCH_INVARIANT" else "the weights are offloaded"
    for platform, request in (("cuda", "auto"), ("cuda", "fused"), ("cpu", "fused")):
        chosen = plan(facts.layer_facts(layer, platform), request)
        assert chosen.strategy != "fused"
        assert why in chosen.reason


# Never stale, by hand: linear layers whose weights stay as they are, as on a GPU


class Projection(torch.nn.Linear):  # type: ignore[misc,name-defined]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.quant_method = SimpleNamespace()

    def forward(self, x: Any) -> Any:
        return super().forward(x), None


class Layer(torch.nn.Module):  # type: ignore[misc,name-defined]
    """A fused layer, as the plugin leaves it."""

    def __init__(self) -> None:
        from vllm_gdn_plugin.run.fused import FusedWeight
        from vllm_gdn_plugin.run.layer import Gdn

        super().__init__()
        self.in_proj_qkvz, self.in_proj_ba = (
            Projection(HIDDEN, size, bias=False).requires_grad_(False) for size in (QKVZ, BA)
        )
        self.gdn = Gdn("fused", FusedWeight(self.in_proj_qkvz, self.in_proj_ba, ROWS))


@pytest.fixture
def layer() -> Iterator[Layer]:
    torch.manual_seed(0)
    yield Layer()
    torch._dynamo.reset()


def project(layer: Any, x: Any) -> Any:
    """Both projections, as the plugin's forward has them computed."""
    from vllm_gdn_plugin.run.layer import stand_in

    return two_projections(stand_in(layer, x), x)


def two_projections(layer: Any, x: Any) -> Any:
    return torch.cat([layer.in_proj_qkvz(x)[0], layer.in_proj_ba(x)[0]], -1)


def changed(weight: Any) -> Any:
    return weight.data + torch.randn_like(weight)


def replace_data(layer: Any, name: str) -> None:
    weight = getattr(layer, name).weight
    weight.data = changed(weight)


def replace_parameter(layer: Any, name: str) -> None:
    linear = getattr(layer, name)
    linear.weight = torch.nn.Parameter(changed(linear.weight), requires_grad=False)


def change_dtype(layer: Any, name: str) -> None:
    """As who fetches weights to the CPU, or to another precision, writes them there, and lets vLLM load them again."""
    weight = getattr(layer, name).weight
    weight.data = changed(weight).double()


def move_then_write(layer: Any, name: str) -> None:
    weight = getattr(layer, name).weight
    weight.data = weight.data.clone()
    weight.data.mul_(2)


def move_to_the_neighbour(layer: Any, name: str) -> None:
    """The parameter moves on by one row within the one storage: same storage, same shape, other rows."""
    weight = getattr(layer, name).weight
    weight.data = layer.gdn.fused.weight.data[1 : 1 + weight.shape[0]]


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


BOTH = ("in_proj_qkvz", "in_proj_ba")
ANYWHERE = (replace_data, replace_parameter, move_then_write, restride, replace_projection, give_a_bias)
MOVES = [
    *((move, name) for move in ANYWHERE for name in BOTH),
    *((move, BOTH[0]) for move in (move_to_the_neighbour, swap, resize)),
]


@pytest.mark.parametrize(("move", "name"), MOVES, ids=lambda value: getattr(value, "__name__", value))
def test_where_nothing_compiles_a_moved_weight_is_never_stale(
    layer: Layer, warnings: list[str], move: Callable[..., None], name: str
) -> None:
    x = torch.randn(5, HIDDEN)
    before = project(layer, x)
    torch.testing.assert_close(before, two_projections(layer, x))
    assert (warnings, layer.gdn.strategy) == ([], "fused")
    move(layer, name)
    want = two_projections(layer, x)
    for _ in range(2):
        got = project(layer, x)
        assert torch.equal(got, want)
    assert not torch.allclose(got, before)
    assert layer.gdn.strategy == "serial"
    (line,) = warnings
    assert NOT_IN_PLACE in line


def compiled() -> Any:
    """As vLLM compiles: every guard dropped."""
    return torch.compile(project, fullgraph=True, options={"guard_filter_fn": lambda guards: [False for _ in guards]})


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("make", [lambda: project, compiled], ids=["eager", "compiled"])
def test_a_weight_written_in_place_is_seen(
    layer: Layer, warnings: list[str], make: Callable[[], Any], name: str
) -> None:
    function = make()
    x = torch.randn(5, HIDDEN)
    before = function(layer, x)
    getattr(layer, name).weight.data.copy_(changed(getattr(layer, name).weight))
    got = function(layer, x)
    torch.testing.assert_close(got, two_projections(layer, x))
    assert not torch.allclose(got, before)
    assert (warnings, layer.gdn.strategy) == ([], "fused")


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("move", [replace_data, replace_parameter, move_then_write, change_dtype])
def test_what_a_loader_has_put_in_its_place_is_taken_back(layer: Layer, move: Callable[..., None], name: str) -> None:
    """Also by code that was compiled before."""
    function = compiled()
    x = torch.randn(5, HIDDEN)
    function(layer, x)
    move(layer, name)
    parameter = getattr(layer, name).weight
    weights = [getattr(layer, each).weight.data.float() for each in BOTH]
    want = torch.nn.functional.linear(x, torch.cat(weights))
    assert not layer.gdn.fused.is_of(layer)
    assert layer.gdn.fused.take_back(layer)
    assert getattr(layer, name).weight is parameter
    assert layer.gdn.fused.is_of(layer)
    torch.testing.assert_close(function(layer, x), want)
    torch.testing.assert_close(two_projections(layer, x), want)


@pytest.mark.parametrize("move", [swap, resize, give_a_bias])
def test_what_does_not_fit_is_not_taken_back(layer: Layer, move: Callable[..., None]) -> None:
    weights = [linear.weight for linear in (layer.in_proj_qkvz, layer.in_proj_ba)]
    move(layer, "in_proj_ba")
    want = [(weight.data_ptr(), weight.clone()) for weight in weights]
    assert not layer.gdn.fused.take_back(layer)
    for weight, (where, content) in zip(weights, want, strict=True):
        assert weight.data_ptr() == where
        assert torch.equal(weight, content)


def test_a_copied_layer_is_serial_with_weights_of_its_own(layer: Layer) -> None:
    other = copy.deepcopy(layer)
    x = torch.randn(5, HIDDEN)
    before = project(layer, x)
    assert (other.gdn.strategy, other.gdn.fused) == ("serial", None)
    for linear in (other.in_proj_qkvz, other.in_proj_ba):
        linear.weight.data.mul_(2)
    torch.testing.assert_close(project(other, x), 2 * before)
    assert torch.equal(project(layer, x), before)


# Real engines


@pytest.fixture(scope="module")
def run(run_generate: Callable[..., Any], witness: Callable[..., Any]) -> Callable[..., Any]:
    """`run(kind, env, script=...)` with the plugin as `env` says; what the plugin ran is counted."""

    def generate(kind: str, env: dict[str, str], breaks: str | None = None, **options: Any) -> Any:
        extra, _ = witness(breaks)
        return run_generate(kind, env=extra | env, **options)

    return generate


ROUTES = {"path": None, "iterator": ".", "only ba": r"in_proj_[ba]\.", "only qkvz": r"in_proj_(qkv|z)\."}
"""What is handed to vLLM's reload_weights, which loads layer by layer: a path, or those weights of an iterator."""


@pytest.mark.parametrize(
    ("route", "eager"),
    [
        pytest.param("path", True, id="path-eager"),
        *(pytest.param(r, True, id=f"{r}-eager", marks=pytest.mark.slow) for r in ROUTES if r != "path"),
        *(pytest.param(r, False, id=f"{r}-compiled", marks=pytest.mark.slow) for r in ("path", "iterator")),
    ],
)
def test_reloaded_weights_are_used(run: Callable[..., Any], scratch: Path, eager: bool, route: str) -> None:
    other = scratch / "models" / "qwen3_5_reloaded"
    if not other.exists():
        make_model("qwen3_5", other, seed=1)
    how = {"RELOAD_FROM": str(other)} | ({"RELOAD_ONLY": ROUTES[route]} if ROUTES[route] else {})
    stock, fused = (run("qwen3_5", how | env, eager=eager, script=HERE / "reload.py") for env in (OFF, FUSED))
    assert said(stock["before"]) != said(stock["after"]), "stock vLLM itself has not taken the other weights"
    for when in ("before", "after"):
        assert_same_but_for_rounding(fused[when], stock[when])
    assert list(fused["before"]["ran"]) == ["fused"]
    assert fused["log"].count(NOT_IN_PLACE) <= 1


@pytest.mark.slow
def test_sharded_state(run: Callable[..., Any], models: Callable[[str], Path], scratch: Path) -> None:
    """The one weight is saved as two, like stock vLLM's, and the loader of such files writes into it."""
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
    assert_same_but_for_rounding(fused, stock)
    assert list(fused["ran"]) == ["fused"]
    assert "fused on 3 of 3 GDN layers" in fused["log"]


@pytest.mark.parametrize("eager", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["eager", "compiled"])
def test_a_loader_that_replaces_the_parameters(run: Callable[..., Any], stock: Any, eager: bool) -> None:
    if not eager:
        stock = run("qwen3_5", OFF, eager=False)
    got = run("qwen3_5", FUSED, "parameters", eager=eager)
    assert_same_but_for_rounding(got, stock)
    assert list(got["ran"]) == ["fused"]
    assert "fused on 3 of 3 GDN layers" in got["log"]
    assert NOT_IN_PLACE not in got["log"]


@pytest.mark.parametrize("strategy", [pytest.param("dual_stream", marks=pytest.mark.slow), "fused"])
def test_a_linear_method_that_is_swapped_after_construction(run: Callable[..., Any], stock: Any, strategy: str) -> None:
    """As vLLM does for Qwen4-Exp: the plugin goes by what is there once the weights are loaded."""
    got = run("qwen3_5", {"VLLM_GDN_PLUGIN_STRATEGY": strategy}, "linear methods")
    assert said(got) == said(stock)
    assert got["ran"] == {}
    lines = our_lines(got["log"])
    assert len(lines) == 1, lines
    (line,) = lines
    assert "steps aside, vLLM runs as it is: " in line
    assert "LowLatencyLinearMethod and UnquantizedLinearMethod" in line


@pytest.mark.slow
def test_offloaded_weights_are_refused(run: Callable[..., Any]) -> None:
    offload = {"ENGINE_ARGUMENTS": json.dumps({"cpu_offload_gb": 0.005})}
    stock, fused = (run("qwen3_5", env | offload) for env in (OFF, FUSED))
    assert "Offloader set to UVAOffloader" in fused["log"]
    assert said(fused) == said(stock)
    assert fused["ran"] == {}
    assert fused["classes"] == stock["classes"], "where nothing of ours runs, the layers are of stock's class"
    assert fused["log"].count("steps aside, vLLM runs as it is: the weights are offloaded") == 1


@pytest.fixture(scope="module")
def mixed(models: Callable[[str], Path], scratch: Path) -> str:
    """The kind of a checkpoint with int8 in_proj_qkvz and bf16 in_proj_ba."""
    quantize(models("qwen3_5"), scratch / "models" / "qwen3_5_w8a8")
    return "qwen3_5_w8a8"


@pytest.mark.slow
def test_mixed_precision(run: Callable[..., Any], mixed: str) -> None:
    stock, dual_stream, fused = (run(mixed, env) for env in (OFF, {"VLLM_GDN_PLUGIN_STRATEGY": "dual_stream"}, FUSED))
    assert said(dual_stream) == said(stock)
    assert list(dual_stream["ran"]) == ["dual_stream"]
    assert "dual_stream on 3 of 3 GDN layers" in dual_stream["log"]
    assert dual_stream["classes"] != stock["classes"]
    assert said(fused) == said(stock)
    assert fused["ran"] == {}
    assert fused["classes"] == stock["classes"], "where nothing of ours runs, the layers are of stock's class"
    assert fused["log"].count("one GEMM cannot serve CompressedTensorsLinearMethod and UnquantizedLinearMethod") == 1
