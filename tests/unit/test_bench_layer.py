"""`bench layer` with stand-ins for vLLM's layer, its kernels and the GPU: what is run, compared, timed and written."""

import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_gdn_plugin.bench.errors import BadInput, WrongResult
from vllm_gdn_plugin.bench.report import load
from vllm_gdn_plugin.bench.results import LAYER, Machine, Run
from vllm_gdn_plugin.bench.shapes import Shape
from vllm_gdn_plugin.cli.main import main
from vllm_gdn_plugin.decide.plan import DUAL_STREAM, FUSED, SERIAL

torch = pytest.importorskip("torch", reason="torch isn't installed")

for name in ("numpy", "scipy", "matplotlib", "tqdm"):
    pytest.importorskip(name, reason=f"{name} isn't installed")

HIDDEN, HEADS, DIM, QKV = 16, 2, 4, 24
STOCK = object()
KERNEL = {SERIAL: "decode kernel", **{way: f"{way} + decode kernel" for way in (FUSED, DUAL_STREAM)}}


class Linear(torch.nn.Module):  # type: ignore[misc]
    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(outputs, HIDDEN, dtype=torch.bfloat16) / 4)

    def forward(self, x: Any) -> Any:
        return torch.nn.functional.linear(x, self.weight), None


def norm(out: Any, gate: Any) -> Any:
    return out * torch.sigmoid(gate)


class Batch:
    """A layer with states, which each step moves on."""

    def __init__(self, layer: Any, tokens: int) -> None:
        self.in_proj_qkvz, self.in_proj_ba = layer.in_proj_qkvz, layer.in_proj_ba
        self.layer, self.tokens, self.indices = layer, tokens, 1 + torch.randperm(tokens)
        self.kv_cache = torch.randn(tokens + 1, 3, QKV).bfloat16(), torch.randn(tokens + 1, HEADS, DIM, DIM)
        self.qkvz = self.ba = torch.empty(0)

    def empty_output(self) -> Any:
        return torch.zeros(self.tokens, HEADS, DIM, dtype=torch.bfloat16)

    def decode_by_vllm(self, stock: Any, indices: Any, out: Any, norm: bool) -> None:
        assert (stock, norm) == (STOCK, False)
        conv, ssm = self.kv_cache
        x = self.qkvz[:, :QKV]
        conv[indices] = torch.cat([conv[indices, 1:], x[:, None]], dim=1)
        ssm[indices] = ssm[indices] / 2 + self.ba.float().mean(dim=1)[:, None, None, None]
        out.copy_(ssm[indices].sum(-1) + conv[indices, 0, : HEADS * DIM].view_as(out))

    def decode_by_kernel(self, indices: Any, out: Any) -> None:
        self.decode_by_vllm(STOCK, indices, out, norm=False)
        out.copy_(norm(out, self.qkvz[:, QKV:].view_as(out)))
        self.layer.wrong(out, *self.kv_cache)


class GraphTimer:
    """A run overwrites what the first one gave, as the replay of a CUDA graph does."""

    aux_stream, min_layers = None, 3

    def __init__(self) -> None:
        self.measured: list[list[str]] = []

    def prepare(self, work: Callable[[], Any]) -> Any:
        outputs = tuple(one.clone() for one in work())

        def replay() -> None:
            for output, now in zip(outputs, work(), strict=True):
                output.copy_(now)

        return replay, outputs

    def measure(self, prepared: Any, rounds: int) -> dict[str, list[float]]:
        self.measured.append(list(prepared))
        return {way: [30.0 + 3 * n for n in range(rounds)] for way in prepared}


def one_by_one(layer: Any, x: Any) -> Any:
    return layer.in_proj_qkvz(x)[0], layer.in_proj_ba(x)[0]


def rounding(layer: Any, x: Any) -> Any:
    """The one GEMM: another last bit here and there."""
    qkvz, ba = one_by_one(layer, x)
    return (qkvz * 1.004).bfloat16(), ba


PROJECT = {SERIAL: one_by_one, DUAL_STREAM: one_by_one, FUSED: rounding}


def right(out: Any, conv: Any, ssm: Any) -> None:
    """The kernel does nothing wrong."""


