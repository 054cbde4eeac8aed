"""The decode kernel beside vLLM's own kernels, on a GPU with vLLM: is it right, how long do its variants take?

    python benchmarks/decode_kernel.py check    errors against float64 beside vLLM's; which variants give the same bits
    python benchmarks/decode_kernel.py sweep    microseconds of a layer between its projections' GEMM and out_proj's

``check --replays N`` also replays CUDA graphs of all sizes, N times each, in random order: the variant that counts
beside the one that does not, their bits compared along the way.

``sweep`` captures as many layers in a CUDA graph as it takes for their states not to fit the cache, each with weights
of its own and a real GEMM before and after; the section is the time of a layer less that of its two GEMMs alone.
Graphs are replayed in random order, the median counts.
"""

import argparse
import json
import math
import random
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "kernel")]

DIM, EPS, DEVICE = 128, 1e-6, "cuda"
SHAPES = {  # hidden size, key heads, value heads; -tp4: one rank of four
    "35B-A3B": (2048, 16, 32),
    "27B": (5120, 16, 48),
    "122B": (3072, 16, 64),
    "35B-A3B-tp4": (2048, 4, 8),
    "27B-tp4": (5120, 4, 12),
}
VARIANTS = ("few", "many")
MOST_LAYERS, FEWEST_LAYERS = 24, 4
STATE_BYTES = 600e6  # of a graph's layers, if MOST_LAYERS have so much: 12 times the cache of an H200
COMPARED_EVERY = 20  # replays of check; a wrong step shows in the recurrent state for much longer
COPY_RATE = 4.3e12  # bytes/s, what an H200 copies with: the floor


def host() -> Any:
    """vLLM's own three functions, where the releases have them that may run the kernel."""
    from types import SimpleNamespace

    from vllm.model_executor.layers.mamba.ops.causal_conv1d import causal_conv1d_update
    from vllm.third_party.flash_linear_attention.ops.fused_recurrent import (
        fused_recurrent_gated_delta_rule_packed_decode,
    )
    from vllm.third_party.flash_linear_attention.ops.layernorm_guard import rmsnorm_fn

    return SimpleNamespace(
        conv=causal_conv1d_update, decode=fused_recurrent_gated_delta_rule_packed_decode, norm=rmsnorm_fn
    )


def run_stock(vllm: Any, step: Any) -> Any:
    """vLLM's kernels from the projections' result to the input of out_proj, its fill and copies included.

    ``step``: its mixed_qkvz is [q | k | v | z] and is overwritten, b and a lie beside each other in one tensor.
    """
    import torch

    tokens, heads = step.b.shape
    qkv = step.conv_weight.shape[0]
    ba = step.b.as_strided((2, tokens, heads), (heads, step.b.stride(0), 1)).contiguous()  # one copy, as Inductor's
    out = torch.zeros(tokens, heads * DIM, device=step.b.device, dtype=torch.bfloat16)
    y = vllm.conv(
        step.mixed_qkvz[:, :qkv],
        step.conv_state.transpose(-1, -2),
        step.conv_weight,
        None,
        "silu",
        conv_state_indices=step.state_indices,
        validate_data=False,
    )
    vllm.decode(
        mixed_qkv=y,
        a=ba[1],
        b=ba[0],
        A_log=step.A_log,
        dt_bias=step.dt_bias,
        scale=DIM**-0.5,
        initial_state=step.ssm_state,
        out=out.view(tokens, 1, heads, DIM),
        ssm_state_indices=step.state_indices,
        use_qk_l2norm_in_kernel=True,
    )
    z = step.mixed_qkvz[:, qkv:].reshape(-1, DIM)
    gated = vllm.norm(out.view(-1, DIM), step.norm_weight, None, z=z, eps=EPS, group_size=None, norm_before_gate=True)
    return gated.view(tokens, -1)


def run_kernel(step: Any, name: str, counters: Any, zeros: bool) -> Any:
    import torch

    from vllm_gdn_plugin.run.decode_kernel import FEW, MANY, decode

    variant = {"few": FEW, "many": MANY}[name]
    tokens, heads = step.b.shape
    make = torch.zeros if zeros else torch.empty
    out = make(tokens, heads, DIM, device=step.b.device, dtype=torch.bfloat16)
    decode(**vars(step), out=out, counters=counters, eps=EPS, gate="silu", variant=variant)
    return out.view(tokens, -1)


