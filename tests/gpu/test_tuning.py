"""The ways to run a layer, timed on this GPU: each is right, and the ops take the one that was chosen."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gpu_layers import SHAPES
from test_dual_stream import capture, context, quantized

from vllm_gdn_plugin.decide.plan import (
    DUAL_STREAM,
    FUSED,
    NARROW_KERNEL,
    PADDED_TO,
    SERIAL,
    LayerFacts,
    ProjectionFacts,
    choices,
)

SIZES = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
TOLERANCE = 1.05
"""As in test_fused.py."""
WORKSPACE = 32 * 2**20
"""Bytes that cuBLAS takes for each stream on Hopper."""
A_LITTLE = 16 * 2**20


def facts(layer: Any) -> LayerFacts:
    projections = [
        ProjectionFacts(type(linear.quant_method).__name__, "bfloat16", linear.output_size_per_partition)
        for linear in (layer.in_proj_qkvz, layer.in_proj_ba)
    ]
    return LayerFacts("cuda", *projections, "bfloat16")


@pytest.fixture
def make_layers(make_layer: Callable[..., Any]) -> Callable[..., list[Any]]:
    """As many layers of a shape as asked for, fused or not as ``auto`` plans them."""

    def make(count: int, shape: tuple[int, int, int], quantization: str = "none") -> list[Any]:
        from vllm_gdn_plugin.run.fused import FusedProjections

        layers = [make_layer(shape, quant_config=quantized(quantization)) for _ in range(count)]
        for layer in layers:
            layer.gdn_strategy = FUSED if quantization == "none" else DUAL_STREAM
            if layer.gdn_strategy == FUSED:
                layer.gdn_fused = FusedProjections(layer.in_proj_qkvz, layer.in_proj_ba, choices(facts(layer)))
        return layers

    return make


def fused_op(layer: Any, hidden_states: Any) -> Any:
    import torch
    from vllm.utils.torch_utils import _encode_layer_name

    import vllm_gdn_plugin.run.dual_stream  # noqa: F401

    fused = layer.gdn_fused
    return torch.ops.vllm_gdn_plugin.gdn_fused_in_proj(
        hidden_states, sum(fused.sizes) + fused.padding, _encode_layer_name(layer.prefix)
    )


@pytest.mark.parametrize("way", [*PADDED_TO, DUAL_STREAM, SERIAL])
@pytest.mark.parametrize("tensor_parallel_size", [1, 4])
@pytest.mark.parametrize("model", SHAPES)
def test_a_fused_layer_is_as_exact_as_serial_in_each_way(
    make_layers: Callable[..., list[Any]], vllm_config: Any, model: str, tensor_parallel_size: int, way: str
) -> None:
    import torch

    hidden, qkvz, ba = SHAPES[model]
    sizes = [qkvz // tensor_parallel_size, ba // tensor_parallel_size]
    (layer,) = make_layers(1, (hidden, *sizes))
    if way not in choices(facts(layer)):
        pytest.skip("such padding is too much for this shape, or none")
    exact_weight = torch.cat([layer.in_proj_qkvz.weight, layer.in_proj_ba.weight]).double()
    layer.gdn_tuned = dict.fromkeys(SIZES, way)
    for tokens in (*SIZES, 3):
        x = torch.randn(tokens, hidden, device="cuda", dtype=torch.bfloat16)
        with context(vllm_config):
            one_gemm = fused_op(layer, x)
            graph, captured = capture(lambda x=x: fused_op(layer, x))
        graph.replay()
        torch.cuda.synchronize()
        used, alone = sum(sizes), layer.gdn_fused.apply(x)
        assert torch.equal(one_gemm[:, :used], alone[:, :used]), "outside a graph there is one GEMM"
        if tokens not in layer.gdn_tuned:
            assert torch.equal(captured[:, :used], one_gemm[:, :used])
        elif way in PADDED_TO:
            assert torch.equal(captured[:, :used], layer.gdn_fused.apply(x, way)[:, :used])
        exact = (x.double() @ exact_weight.T).split(sizes, dim=-1)
        stock = layer.in_proj_qkvz(x)[0], layer.in_proj_ba(x)[0]
        for got, two, want in zip(captured.split([*sizes, layer.gdn_fused.padding], -1), stock, exact, strict=False):
            error, allowed = (got - want).norm(), (two - want).norm()
            assert error <= TOLERANCE * allowed, f"{tokens} tokens: {error} against {allowed}"


@pytest.mark.parametrize("quantization", ["none", "fp8"])
def test_the_tuner_times_chooses_and_remembers(
    make_layers: Callable[..., list[Any]],
    vllm_config: Any,
    quantization: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import torch
    from vllm.utils import torch_utils

    from vllm_gdn_plugin import host
    from vllm_gdn_plugin.tune.times import Tuner

    monkeypatch.setattr(host, "tuning_directory", lambda: tmp_path)
    monkeypatch.setattr(vllm_config.compilation_config, "cudagraph_capture_sizes", SIZES)
    layers = make_layers(6, SHAPES["27B"], quantization)
    torch.cuda.empty_cache()
    torch.cuda.synchronize()
    graphs_exist = host.cuda_graphs_exist()
    held = torch.cuda.memory_reserved()  # not what CUDA has taken: it loads kernels when they are first called
    random = torch.cuda.get_rng_state()
    stream, known = torch.cuda.current_stream(), getattr(torch_utils._current_stream_tls, "value", None)
    tuner, phrases = Tuner(), [""]
    while "earlier" not in phrases[-1]:  # what does not fit into one start's time is timed at the next
        before = layers[0].gdn_tuned.keys()
        for layer in layers:
            layer.gdn_tuned = {}
            tuner.add(layer, facts(layer))
        phrases.append(tuner.run(layers[-1]))
        assert layers[0].gdn_tuned.keys() > before or "earlier" in phrases[-1]
    assert all(layer.gdn_tuned.keys() == set(SIZES) for layer in layers)
    print(*phrases, *(file.read_text() for file in tmp_path.iterdir()), sep="\n")
    assert "(timed in " in phrases[1]
    assert phrases[-1] == phrases[-2].partition(" (")[0] + " (timed at an earlier start)"
    torch.cuda.empty_cache()
    torch.cuda.synchronize()
    assert torch.equal(torch.cuda.get_rng_state(), random), "or the engine would sample other tokens than stock"
    assert torch.cuda.current_stream() == stream
    assert torch_utils._current_stream_tls.value is known, "or vLLM would not take a stream of its own"
    # The auxiliary stream's, and without graphs of other tests the current stream's was given back instead.
    left_behind = WORKSPACE * (1 + graphs_exist) + A_LITTLE
    assert torch.cuda.memory_reserved() - held <= left_behind


def test_times_stand_though_the_memory_cannot_be_given_back(
    make_layers: Callable[..., list[Any]], vllm_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm_gdn_plugin import host
    from vllm_gdn_plugin.tune import ways
    from vllm_gdn_plugin.tune.times import case_of

    def fail() -> None:
        raise ZeroDivisionError("planted")

    said: list[str] = []
    monkeypatch.setattr(host, "release_workspaces", fail)
    monkeypatch.setattr(ways, "warn_once", lambda *line: said.append(": ".join(line)))
    layers = make_layers(4, SHAPES["35B-A3B"], "fp8")
    times = ways.timed(layers, case_of(facts(layers[0]), 2048, host.gpu()), [1, 16])
    assert {tokens: sorted(each) for tokens, each in times.items()} == {
        1: [DUAL_STREAM, NARROW_KERNEL, SERIAL],
        16: [DUAL_STREAM, SERIAL],
    }
    (line,) = said
    assert line.endswith("not given back: unexpected ZeroDivisionError: planted")


def test_a_narrow_kernel_that_fails_is_not_timed_as_what_stands_in_for_it(
    make_layers: Callable[..., list[Any]], vllm_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm_gdn_plugin import host
    from vllm_gdn_plugin.run import narrow
    from vllm_gdn_plugin.tune import ways
    from vllm_gdn_plugin.tune.times import case_of

    def fail(*args: Any) -> Any:
        raise ZeroDivisionError("planted")

    monkeypatch.setattr(narrow, "linear", fail)
    layers = make_layers(4, SHAPES["35B-A3B"], "fp8")
    with pytest.raises(ZeroDivisionError, match="planted"):
        ways.timed(layers, case_of(facts(layers[0]), 2048, host.gpu()), [1])


def test_dual_stream_that_was_timed_as_slower_runs_serially_in_a_graph(
    make_layers: Callable[..., list[Any]], vllm_config: Any
) -> None:
    import torch

    from vllm_gdn_plugin.decide.scratch import StaysSerial
    from vllm_gdn_plugin.run.dual_stream import why_serial

    (layer,) = make_layers(1, SHAPES["35B-A3B"], "fp8")
    layer.gdn_tuned = {4: SERIAL, 8: DUAL_STREAM}
    found: dict[int, Any] = {}
    for tokens in (2, 4, 8):
        x = torch.randn(tokens, 2048, device="cuda", dtype=torch.bfloat16)
        capture(lambda x=x: found.update({len(x): why_serial(layer, x)}) or x + 1)
    assert found == {2: None, 4: StaysSerial.TIMED_SLOWER, 8: None}
