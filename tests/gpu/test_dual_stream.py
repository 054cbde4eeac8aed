"""The ops on a GPU: bit-equal to the serial projections, eager and in CUDA graphs, on the streams it says."""

import gc
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any

import pytest
from gpu_layers import SHAPES, TOKENS


def quantized(name: str) -> Any:
    """vLLM's configuration of a quantised ``in_proj_qkvz``, as the checkpoints have them."""
    if name == "fp8":
        from vllm.model_executor.layers.quantization.fp8 import Fp8Config

        return Fp8Config(True, "dynamic", weight_block_size=[128, 128])
    if name == "awq":
        from vllm.model_executor.layers.quantization.auto_awq import AutoAWQConfig

        return AutoAWQConfig.from_config(
            {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}
        )
    if name == "gptq":
        from vllm.model_executor.layers.quantization.auto_gptq import AutoGPTQConfig

        return AutoGPTQConfig.from_config(
            {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}
        )
    return None


def context(vllm_config: Any) -> AbstractContextManager[None]:
    from vllm.forward_context import set_forward_context

    return set_forward_context(None, vllm_config)  # type: ignore[no-any-return]


def op(layer: Any, hidden_states: Any) -> Any:
    """Both projections, as the plugin's layer has them computed."""
    from vllm_gdn_plugin.run.dual_stream import project_side_by_side

    return project_side_by_side(layer, hidden_states)


def serial(layer: Any, hidden_states: Any) -> Any:
    return layer.in_proj_qkvz(hidden_states)[0], layer.in_proj_ba(hidden_states)[0]


def capture(function: Callable[[], Any], warm_up: bool = True) -> tuple[Any, Any]:
    """(graph, its outputs) of a function, warmed up as vLLM does before it captures."""
    import torch

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    if warm_up:
        with torch.cuda.stream(stream):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        outputs = function()
    return graph, outputs