class Layers:
    """The weights and states of GDN layers of a shape; states in one cache, each layer with slots of its own."""

    def __init__(self, shape: str, dtype: Any, layers: int, slots: int, tokens: int):
        import torch
        from reference import Step

        from vllm_gdn_plugin.run.decode_kernel import counters_for

        hidden, self.key_heads, heads = SHAPES[shape]
        self.qkv, self.values, self.heads = (2 * self.key_heads + heads) * DIM, heads * DIM, heads
        kwargs: dict[str, Any] = {"device": DEVICE, "dtype": torch.bfloat16}
        self.slots = torch.randperm(slots, device=DEVICE, dtype=torch.int32) + 1
        self.counters = counters_for(tokens, self.key_heads, DEVICE)
        self.conv_state = torch.zeros(slots + 1, 3, self.qkv, **kwargs)
        self.ssm_state = torch.zeros(slots + 1, heads, DIM, DIM, device=DEVICE, dtype=dtype)
        nothing = torch.empty(0, **kwargs)
        self.layers = [
            (
                torch.randn(self.qkv + self.values + 2 * heads, hidden, **kwargs) * hidden**-0.5,
                torch.randn(hidden, self.values, **kwargs) * self.values**-0.5,
                Step(
                    mixed_qkvz=nothing,
                    b=nothing,
                    a=nothing,
                    conv_state=self.conv_state,
                    conv_weight=(torch.randn(self.qkv, 4, device=DEVICE) * 0.5).bfloat16(),
                    A_log=torch.rand(heads, device=DEVICE).log(),
                    dt_bias=(torch.randn(heads, device=DEVICE) - 2).bfloat16(),
                    ssm_state=self.ssm_state,
                    state_indices=nothing,
                    norm_weight=torch.ones(DIM, **kwargs),
                ),
            )
            for _ in range(layers)
        ]

    def state_bytes(self) -> int:
        """Of one token of one layer, recurrent state, read or written once."""
        return self.ssm_state[0].numel() * self.ssm_state.element_size()

    def step(self, layer: int, projected: Any) -> Any:
        tokens = projected.shape[0]
        at = self.qkv + self.values
        return self.layers[layer][2].but(
            mixed_qkvz=projected[:, :at],
            b=projected[:, at : at + self.heads],
            a=projected[:, at + self.heads :],
            state_indices=self.slots[layer * tokens : (layer + 1) * tokens],
        )

    def forward(self, x: Any, layers: int, section: Callable[[Any], Any] | None) -> Any:
        """GEMM, section, GEMM for each layer; None: the GEMMs alone."""
        import torch

        at = self.qkv
        for i in range(layers):
            projected = torch.mm(x, self.layers[i][0].t())
            y = projected[:, at : at + self.values] if section is None else section(self.step(i, projected))
            x = torch.mm(y, self.layers[i][1].t())
        return x


def sections(vllm: Any, made: Layers, variants: list[str], zeros: bool) -> dict[str, Callable[[Any], Any] | None]:
    kernels = {name: partial(run_kernel, name=name, counters=made.counters, zeros=zeros) for name in variants}
    return {"gemms": None, "stock": partial(run_stock, vllm), **kernels}


def configurations(args: argparse.Namespace) -> list[tuple[str, str]]:
    return [(shape, dtype) for shape in args.shapes for dtype in args.dtypes]


def capture(run: Callable[[], Any]) -> Any:
    """A CUDA graph of it. Its first call, which may compile, is outside."""
    import torch

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        run()
    return graph


