"""What is timed on this GPU: chosen from its times, kept for the next start, and without a trace in the engine."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gpu_layers import SHAPES
from test_dual_stream import context, quantized

from vllm_gdn_plugin.decide.plan import DUAL_STREAM, SERIAL, LayerFacts, ProjectionFacts

SIZES = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
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
def kept_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    from vllm_gdn_plugin.tune import settle

    monkeypatch.setattr(settle, "tuning_directory", lambda: tmp_path)
    return tmp_path


@pytest.fixture
def leaves_no_trace(vllm_config: Any) -> Callable[[], None]:
    """Called, it notes what is there; called again, it asserts that it is so again."""
    import torch
    from vllm.utils import torch_utils

    from vllm_gdn_plugin.host.streams import cuda_graphs_exist

    torch.cuda.empty_cache()
    torch.cuda.synchronize()
    graphs_exist = cuda_graphs_exist()
    noted: list[tuple[Any, ...]] = []

    def check() -> None:
        torch.cuda.empty_cache()
        torch.cuda.synchronize()
        known = getattr(torch_utils._current_stream_tls, "value", None)
        reserved = torch.cuda.memory_reserved()  # not what CUDA has taken: it loads kernels when they are first called
        noted.append((torch.cuda.get_rng_state(), torch.cuda.current_stream(), known, reserved))
        (random, stream, *others), (random_now, stream_now, *others_now) = noted[0], noted[-1]
        assert torch.equal(random_now, random), "or the engine would sample other tokens than stock"
        assert stream_now == stream
        assert others_now[0] is others[0], "or vLLM would take no stream of its own"
        # The auxiliary stream's, and without graphs of other tests the current stream's was given back instead.
        assert others_now[1] - others[1] <= WORKSPACE * (1 + graphs_exist) + A_LITTLE

    return check


@pytest.mark.parametrize("tensor_parallel_size", [1, 4])
@pytest.mark.parametrize("model", SHAPES)
def test_the_rows_of_a_weight_are_timed_once(
    model: str,
    tensor_parallel_size: int,
    kept_in: Path,
    leaves_no_trace: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import torch

    from vllm_gdn_plugin.run import timing
    from vllm_gdn_plugin.run.fused import rows_to_choose_from

    hidden, qkvz, ba = SHAPES[model]
    like = torch.zeros(qkvz // tensor_parallel_size, hidden, device="cuda", dtype=torch.bfloat16)
    outputs = (qkvz + ba) // tensor_parallel_size
    leaves_no_trace()
    assert timing.rows_of(like, outputs, ()) == rows_to_choose_from(outputs, 2 * hidden)[0]
    found = timing.rows_of(like, outputs, SIZES)
    leaves_no_trace()
    assert found in rows_to_choose_from(outputs, 2 * hidden)
    (file,) = kept_in.iterdir()
    print(found, file.read_text())
    kept = json.loads(file.read_text())["microseconds and spread"]
    if set(kept) >= {str(n) for n in SIZES if n <= timing.ROWS_TIMED_TO}:  # else some were noisy, or out of time
        monkeypatch.setattr(timing, "timed", lambda *args, **kwargs: pytest.fail("timed again"))
        assert timing.rows_of(like, outputs, SIZES) == found


@pytest.mark.parametrize("kind", ["bfloat16", "fp8"])
def test_the_ways_of_a_layer_are_timed_once(
    make_layer: Callable[..., Any],
    vllm_config: Any,
    kept_in: Path,
    leaves_no_trace: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    import torch

    from vllm_gdn_plugin.run import timing

    layers = [make_layer(SHAPES["27B"], torch.bfloat16, quantized(kind)) for _ in range(6)]
    leaves_no_trace()
    chosen, phrases = {}, [""]
    with context(vllm_config):
        while (
            "earlier" not in phrases[-1] and len(phrases) < 6
        ):  # what does not fit into one start is timed at the next
            chosen, phrase = timing.ways_of(layers, layers[:-1], facts(layers[0]), SIZES)
            phrases.append(phrase)
    leaves_no_trace()
    print(*phrases, *(file.read_text() for file in kept_in.iterdir()), sep="\n")
    assert set(chosen) <= set(SIZES)
    assert set(chosen.values()) <= {DUAL_STREAM, SERIAL}
    assert "(timed in " in phrases[1]
    kept = json.loads(next(kept_in.iterdir()).read_text())["microseconds and spread"]
    if set(kept) == {str(n) for n in SIZES}:  # else some were noisy
        assert phrases[-1] == phrases[-2].partition(" (")[0] + " (timed at an earlier start)"
        monkeypatch.setattr(timing, "timed", lambda *args, **kwargs: pytest.fail("timed again"))
        assert timing.ways_of(layers, layers, facts(layers[0]), SIZES)[0] == chosen


def test_timing_that_fails_leaves_no_trace_either(
    make_layer: Callable[..., Any],
    vllm_config: Any,
    kept_in: Path,
    leaves_no_trace: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import torch

    from vllm_gdn_plugin.run import timing
    from vllm_gdn_plugin.tune.timer import CudaTimer

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise ZeroDivisionError("planted")

    layers = [make_layer(SHAPES["35B-A3B"], torch.bfloat16, quantized("fp8")) for _ in range(4)]
    leaves_no_trace()
    monkeypatch.setattr(CudaTimer, "measure", fail)
    with context(vllm_config), pytest.raises(ZeroDivisionError, match="planted"):
        timing.ways_of(layers, layers, facts(layers[0]), [1, 16])
    leaves_no_trace()
    assert not list(kept_in.iterdir())


def test_the_timer_tells_one_kernel_from_ten() -> None:
    import torch

    from vllm_gdn_plugin.tune.timer import timed

    x = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)

    def gemms(count: int) -> Callable[[], Any]:
        def run() -> Any:
            for _ in range(count):
                result = x @ x
            return result

        return run

    times = timed(lambda tokens: {"one": [gemms(1)] * 4, "ten": [gemms(10)] * 4}, [1], 0)[1]
    assert times["ten"].microseconds > times["one"].microseconds