def make_model(strategy: str, wrong: Callable[..., None] = right, project: Any = PROJECT) -> Any:
    from vllm_gdn_plugin.bench.layer import Model, ways

    def make() -> Any:
        layer = {"in_proj_qkvz": Linear(QKV + HEADS * DIM), "in_proj_ba": Linear(2 * HEADS), "wrong": wrong}
        return SimpleNamespace(**layer)

    shape = Shape("tiny", HIDDEN, QKV + HEADS * DIM, 2 * HEADS)
    return Model(shape, "in bfloat16", strategy, ways(strategy, project, STOCK, norm), make, Batch)


def measured(model: Any, tokens: tuple[int, ...] = (1, 3), layers: int | None = None) -> tuple[Run, GraphTimer]:
    from vllm_gdn_plugin.bench.layer import measure

    run, timer = (
        Run("bench layer", "today", "bf16", 0, 4, Machine("cpu", "A GPU", "3.12", "0.1", "2.14"), LAYER),
        GraphTimer(),
    )
    bar: Any = SimpleNamespace(set_description=lambda text: None, update=lambda: None)
    try:
        measure(model, tokens, layers, timer, run, bar)
    finally:
        assert len(timer.measured) == len(run.points), "what does not verify is not timed"
    return run, timer


@pytest.mark.parametrize("strategy", [FUSED, DUAL_STREAM, SERIAL])
def test_stock_the_strategy_and_the_kernel_are_timed_once_they_agree(strategy: str) -> None:
    run, _ = measured(make_model(strategy))
    alone = [] if strategy == SERIAL else [strategy]
    assert [point.tokens for point in run.points] == [1, 3]
    for point in run.points:
        assert list(point.samples_us) == ["stock", *alone, KERNEL[strategy], "qkvz and states"]
        assert (point.layers, point.samples_us["stock"]) == (3, [10.0, 11.0, 12.0, 13.0])
    qkvz, ba, out, state = QKV + HEADS * DIM, 2 * HEADS, HEADS * DIM, 4 * HEADS * DIM * DIM
    moved = run.points[1].bytes_moved
    assert (
        moved["stock"] == moved[KERNEL[strategy]] == 2 * HIDDEN * (qkvz + ba) + 3 * (2 * HIDDEN + 2 * state + 2 * out)
    )
    assert moved["qkvz and states"] == 2 * HIDDEN * qkvz + 3 * (2 * HIDDEN + 2 * state + 2 * qkvz)


def test_as_many_layers_as_do_not_fit_the_cache_or_as_many_as_asked_for() -> None:
    assert measured(make_model(FUSED), layers=2)[0].points[0].layers == 2


WRONG = {
    "output": lambda out, conv, ssm: out.mul_(1.1),
    "conv state": lambda out, conv, ssm: conv[1, 0, :4].add_(1),
    "recurrent state": lambda out, conv, ssm: ssm.mul_(1.002),
}


@pytest.mark.parametrize("strategy", [FUSED, DUAL_STREAM, SERIAL])
@pytest.mark.parametrize("what", WRONG)
def test_a_kernel_that_computes_something_else_is_not_timed(strategy: str, what: str) -> None:
    against = "stock" if strategy == SERIAL else strategy
    with pytest.raises(
        WrongResult, match=rf"3 tokens: {KERNEL[strategy].replace('+', '.')}: its {what} .* {against}'s"
    ):
        measured(make_model(strategy, WRONG[what]), (3,))


def test_what_is_no_number_is_wrong() -> None:
    with pytest.raises(WrongResult, match="differs from fused's by nan"):
        measured(make_model(FUSED, lambda out, conv, ssm: out.fill_(float("nan"))))


def test_a_kernel_may_round_otherwise() -> None:
    assert measured(make_model(FUSED, lambda out, conv, ssm: (out.mul_(1.004), ssm.mul_(1.0002))))[0].points


@pytest.mark.parametrize(("strategy", "factor"), [(FUSED, 1.1), (DUAL_STREAM, 1.004)])
def test_projections_that_compute_something_else_are_not_timed(strategy: str, factor: float) -> None:
    def project(layer: Any, x: Any) -> Any:
        qkvz, ba = one_by_one(layer, x)
        return (qkvz * factor).bfloat16(), ba

    with pytest.raises(WrongResult, match=f"{strategy}: its .* differs from stock's"):
        measured(make_model(strategy, project={SERIAL: one_by_one, strategy: project}))