def wrong(vllm: Any, made: Layers, section: Callable[[Any], Any]) -> str | None:
    """Why a variant is left out: in three steps of three tokens and padding it does not give what vLLM gives."""
    import torch

    torch.manual_seed(1)
    width = made.qkv + made.values + 2 * made.heads
    inputs = torch.randn(3, 4, width, device=DEVICE, dtype=torch.bfloat16)
    results = []
    for way in (lambda step: run_stock(vllm, step), section):
        made.conv_state.zero_()
        made.ssm_state.zero_()
        for projected in inputs.clone():
            step = made.step(0, projected)
            out = way(step.but(state_indices=step.state_indices * torch.tensor([1, 1, 0, 1], device=DEVICE).int()))
        used = step.state_indices[[0, 1, 3]].long()
        results.append([t.double().clone() for t in (out, made.ssm_state[used], made.conv_state[used])])
    (out, ssm, conv), (out2, ssm2, conv2) = results
    far = [float((y - x).norm() / x.norm()) for x, y in ((out, out2), (ssm, ssm2))]
    if max(far) < 1e-2 and torch.equal(conv, conv2) and not made.counters.any():
        return None
    made.counters.zero_()
    return f"output and state differ by {far[0]:.1e} and {far[1]:.1e}, conv state equal: {torch.equal(conv, conv2)}"


def sweep(args: argparse.Namespace) -> dict[str, Any]:
    import torch

    vllm = host()
    rows: list[dict[str, Any]] = []
    result = {"rows": rows, "left_out": {}}
    for shape, dtype in configurations(args):
        sizes = sorted(args.tokens)
        _, _, heads = SHAPES[shape]
        bytes_of = heads * DIM * DIM * getattr(torch, dtype).itemsize
        layers_at = {n: min(MOST_LAYERS, max(FEWEST_LAYERS, math.ceil(STATE_BYTES / n / bytes_of))) for n in sizes}
        made = Layers(
            shape,
            getattr(torch, dtype),
            max(layers_at.values()),
            max(max(n * layers for n, layers in layers_at.items()), 4),
            max(*sizes, 4),
        )
        ways = sections(vllm, made, args.variants, args.zeros)
        for name in args.variants:
            try:
                why = wrong(vllm, made, ways[name])  # type: ignore[arg-type]
            except Exception as error:
                why = f"{type(error).__name__}: {str(error).splitlines()[-1] if str(error) else ''}"[:300]
            if why:
                del ways[name]
                result["left_out"][f"{shape} {dtype} {name}"] = why  # type: ignore[index]
                print(f"{shape} {dtype}: {name} is left out: {why}", flush=True)
        names = [name for name in ways if name != "gemms"]
        print(f"\n{shape}, {dtype} state; us a layer, without its GEMMs\n" + heading(names), flush=True)
        for n in sizes:
            if time.monotonic() > args.deadline:
                print("out of time", flush=True)
                return result
            layers = layers_at[n]
            x = torch.randn(n, SHAPES[shape][0], device=DEVICE, dtype=torch.bfloat16)
            graphs = {name: capture(partial(made.forward, x, layers, way)) for name, way in ways.items()}
            samples = replay(graphs, args.rounds, layers)
            floor = 2 * n * made.state_bytes() / COPY_RATE * 1e6
            medians = {name: statistics.median(times) for name, times in samples.items()}
            row = {
                "shape": shape,
                "dtype": dtype,
                "tokens": n,
                "layers": layers,
                "zeros": args.zeros,
                "floor_us": floor,
                "layer_us": {name: quartiles(times) for name, times in samples.items()},
                "section_us": {name: medians[name] - medians["gemms"] for name in names},
            }
            rows.append(row)
            print(line_of(row, names), flush=True)
            write(args.out, result)
        del made, ways, graphs
        torch.cuda.empty_cache()
    return result


def replay(graphs: dict[str, Any], rounds: int, layers: int) -> dict[str, list[float]]:
    """Microseconds a layer, each graph once a round, in random order; the first three rounds don't count."""
    import torch

    marks: dict[str, list[Any]] = {name: [] for name in graphs}
    for _ in range(rounds + 3):
        for name in random.sample(list(graphs), len(graphs)):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graphs[name].replay()
            end.record()
            marks[name].append((start, end))
    torch.cuda.synchronize()
    return {name: [start.elapsed_time(end) * 1e3 / layers for start, end in pairs[3:]] for name, pairs in marks.items()}


def quartiles(times: list[float]) -> list[float]:
    """First, median, third."""
    return [round(t, 3) for t in statistics.quantiles(times, n=4)] if len(times) > 1 else times * 3


def heading(names: list[str]) -> str:
    return f"{'tokens':>6} {'goal':>7} " + " ".join(f"{name:>14}" for name in names)