def same_bits(left: Any, right: Any) -> bool:
    import torch

    return all(torch.equal(a.view(torch.int16), b.view(torch.int16)) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("kind", ["bfloat16", "float16", "fp8", "awq", "gptq"])
@pytest.mark.parametrize("tensor_parallel_size", [1, 4])
@pytest.mark.parametrize("model", SHAPES)
def test_bit_equal_to_serial_eager_and_captured(
    vllm_config: Any, make_layer: Callable[..., Any], model: str, tensor_parallel_size: int, kind: str
) -> None:
    import torch

    hidden, qkvz, ba = SHAPES[model]
    dtype = torch.float16 if kind == "float16" else torch.bfloat16
    layer = make_layer((hidden, qkvz // tensor_parallel_size, ba // tensor_parallel_size), dtype, quantized(kind))
    with context(vllm_config):
        for num_tokens in TOKENS:
            x = torch.randn(num_tokens, hidden, device="cuda", dtype=dtype)
            assert same_bits(op(layer, x), serial(layer, x)), f"eager, {num_tokens} tokens"
            graph, outputs = capture(lambda x=x: op(layer, x))
            reference_graph, reference = capture(lambda x=x: serial(layer, x))
            for _ in range(3):
                x.normal_()
                for output in outputs:
                    output.fill_(float("nan"))
                graph.replay()
                reference_graph.replay()
                torch.cuda.synchronize()
                assert torch.isfinite(outputs[0]).all()
                assert same_bits(outputs, reference), f"captured, {num_tokens} tokens"


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """On which stream each `in_proj_ba` is enqueued from now on."""
    import torch

    from vllm_gdn_plugin.run import dual_stream

    seen: list[Any] = []
    join = dual_stream.join

    def watched(forked: Any, work: Callable[[], Any]) -> Any:
        def noting() -> Any:
            seen.append(torch.cuda.current_stream())
            return work()

        return join(forked, noting)

    monkeypatch.setattr(dual_stream, "join", watched)
    return seen


@pytest.mark.parametrize("plain_gemm", [True, False])
def test_forks_to_the_auxiliary_stream_and_joins_only_while_capturing(
    vllm_config: Any, make_layer: Callable[..., Any], streams: list[Any], plain_gemm: bool
) -> None:
    import torch
    from vllm.utils.torch_utils import aux_stream

    from vllm_gdn_plugin.run.dual_stream import MOST_OVERLAPPED

    layer = make_layer(SHAPES["9B"])
    layer.gdn.plain_gemm = plain_gemm
    layer.gdn.ways = {8: "dual_stream", 16: "serial", 64: "dual_stream"}

    def on_the_auxiliary_stream(num_tokens: int, captured: bool) -> bool:
        x = torch.randn(num_tokens, 4096, device="cuda", dtype=torch.bfloat16)
        here = torch.cuda.Stream()
        here.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(here):
            op(layer, x)
            assert streams.pop() == here
            if captured:
                with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=here):
                    op(layer, x)
                return bool(streams.pop() == aux_stream())
        return False

    with context(vllm_config):
        found = {
            n: on_the_auxiliary_stream(n, captured=True)
            for n in (7, 8, 9, 16, 17, 64, MOST_OVERLAPPED, MOST_OVERLAPPED + 1)
        }
        assert not on_the_auxiliary_stream(8, captured=False)
    overlapped = {n for n, is_so in found.items() if is_so}
    assert overlapped == {7, 8, 17, 64, MOST_OVERLAPPED}


def test_a_join_without_its_fork_runs_serially(
    vllm_config: Any, make_layer: Callable[..., Any], streams: list[Any]
) -> None:
    """On a copy of what the fork was given, after none, in another graph."""
    import torch
    from vllm.utils.torch_utils import _encode_layer_name, aux_stream

    layer = make_layer(SHAPES["9B"])
    x = torch.randn(8, 4096, device="cuda", dtype=torch.bfloat16)
    want = serial(layer, x)
    ops, name = torch.ops.vllm_gdn_plugin, _encode_layer_name(layer.prefix)
    ba = layer.in_proj_ba

    def fork() -> None:
        ops.gdn_in_proj_fork(x, name)

    def join(hidden_states: Any) -> Any:
        qkvz, _ = layer.in_proj_qkvz(hidden_states)
        return qkvz, ops.gdn_in_proj_join(hidden_states, qkvz, ba.weight.t(), ba.output_size_per_partition, name)

    in_vain: dict[str, Callable[[], Any]] = {
        "a copy": lambda: (fork(), join(x.clone()))[1],
        "no fork": lambda: join(x),
    }
    with context(vllm_config):
        op(layer, x)
        for what, call in in_vain.items():
            streams.clear()
            graph, outputs = capture(call)
            graph.replay()
            assert aux_stream() not in streams, what
            assert same_bits(outputs, want), what
        capture(fork)
        streams.clear()
        graph, outputs = capture(lambda: join(x), warm_up=False)
        graph.replay()
        assert len(streams) == 1
        assert aux_stream() not in streams
        assert same_bits(outputs, want)


def test_overlaps_in_time(vllm_config: Any, make_layer: Callable[..., Any]) -> None:
    """The kernels of one replay lie on two streams, and the narrow one starts before the wide one ends."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    layer = make_layer(SHAPES["27B"])
    x = torch.randn(8, 5120, device="cuda", dtype=torch.bfloat16)
    with context(vllm_config):
        graph, _ = capture(lambda: op(layer, x))
    graph.replay()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        graph.replay()
        torch.cuda.synchronize()
    on_gpu = torch.autograd.DeviceType.CUDA
    kernels = [e for e in trace.events() if e.device_type == on_gpu and "mem" not in e.name.lower()]
    wide = max(kernels, key=lambda e: e.time_range.elapsed_us())
    others = [e for e in kernels if e is not wide]
    assert others, "the narrow projection left no kernel in the trace"
    assert any(e.time_range.start < wide.time_range.end and wide.time_range.start < e.time_range.end for e in others)


REPLAYS = 100_000


@pytest.mark.parametrize("kind", ["bfloat16", "fp8"])
def test_many_replays_with_other_work_on_the_auxiliary_stream(
    vllm_config: Any, make_layer: Callable[..., Any], kind: str
) -> None:
    """Several sizes in random order, with allocator churn and foreign work on the auxiliary stream between them."""
    import torch
    from vllm.utils.torch_utils import aux_stream

    layer = make_layer(SHAPES["35B-A3B"], torch.bfloat16, quantized(kind))
    rng = random.Random(0)
    graphs = []
    with context(vllm_config):
        for num_tokens in (1, 2, 4, 8, 16, 32, 64, 128, 256):
            x = torch.randn(num_tokens, 2048, device="cuda", dtype=torch.bfloat16)
            graph, outputs = capture(lambda x=x: op(layer, x))
            reference_graph, reference = capture(lambda x=x: serial(layer, x))
            reference_graph.replay()
            graphs.append((graph, outputs, [t.clone() for t in reference], x))  # x: what the graph reads
    wrong = torch.zeros((), device="cuda", dtype=torch.int64)
    auxiliary = aux_stream()
    with torch.cuda.stream(auxiliary):
        other = torch.randn(512, 512, device="cuda")
    for step in range(REPLAYS):
        graph, outputs, expected, _ = rng.choice(graphs)
        outputs[1].fill_(float("nan"))
        with torch.cuda.stream(auxiliary):
            other = torch.tanh(other @ other)
        if step % 7 == 0:
            churn = [torch.empty(rng.randrange(1, 1 << 20), device="cuda") for _ in range(3)]
            del churn
        graph.replay()
        for got, want in zip(outputs, expected, strict=True):
            wrong += (got.view(torch.int16) != want.view(torch.int16)).any()
    torch.cuda.synchronize()
    assert wrong.item() == 0


def test_a_graph_that_overlapped_leaves_nothing_in_its_memory_pool(
    make_layer: Callable[..., Any], vllm_config: Any
) -> None:
    """cuBLAS's workspace for the second stream is not in it: a pool that outlives its graphs fails the next engine."""
    import torch

    layer = make_layer(SHAPES["27B"])

    def overlapped() -> Any:
        x = torch.randn(4, 5120, device="cuda", dtype=torch.bfloat16)
        with context(vllm_config):
            graph, _ = capture(lambda: op(layer, x))
        graph.replay()
        torch.cuda.synchronize()
        return graph.pool()

    with ThreadPoolExecutor(1) as thread:  # another thread has another cuBLAS handle, which has no workspaces yet
        pool = thread.submit(overlapped).result()
    gc.collect()
    torch.cuda.empty_cache()
    assert [s["total_size"] for s in torch.cuda.memory_snapshot() if tuple(s["segment_pool_id"]) == tuple(pool)] == []