def test_memory_that_is_too_small_is_told() -> None:
    model, made = make_model(FUSED), []

    def make() -> Any:
        made.append(model.make())
        if len(made) > 2:
            raise torch.OutOfMemoryError
        return made[-1]

    with pytest.raises(BadInput, match="too small for 3 layers: --layers takes fewer"):
        measured(replace(model, make=make))


# The command


@pytest.fixture
def bench(capsys: pytest.CaptureFixture[str]) -> Any:
    """(exit status, stdout, stderr) of ``bench layer ARGUMENTS``."""

    def bench(*arguments: object) -> tuple[int, str, str]:
        try:
            code = main(["bench", "layer", *map(str, arguments)])
        except SystemExit as stop:
            code = stop.code  # type: ignore[assignment]
        return code, *capsys.readouterr()

    return bench


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A GPU for which vLLM builds :func:`make_model`; what was asked of it."""
    from vllm_gdn_plugin.bench import machine, vllm_layer
    from vllm_gdn_plugin.tune import timer

    asked: list[Any] = []

    @contextmanager
    def built(*arguments: Any) -> Iterator[Any]:
        asked.append(arguments)
        yield make_model(FUSED, WRONG["output"] if "wrong" in arguments[0] else right)

    monkeypatch.setitem(sys.modules, "vllm", sys)
    monkeypatch.setattr(vllm_layer, "built", built)
    monkeypatch.setattr(machine, "require_device", lambda device: None)
    monkeypatch.setattr(machine, "describe_machine", lambda *a, **kw: Machine("cuda", "A GPU", "3.12", "0.1.0", "2.14"))
    monkeypatch.setattr(timer, "CudaTimer", GraphTimer)
    return asked


def test_the_command_from_end_to_end(bench: Any, gpu: list[Any], tmp_path: Path) -> None:
    options = ("--tokens", "1,2", "--layers", "2", "--rounds", "6", "--tensor-parallel-size", "4")
    code, out, errors = bench("--model", "tiny", "--output", tmp_path, *options, "--", "--quantization", "fp8")
    assert (code, gpu) == (0, [("tiny", ["--quantization", "fp8"], 4, [1, 2])]), errors
    run = load(tmp_path / "layer.json")
    assert isinstance(run, Run)
    assert (run.section, [(p.tokens, p.layers, len(p.samples_us["stock"])) for p in run.points]) == (
        LAYER,
        [(1, 2, 6), (2, 2, 6)],
    )
    assert out.startswith("# A decode step of a GDN layer, from its projections to out_proj, in bfloat16\n")
    head = "| tokens | stock us | fused us (x of qkvz and states) | fused + decode kernel us (x of qkvz and states) |"
    assert f"{head} qkvz and states alone us | gain |" in out
    assert (tmp_path / "layer.png").read_bytes().startswith(b"\x89PNG")


def test_what_does_not_verify_ends_it(bench: Any, gpu: list[Any], tmp_path: Path) -> None:
    code, _, errors = bench("--model", "wrong", "--output", tmp_path, "--tokens", "3")
    assert code == 1
    assert "fused + decode kernel: its output differs from fused's" in errors
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ((), "the following arguments are required"),
        (("--model", "x", "--device", "cpu"), "invalid choice: 'cpu'"),
        (("--model", "x", "--tokens", "1,x"), "--tokens '1,x' is not whole numbers"),
        (("--model", "x", "--layers", "0"), "--layers '0' is not whole numbers"),
        (("--model", "x", "--tensor-parallel-size", "1,4"), "--tensor-parallel-size '1,4' is not one number"),
    ],
)
def test_wrong_options_are_told(bench: Any, gpu: list[Any], tmp_path: Path, options: Any, says: str) -> None:
    code, out, errors = bench(*options, "--output", tmp_path)
    assert (code, out, gpu) == (2, "", [])
    assert says in errors


def test_without_vllm_it_says_so(bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    code, _, errors = bench("--model", "x", "--output", tmp_path)
    assert code == 2
    assert "vllm cannot be imported" in errors


def test_without_a_gpu_it_says_so(bench: Any, tmp_path: Path) -> None:
    if torch.cuda.is_available() or importlib.util.find_spec("vllm") is None:
        pytest.skip("there is a GPU, or no vLLM")
    code, _, errors = bench("--model", "x", "--output", tmp_path)
    assert code == 2
    assert "torch finds no NVIDIA GPU here" in errors