def line_of(row: dict[str, Any], names: list[str]) -> str:
    """A line of the table; * marks the fastest. The goal is 1.2 times the floor and 5 us."""
    times = row["section_us"]
    best = min(times.values())
    told = (f"{times[name]:.2f}{'*' if times[name] == best else ' '}" for name in names)
    return f"{row['tokens']:>6} {1.2 * row['floor_us'] + 5:>7.2f} " + " ".join(f"{t:>14}" for t in told)


def check(args: argparse.Namespace) -> dict[str, Any]:
    """Many steps of the same tokens by vLLM, by each variant and in float64; then, if asked for, many replays."""
    import torch
    from reference import reference

    vllm = host()
    result: dict[str, Any] = {"rows": [], "replays": []}
    for shape, dtype in configurations(args):
        for n in args.tokens:
            if time.monotonic() > args.deadline:
                print("out of time", flush=True)
                return result
            torch.manual_seed(n)
            made = Layers(shape, getattr(torch, dtype), 1, n, n)
            width = made.qkv + made.values + 2 * made.heads
            start = made.step(0, torch.empty(n, width, device=DEVICE, dtype=torch.bfloat16))
            slots, everyone = start.state_indices.long(), list(range(n))
            ways = {name: way for name, way in sections(vllm, made, args.variants, True).items() if way}
            steps = {
                name: start.but(conv_state=start.conv_state.clone(), ssm_state=start.ssm_state.clone()) for name in ways
            }
            true = start.but(conv_state=start.conv_state.double(), ssm_state=start.ssm_state.double())
            squares, size, other_bits = dict.fromkeys(ways, 0.0), 0.0, dict.fromkeys(ways, 0)
            same_conv, alike = dict.fromkeys(ways, True), {name: list(ways) for name in ways}
            done = 0
            while done < args.steps and time.monotonic() < args.deadline:
                done += 1
                projected = torch.randn(n, width, device=DEVICE, dtype=torch.bfloat16)
                inputs = made.step(0, projected)
                now = {"mixed_qkvz": inputs.mixed_qkvz, "b": inputs.b, "a": inputs.a}
                exact, true.conv_state[slots], true.ssm_state[slots] = reference(
                    true.but(**now), everyone, eps=EPS, gate="silu"
                )
                size += float(exact.square().sum())
                outs = {}
                for name, way in ways.items():
                    fresh = made.step(0, projected.clone())  # vLLM's conv1d overwrites its input
                    outs[name] = way(steps[name].but(mixed_qkvz=fresh.mixed_qkvz, b=fresh.b, a=fresh.a))
                    squares[name] += float((outs[name].view(exact.shape).double() - exact).square().sum())
                    other_bits[name] += int((outs[name] != outs["stock"]).sum())
                    same_conv[name] &= torch.equal(steps[name].conv_state[slots].double(), true.conv_state[slots])
                for name in ways:
                    alike[name] = [other for other in alike[name] if torch.equal(outs[other], outs[name])]
            ssm = {name: float((steps[name].ssm_state[slots].double() - true.ssm_state[slots]).norm()) for name in ways}
            total = float(true.ssm_state[slots].norm())
            for name in ways:
                row = {
                    "shape": shape,
                    "dtype": dtype,
                    "tokens": n,
                    "steps": done,
                    "way": name,
                    "output_error": math.sqrt(squares[name] / size),
                    "state_error": ssm[name] / total,
                    "output_ratio": math.sqrt(squares[name] / squares["stock"]),
                    "state_ratio": ssm[name] / ssm["stock"],
                    "conv_exact": same_conv[name],
                    "outputs_unlike_stock": other_bits[name] / (done * n * made.values),
                    "same_bits_as": [
                        other for other in alike[name] if torch.equal(steps[other].ssm_state, steps[name].ssm_state)
                    ],
                    "counters_zero": not made.counters.any().item(),
                }
                result["rows"].append(row)
                print(" ".join(f"{key}={told(value)}" for key, value in row.items()), flush=True)
            write(args.out, result)
        if args.replays:
            made = Layers(shape, getattr(torch, dtype), 1, max(args.tokens), max(args.tokens))
            row = {"shape": shape, "dtype": dtype, **replays_in_any_order(made, args)}
            result["replays"].append(row)
            print(" ".join(f"{key}={told(value)}" for key, value in row.items()), flush=True)
            write(args.out, result)
    return result


def replays_in_any_order(made: Layers, args: argparse.Namespace) -> dict[str, Any]:
    """The variants side by side, on the same new inputs at each replay and on states of their own, which all sizes
    share, as they share the counters. ``many`` does not count: it shows where ``few`` has counted wrong."""
    import torch

    states = {name: {"conv_state": made.conv_state.clone(), "ssm_state": made.ssm_state.clone()} for name in VARIANTS}
    outs: dict[int, list[Any]] = {}

    def once(n: int) -> None:
        projected = torch.randn(n, made.qkv + made.values + 2 * made.heads, device=DEVICE, dtype=torch.bfloat16)
        step = made.step(0, projected)
        outs[n] = [run_kernel(step.but(**states[name]), name, made.counters, False) for name in VARIANTS]

    graphs = {n: capture(partial(once, n)) for n in args.tokens}
    order = args.tokens * args.replays
    random.shuffle(order)
    few, many = (states[name] for name in VARIANTS)
    result: dict[str, Any] = {"sizes": args.tokens, "asked": len(order), "done": 0, "compared": 0, "wrong": None}
    for done, n in enumerate(order, 1):
        graphs[n].replay()
        if done % COMPARED_EVERY and done < len(order):
            continue
        unlike = [name for name in few if not torch.equal(few[name], many[name])]
        unlike += ["output"] if not torch.equal(*outs[n]) else []
        unlike += ["counters"] if made.counters.any() else []
        result |= {"done": done, "compared": result["compared"] + 1, "wrong": ", ".join(unlike) or None}
        if unlike or time.monotonic() > args.deadline:
            break
    return result


def told(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def write(file: str | None, result: dict[str, Any]) -> None:
    if file:
        Path(file).write_text(json.dumps(result, indent=1) + "\n")


def arguments(line: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["check", "sweep"])
    parser.add_argument("--shapes", help=f"of {', '.join(SHAPES)}; separated by commas")
    parser.add_argument("--dtypes", default="float32", help="of the recurrent state: float32,bfloat16")
    parser.add_argument("--tokens", help="separated by commas")
    parser.add_argument("--variants", default=",".join(VARIANTS), help=f"of {', '.join(VARIANTS)}; separated by commas")
    parser.add_argument(
        "--zeros", action="store_true", help="fill the kernel's output first, as vLLM's packed branch does"
    )
    parser.add_argument("--rounds", type=int, default=11, help="replays of each graph that count")
    parser.add_argument("--steps", type=int, default=100, help="of check")
    parser.add_argument("--replays", type=int, default=0, help="of check, for each size")
    parser.add_argument("--seconds", type=float, default=220, help="stop after that")
    parser.add_argument("--out", help="a JSON file")
    args = parser.parse_args(line)
    args.deadline = time.monotonic() + args.seconds
    default_shapes, default_tokens = ",".join(SHAPES), "1,2,4,8,16,32,64,128,256"
    if args.command == "check":
        default_shapes, default_tokens = "35B-A3B-tp4,27B-tp4", "1,3,16,64,256"
    args.shapes = (args.shapes or default_shapes).split(",")
    args.dtypes = args.dtypes.split(",")
    args.tokens = [int(n) for n in (args.tokens or default_tokens).split(",")]
    args.variants = args.variants.split(",")
    for shape in args.shapes:
        if shape not in SHAPES:
            parser.error(f"no shape {shape!r}: {', '.join(SHAPES)}")
    for dtype in args.dtypes:
        if dtype not in ("float32", "bfloat16"):
            parser.error(f"no dtype {dtype!r}: float32, bfloat16")
    for name in args.variants:
        if name not in VARIANTS:
            parser.error(f"no variant {name!r}: {', '.join(VARIANTS)}")
    return args


def machine() -> dict[str, str]:
    import torch
    import triton
    import vllm

    return {
        "gpu": torch.cuda.get_device_name(),
        "vllm": vllm.__version__,
        "torch": torch.__version__,
        "triton": triton.__version__,
    }


def main() -> None:
    args = arguments()
    about = {"machine": machine(), "command": " ".join(sys.argv)}
    print(json.dumps(about["machine"]), flush=True)
    result = {"check": check, "sweep": sweep}[args.command](args)
    write(args.out, {**about, **result})


if __name__ == "__main__":
    main()
