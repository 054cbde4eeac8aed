"""The scripts of `benchmarks/` that need a GPU for their numbers: all that can be known without one."""

import gzip
import importlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def needs(*names: str) -> pytest.MarkDecorator:
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


needs_bench = needs("torch", "numpy", "scipy", "tqdm")


def script(name: str, *arguments: object, **settings: str) -> "subprocess.CompletedProcess[str]":
    line = [sys.executable, str(BENCHMARKS / name), *map(str, arguments)]
    return subprocess.run(line, env={**os.environ, **settings}, capture_output=True, text=True)


# narrow_kernel.py

SMALL = ("--device", "cpu", "--tensor-parallel-size", "1", "--rounds", "1")


@needs_bench
def test_torchs_candidates_are_verified_and_timed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from narrow_kernel import main

    assert main(["--output", str(tmp_path), "--shape", "256,512,48", "--tokens", "1,20", *SMALL]) == 0
    result = json.loads((tmp_path / "narrow-kernel.json").read_text())
    assert [row["tokens"] for row in result["rows"]] == [1, 20]
    for row in result["rows"]:
        assert not row["refused"]
        assert list(row["samples_us"]) == ["cublas", "transposed", "padded"]
        assert set(row["beside"]["plain"]["samples_us"]) == {*row["samples_us"], "cublas, enqueued first", "qkvz"}
        assert row["bytes_moved"] == 2 * (48 * 256 + row["tokens"] * (256 + 48))
    assert (tmp_path / "narrow-kernel.md").read_text().strip() == capsys.readouterr().out.strip()


@pytest.mark.slow
@needs("torch", "numpy", "scipy", "tqdm", "triton")
def test_the_triton_candidates_compute_the_projection(tmp_path: Path) -> None:
    """In Triton's interpreter, which multiplies no bfloat16: whole and partial blocks of tokens, rows and columns."""
    options = ("--dtype", "float16", "--shape", "320,512,24", "--tokens", "3,70")
    done = script("narrow_kernel.py", "--output", tmp_path, *SMALL, *options, TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    for row in json.loads((tmp_path / "narrow-kernel.json").read_text())["rows"]:
        assert not row["refused"]
        assert sum(name.startswith("triton_") for name in row["samples_us"]) == 5
        assert "narrow_kernel" in row["samples_us"]


@needs_bench
@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("narrow_kernel", ("--preset", "nobody"), "--preset 'nobody' is not known"),
        ("narrow_kernel", ("--beside", "int4"), "--beside 'int4' is neither plain nor fp8"),
        ("narrow_kernel", ("--beside", "fp8"), "--beside fp8 needs --device cuda"),
        ("narrow_kernel", ("--shape", "256,512"), "is not hidden,qkvz,ba"),
        ("narrow_kernel", ("--tokens", "0"), "is not whole numbers"),
        ("narrow_kernel", ("--rounds", "1,2"), "--rounds '1,2' is not one number"),
        ("fp8_addresses", ("--places", "0"), "--places '0' is not"),
        ("fp8_addresses", ("--rounds", "1,2"), "--rounds '1,2' is not one number"),
        ("same_work", ("--graphs", "none"), "--graphs 'none' is not"),
        ("fused_rows", ("--multiples", "0"), "--multiples '0' is not"),
        ("same_work", ("--quantization", "fp8"), "--quantization fp8 needs --device cuda"),
    ],
)
def test_wrong_options_get_one_line(
    tmp_path: Path, name: str, options: tuple[str, ...], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    main = importlib.import_module(name).main
    assert main(["--output", str(tmp_path), "--device", "cpu", *options]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"{name}.py: ")
    assert told.count("\n") == 1
    assert says in told


def test_ctrl_c_says_what_is_left(capsys: pytest.CaptureFixture[str]) -> None:
    from shape_command import run_script

    def interrupt(command: str) -> int:
        assert command == "python benchmarks/script.py --tokens '1, 2'"
        raise KeyboardInterrupt

    assert run_script("script.py", ["--tokens", "1, 2"], interrupt, "nothing is written") == 130
    assert capsys.readouterr().err == "script.py: interrupted; nothing is written\n"


@needs_bench
def test_a_candidate_that_errs_or_does_not_repeat_is_refused() -> None:
    import torch
    from narrow_kernel import CUBLAS, prepare, why_refused

    from vllm_gdn_plugin.bench.timing import CpuTimer

    exact = torch.full((2, 3), 2.0, dtype=torch.float64)
    values = iter(range(1000))
    works: dict[str, Callable[[], Any]] = {
        CUBLAS: lambda: (torch.full((2, 3), 2.002),),
        "as exact": lambda: (torch.full((2, 3), 1.998),),
        "less exact": lambda: (torch.full((2, 3), 2.003),),
        "not a number": lambda: (torch.full((2, 3), torch.nan),),
        "changes": lambda: (torch.full((2, 3), 2 + 1e-6 * next(values)),),
    }
    prepared, errors, refused = prepare(CpuTimer(), works, exact)
    assert list(prepared) == [CUBLAS, "as exact"]
    assert "its error against float64" in refused["less exact"]
    assert "its error against float64" in refused["not a number"]
    assert refused["changes"] == "20 repeats do not give the same bits"
    assert errors["less exact"] > errors[CUBLAS]

    def fails() -> Any:
        raise RuntimeError("no kernel image\nfor this device")

    _, _, refused = prepare(CpuTimer(), works | {"fails": fails}, exact)
    assert refused["fails"] == "RuntimeError: no kernel image for this device"
    outputs = (torch.zeros(2),)

    def replay() -> None:  # as a CUDA graph, which writes where it wrote before
        outputs[0].add_(1)

    assert why_refused(lambda: None, outputs, 0.0, 0.0) is None
    assert why_refused(replay, outputs, 0.0, 0.0) is not None


def row(cublas: float, other: float) -> dict[str, Any]:
    spread = (0.99, 1.0, 1.01)
    return {
        "bytes_moved": 1_000_000,  # in 10 us: 100 GB/s
        "samples_us": {"cublas": [cublas * s for s in spread], "other": [other * s for s in spread]},
        "refused": {},
    }


@needs_bench
@pytest.mark.parametrize(
    ("cublas", "other", "says"),
    [
        (10.0, 4.0, "other at 0.400x"),
        (10.0, 6.0, "none: cublas reaches 10%, the fastest is other at 0.600x"),
        (10.0, 11.0, "none: cublas reaches 10%, the fastest is cublas"),
        (4.0, 1.0, "none: cublas reaches 25%"),
    ],
)
def test_a_candidate_is_taken_where_cublas_is_slow_and_it_is_twice_as_fast(
    cublas: float, other: float, says: str
) -> None:
    from narrow_kernel import choice

    assert choice(row(cublas, other), bandwidth=1000.0).startswith(says)


@needs_bench
def test_nothing_is_taken_on_a_guess() -> None:
    from narrow_kernel import choice

    assert choice(row(10.0, 4.0), bandwidth=None) == "bandwidth not measured"
    without = row(10.0, 4.0) | {"refused": {"cublas": "it failed"}}
    del without["samples_us"]["cublas"]
    assert choice(without, bandwidth=1000.0) == "nothing to compare with: it failed"


# fp8_addresses.py


@needs_bench
def test_the_gemm_is_called_again_with_one_operand_elsewhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from fp8_addresses import main

    options = ("--shape", "256,512,16", "--tokens", "1,3", "--places", "2", "--rounds", "1", "--device", "cpu")
    assert main([*options, "--output", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "fp8-addresses.json").read_text())["rows"]
    assert [row["tokens"] for row in rows] == [1, 3]
    for row in rows:
        assert row["gemm"] == "aten.mm.default"
        assert list(row["us"]) == ["nothing", f"argument 0, bfloat16 {row['tokens']}x256"]
        assert all(len(by_place) == 2 for by_place in row["us"].values())
    assert (tmp_path / "fp8-addresses.md").read_text().strip() == capsys.readouterr().out.strip()


@needs_bench
def test_a_moved_call_reads_and_writes_where_it_was_moved() -> None:
    import torch
    from fp8_addresses import Call, moved, operands

    from vllm_gdn_plugin.bench.errors import BadInput

    weight = torch.randn(8, 3)
    x, out = torch.randn(3, 16)[:, ::2], torch.empty(3, 3)
    call = Call(torch.ops.aten.mm.out, (x, weight), {"out": out})
    more = Call(call.function, (torch.randn(4, 8), weight), {})
    assert operands(call, more) == {"argument 0, float32 3x8": 0}, "not the weight, whatever its shape"
    with pytest.raises(BadInput, match="too large: take fewer tokens"):
        operands(Call(call.function, (torch.empty(2**23, 2), weight), {}), more)
    memory = torch.zeros(4096, dtype=torch.uint8)
    (there,) = moved([call], 0, memory, 512)
    assert there.arguments[1] is weight
    assert there.arguments[0].data_ptr() == memory.data_ptr() + 512
    assert torch.equal(there.arguments[0], x)
    assert there.arguments[0].stride() == x.stride()
    there()
    assert torch.equal(out, x @ weight)
    (same,) = moved([call], None, memory, 512)
    assert same.arguments[0] is x


# same_work.py


@needs_bench
@pytest.mark.parametrize("own_layers", [False, True])
def test_the_same_work_is_timed_in_several_graphs(
    own_layers: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import same_work
    from same_work import main

    used = []

    def through(layers: Any, *rest: Any) -> Any:
        used.append(id(layers))
        return actual(layers, *rest)

    actual = same_work.through
    monkeypatch.setattr(same_work, "through", through)
    options = ("--shape", "256,512,16", "--tokens", "1,3", "--graphs", "3", "--rounds", "1", "--device", "cpu")
    assert main([*options, "--output", str(tmp_path), *(["--own-layers"] if own_layers else [])]) == 0
    assert len(set(used)) == (3 if own_layers else 1)
    rows = json.loads((tmp_path / "same-work.json").read_text())["rows"]
    assert [(row["tokens"], row["way"]) for row in rows] == [
        (tokens, way) for tokens in (1, 3) for way in ("serial", "dual_stream", "qkvz", "fused")
    ]
    assert all(len(row["us"]) == 3 for row in rows)
    assert any(len(set(row["us"])) > 1 for row in rows), "each graph has a time of its own"
    assert capsys.readouterr().out.count("\n") == len(rows)


@needs_bench
@pytest.mark.parametrize("name", ["fp8_addresses", "fused_rows", "narrow_kernel", "same_work"])
def test_an_output_that_cannot_be_made_gets_one_line(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    options = ("--shape", "256,512,16", "--device", "cpu", "--output", str(tmp_path / "file" / "below"))
    assert importlib.import_module(name).main(options) == 2
    assert capsys.readouterr().err == f"{name}.py: --output {tmp_path}/file/below cannot be written: Not a directory\n"


# fused_rows.py


@needs_bench
def test_each_number_of_rows_that_padding_gives_is_timed_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import fused_rows

    called = set()

    def gemm(rows: int, weight: Any, hidden_states: Any) -> Any:
        called.add((rows, tuple(weight.shape), tuple(actual(rows, weight, hidden_states).shape)))

    actual = fused_rows.gemm
    monkeypatch.setattr(fused_rows, "gemm", gemm)
    options = ("--shape", "64,96,8", "--tensor-parallel-size", "1", "--tokens", "3", "--multiples", "8,16,32,64")
    assert fused_rows.main([*options, "--rounds", "2", "--device", "cpu", "--output", str(tmp_path)]) == 0
    sizes = (96, 104, 112, 128)
    assert called == {(rows, (128, 64), (3, rows)) for rows in sizes}
    (row,) = json.loads((tmp_path / "fused-rows.json").read_text())["rows"]
    assert list(map(int, row["samples_us"])) == list(sizes)
    assert all(len(samples) == 2 for samples in row["samples_us"].values())
    last = (tmp_path / "fused-rows.md").read_text().splitlines()[-1]
    assert re.findall(r" (\d+), [\d.]+ \([\d.]+x\)", last) == ["104", "112", "128", "128"]
    assert capsys.readouterr().out.splitlines()[-1] == last


@needs_bench
def test_the_kernels_of_each_number_of_rows_are_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    import fused_rows

    monkeypatch.setattr(fused_rows, "kernels_of", lambda call: [str(tuple(call().shape))])
    shape = {"name": "", "hidden": 64, "qkvz": 96, "ba": 8, "tensor_parallel_size": 1}
    rows: list[dict[str, Any]] = [{"shape": shape, "tokens": 3}]
    fused_rows.note_kernels(rows, [16, 32], "cpu")
    assert rows[0]["kernels"] == {"96": ["(3, 96)"], "112": ["(3, 112)"], "128": ["(3, 128)"]}


# timeline.py

STOCK = [("norm", 7, 95.0, 5.0), ("wide", 7, 100.0, 20.0), ("narrow", 7, 121.0, 6.0), ("rest", 7, 128.0, 10.0)]
DUAL = [("norm", 7, 45.0, 5.0), ("wide", 7, 50.0, 21.0), ("narrow", 13, 52.0, 9.0), ("rest", 7, 72.0, 10.0)]


def write_trace(path: Path, kernels: list[tuple[str, int, float, float]]) -> None:
    events: list[dict[str, Any]] = [
        {"ph": "X", "cat": "kernel", "name": k, "tid": s, "ts": t, "dur": d, "args": {"stream": s}}
        for k, s, t, d in reversed(kernels)
    ]
    launch = {"ph": "X", "cat": "cuda_runtime", "name": "cudaGraphLaunch", "tid": 1, "ts": 1.0, "dur": 9.0}
    events += [launch, {"ph": "M", "name": "process_name"}]
    with gzip.open(path, "wt") as file:
        json.dump({"traceEvents": events}, file)


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    """What `timeline.py record` leaves, in small."""
    write_trace(tmp_path / "off.trace.json.gz", STOCK)
    write_trace(tmp_path / "dual_stream.trace.json.gz", DUAL)
    about = {"model": "some-model", "batch": 8, "machine": {"hardware": "a GPU"}}
    (tmp_path / "record.json").write_text(json.dumps(about))
    return tmp_path


LABELS = "in_proj_qkvz,in_proj_ba,the rest"


@needs("matplotlib")
def test_from_traces_to_the_picture(recorded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from timeline import load, main, picture_of

    assert main(["list", str(recorded / "off.trace.json.gz"), "--match", "narrow"]) == 0
    assert [line.split()[0] + line.split()[-1] for line in capsys.readouterr().out.splitlines()] == [
        "0norm",
        "1wide",
        "2narrow",
        "3rest",
    ]
    small = recorded / "small.json"
    chosen = (f"off=1-3:{LABELS}", f"dual_stream=1-3:{LABELS}")
    assert main(["trim", str(recorded), str(small), *chosen]) == 0
    assert small.stat().st_size < 1000
    done = script("timeline.py", "draw", small, recorded / "picture.png")
    assert done.returncode == 0, done.stderr
    assert (recorded / "picture.png").read_bytes().startswith(b"\x89PNG")

    (axis,) = picture_of(*load(small)).axes
    assert [tick.get_text() for tick in axis.get_yticklabels()] == [
        "stock",
        "dual_stream, stream 1",
        "dual_stream, stream 2",
    ]
    bars = [(bar.get_y() + bar.get_height() / 2, bar.get_x(), bar.get_width()) for bar in axis.patches]
    assert bars == [(0, 0, 20), (0, 21, 6), (0, 28, 10), (1, 0, 21), (1, 22, 10), (2, 2, 9)]
    colors = [bar.get_facecolor() for bar in axis.patches]
    assert colors[:3] == [colors[3], colors[5], colors[4]]
    assert len(set(colors)) == 3


@needs("matplotlib")
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("list", "record.json"), "record.json is no gzipped trace"),
        (("list", "off.trace.json.gz", "--match", "attention"), "no kernel has such a name"),
        (("trim", ".", "x.json", "off"), "'off' is not VARIANT=FIRST-LAST:LABEL,..."),
        (("trim", ".", "x.json", "off=1-3:one,two"), "off: 2 labels for 3 kernels"),
        (("trim", ".", "x.json", "off=3-4:one,two"), "off: 2 labels for 1 kernels"),
        (("trim", ".", "x.json", f"fused=1-3:{LABELS}"), "fused.trace.json.gz"),
        (("draw", "record.json", "x.png"), "was not written by timeline.py trim"),
        (("draw", "nothing.json", "x.png"), "cannot be read"),
        (("sections", ".", "x.json", "rest", "wide", "all=."), "no kernel 'wide' follows a kernel 'rest'"),
        (("record", "model", ".", "--device", "cpu", "--strategy", "best"), "--strategy 'best' is not one of"),
    ],
)
def test_wrong_input_of_the_timeline_gets_one_line(
    recorded: Path,
    arguments: tuple[str, ...],
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from timeline import main

    monkeypatch.chdir(recorded)
    assert main(arguments) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert says in told


@needs_bench
def test_what_recurs_is_timed(recorded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from timeline import main

    parts = ("both=wide|narrow", "wide alone=wide", "rest=rest")
    machine = dict.fromkeys(("device", "hardware", "python", "vllm_gdn_plugin", "torch"), "x")
    about = {"model": "some-model", "batch": 8, "engine": {}, "date": "today", "machine": machine}
    (recorded / "record.json").write_text(json.dumps(about))
    again = [(name, stream, start + 100, duration) for name, stream, start, duration in STOCK]
    write_trace(recorded / "off.trace.json.gz", [*STOCK, ("norm", 7, 139.0, 1.0), *again, ("narrow", 7, 240.0, 1.0)])
    assert main(["sections", str(recorded), str(recorded / "times.json"), "norm", "rest", *parts]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "off: 2 sections; one of median length: 5-8",
        "dual_stream: 1 sections; one of median length: 0-3",
    ]
    found = json.loads((recorded / "times.json").read_text())
    assert found["about"] == about
    assert found["sections_us"]["off"] == {
        "from start to end": [43.0, 43.0],
        "sum of the kernels": [41.0, 41.0],
        "both": [26.0, 26.0],
        "wide alone": [0.0, 0.0],
        "rest": [10.0, 10.0],
        "other": [5.0, 5.0],
    }
    assert found["sections_us"]["dual_stream"]["from start to end"] == [37.0]
    assert found["sections_us"]["dual_stream"]["both"] == [30.0]
    table = (recorded / "times.md").read_text()
    assert "| | stock | dual_stream |" in table
    assert "| both | 26.00 (26.00 to 26.00) | 30.00 (30.00 to 30.00) |" in table
    assert "wide alone" not in table


# gpu_models.py


@needs("tokenizers", "transformers")
def test_a_model_has_its_layers_and_words_for_ids(tmp_path: Path) -> None:
    from gpu_models import make_model
    from transformers import AutoTokenizer

    from vllm_gdn_plugin.bench.shapes import shape_of_model

    config = json.loads((make_model("tiny", tmp_path, layers=8) / "config.json").read_text())
    kinds = config["text_config"]["layer_types"]
    assert (len(kinds), kinds.count("full_attention"), kinds[3], kinds[7]) == (8, 2, *["full_attention"] * 2)
    assert shape_of_model(str(tmp_path)).hidden == 256
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids = [318, 27, 256, 100]
    assert (len(tokenizer), tokenizer.eos_token_id) == (320, 319)
    assert tokenizer.encode(tokenizer.decode(ids), add_special_tokens=False) == ids
    assert len(AutoTokenizer.from_pretrained(make_model("27B", tmp_path))) == 16384


@needs("tokenizers", "transformers")
def test_an_fp8_model_is_mixed_as_the_official_ones(tmp_path: Path) -> None:
    """Read as `check` reads it, and skipped as vLLM does, which wants each part of a merged projection by name."""
    from gpu_models import make_model

    from vllm_gdn_plugin.decide.checkpoint import read_groups
    from vllm_gdn_plugin.decide.plan import AUTO, DUAL_STREAM

    make_model("tiny", tmp_path, layers=8, quantization="fp8")
    (group,) = read_groups(str(tmp_path), 1, "cuda", AUTO)
    methods = (group.facts.qkvz.linear_method, group.facts.ba.linear_method)
    assert methods == ("Fp8LinearMethod", "UnquantizedLinearMethod")
    assert (group.layers, group.plan.strategy) == ((0, 1, 2, 4, 5, 6), DUAL_STREAM)
    skipped = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["modules_to_not_convert"]
    parts = [f"model.language_model.layers.{n}.linear_attn.in_proj_{p}" for n in group.layers for p in "ba"]
    assert skipped == ["lm_head", *parts]


@needs("tokenizers", "transformers")
def test_a_model_with_scales_by_token_is_mixed_too(tmp_path: Path) -> None:
    from gpu_models import make_model

    from vllm_gdn_plugin.decide.checkpoint import read_groups
    from vllm_gdn_plugin.decide.plan import AUTO, DUAL_STREAM

    make_model("tiny", tmp_path, layers=8, quantization="fp8-per-token")
    (group,) = read_groups(str(tmp_path), 1, "cuda", AUTO)
    methods = (group.facts.qkvz.linear_method, group.facts.ba.linear_method)
    assert methods == ("CompressedTensorsLinearMethod", "UnquantizedLinearMethod")
    assert group.plan.strategy == DUAL_STREAM


@needs("tokenizers", "transformers")
def test_an_awq_model_leaves_its_gdn_layers_in_the_models_dtype(tmp_path: Path) -> None:
    from gpu_models import make_model

    from vllm_gdn_plugin.decide.checkpoint import read_groups
    from vllm_gdn_plugin.decide.plan import AUTO, FUSED

    make_model("tiny", tmp_path, layers=8, quantization="awq")
    (group,) = read_groups(str(tmp_path), 1, "cuda", AUTO)
    methods = (group.facts.qkvz.linear_method, group.facts.ba.linear_method)
    assert methods == ("UnquantizedLinearMethod", "UnquantizedLinearMethod")
    assert group.plan.strategy == FUSED


def test_the_models_have_the_projections_of_the_presets() -> None:
    from gpu_models import MODELS

    from vllm_gdn_plugin.bench.shapes import PRESETS, shape_of_config

    for name in ("35B-A3B", "27B", "9B"):
        assert shape_of_config(name, MODELS[name]) == shape_of_config(name, PRESETS[f"Qwen3.5-{name}"])


@needs("tokenizers", "transformers")
def test_a_model_can_be_as_wide_as_one_rank(tmp_path: Path) -> None:
    from gpu_models import make_model

    from vllm_gdn_plugin.bench.shapes import shape_of_model

    shape = shape_of_model(str(make_model("9B", tmp_path, layers=4, ranks=4)))
    assert (shape.hidden, shape.qkvz, shape.ba) == (4096, 12288 // 4, 64 // 4)
    text = json.loads((tmp_path / "config.json").read_text())["text_config"]
    assert (text["num_key_value_heads"], text["intermediate_size"], text["vocab_size"]) == (1, 3072, 62080)
    shape = shape_of_model(str(make_model("35B-A3B", tmp_path, layers=4, ranks=8)))
    assert (shape.hidden, shape.qkvz, shape.ba) == (2048, 12288 // 8, 64 // 8)
    text = json.loads((tmp_path / "config.json").read_text())["text_config"]
    assert (text["num_key_value_heads"], text["moe_intermediate_size"]) == (1, 64)
    with pytest.raises(ValueError, match="linear_num_key_heads is no multiple of 4"):
        make_model("tiny", tmp_path, ranks=4)


# in_process.py

OFF_FIRST, FUSED_FIRST = ["off", "fused"], ["fused", "off"]


class TalkingEngine:
    """One of what `in_process.engines` gives, without a process: it notes what it is asked."""

    asked: list[tuple[str, Any, Any]]

    def __init__(self, name: str, answer: Any) -> None:
        self.name, self.answer = name, answer

    def log(self) -> str:
        return "" if self.name.startswith("off") else "vllm-gdn-plugin 0.1.0: fused on 3 of 3 GDN layers"

    def ask(self, question: dict[str, Any]) -> Any:
        if "probe" in question:
            return self.answer
        if "memory" in question:
            return {"allocated_mib": 5.0} if self.name == "fused" else {}
        if "cpus" in question:
            return self.asked.append((self.name, "cpus", question["cpus"]))
        self.asked.append((self.name, question["name"], question["seed"]))
        return [[0.5, 0.6, 0.9]] * question["repeat"]


@pytest.fixture
def stepped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """`stepped(logprob=-1.0, minutes=1, ...)` is the run of two rounds of three cases in two engines, or as many more
    as `starts` has it, and what they were asked; those with the plugin answer the probe with that log-probability."""
    pytest.importorskip("psutil", reason="not installed: psutil")
    import in_process
    from in_process import Case, measure

    from vllm_gdn_plugin.bench.engine.results import SERVE, EngineRun
    from vllm_gdn_plugin.bench.results import Machine

    def run(
        logprob: float = -1.0,
        minutes: float = 1.0,
        cpus: Sequence[int] = (),
        starts: int = 1,
        one_process: bool = False,
    ) -> Any:
        asked: list[tuple[str, Any, Any]] = []
        monkeypatch.setattr(TalkingEngine, "asked", asked, raising=False)

        @contextmanager
        def talking(variants: Any, options: Any) -> Iterator[dict[str, TalkingEngine]]:
            asked.append(("", "process", list(variants)))
            yield {name: TalkingEngine(name, ([7], [-1.0 if name.startswith("off") else logprob])) for name in variants}

        monkeypatch.setattr(in_process, "engines", talking)
        machine = Machine("cpu", "a CPU", "3.11", "0.1.0", "2.11", "0.26.0", None, None, 0, None)
        variants = in_process.started_often({"off": {}, "fused": {}}, starts)
        found = EngineRun(SERVE, "", "", 2, "m", [], variants, machine)
        cases = [Case("concurrency 2", 2, 8, 3, 4), Case("8 in", 1, 8, 1, 5), Case("9 in", 1, 9, 1, 5)]
        measure(found, cases, SimpleNamespace(minutes=minutes, cpus=cpus, one_process=one_process))
        processes = [names for _, what, names in asked if what == "process"]
        assert processes == ([list(variants)] if one_process else [[name] for name in variants])
        return found, [one for one in asked if one[1] != "process"]

    return run


def test_engines_are_bound_to_cpus_once_all_have_started(stepped: Callable[..., Any]) -> None:
    _, asked = stepped(cpus=(1, 3))
    started, cases = 2, 3
    assert asked[started * cases :][:started] == [("off", "cpus", (1, 3)), ("fused", "cpus", (1, 3))]


def test_two_engines_of_each_are_stepped_as_variants_of_their_own(stepped: Callable[..., Any]) -> None:
    run, asked = stepped(starts=2)
    assert list(run.variants) == ["off", "fused", "off-2", "fused-2"]
    assert {name for name, *_ in asked} == set(run.variants)
    assert set(run.verified) == {"fused", "off-2", "fused-2"}
    assert set(run.said) == {"fused", "fused-2"}
    assert run.values("tpot_ms", "concurrency 2", "off-2") == pytest.approx({0: 200.0, 1: 200.0})


def test_engines_in_one_process_are_stepped_alike_and_nothing_is_said_of_memory(stepped: Callable[..., Any]) -> None:
    apart, asked_apart = stepped(starts=2)
    run, asked = stepped(starts=2, one_process=True)
    assert asked == asked_apart
    assert (run.verified, run.said) == (apart.verified, apart.said)
    assert [sample for sample in apart.samples if sample.case != "start"] == run.samples


def test_an_engine_has_its_own_part_of_the_log(tmp_path: Path) -> None:
    pytest.importorskip("psutil", reason="not installed: psutil")
    from in_process import BUILDS, Engine

    log = tmp_path / "off+fused+off-2.log"
    log.write_text(f"{BUILDS}off\nstock\n{BUILDS}fused\nplugin\nmore\n{BUILDS}off-2\nagain\n")
    logs = {name: Engine(name, cast("Any", None), log).log() for name in ("off", "fused", "off-2")}
    assert logs == {"off": "stock\n", "fused": "plugin\nmore\n", "off-2": "again\n"}


@pytest.mark.parametrize(
    ("names", "one_process", "expected"),
    [
        (["off", "auto", "fused", "dual_stream"], False, [[["off"]], [["auto"]], [["fused"], ["dual_stream"]]]),
        (["off", "fused", "off-2", "fused-2"], False, [[["off"]], [["fused"], ["off-2"], ["fused-2"]]]),
        (["off", "auto"], False, [[["off"]], [["auto"]]]),
        (["off", "fused", "off-2"], True, [[["off", "fused", "off-2"]]]),
    ],
)
def test_stock_starts_first_and_auto_alone_or_all_are_in_one_process(
    names: list[str], one_process: bool, expected: list[list[list[str]]]
) -> None:
    pytest.importorskip("psutil", reason="not installed: psutil")
    from in_process import groups

    assert groups(names, one_process) == expected


def test_engines_are_stepped_in_turn_case_by_case_with_the_same_prompts(stepped: Callable[..., Any]) -> None:
    run, asked = stepped()
    cases = ["concurrency 2", "8 in", "9 in"]
    warm_up = [(name, case, 0) for name in OFF_FIRST for case in cases]
    rounds = [
        (name, case, 1 + 3 * number + n)
        for number, names in enumerate((OFF_FIRST, FUSED_FIRST))
        for n, case in enumerate(cases)
        for name in names
    ]
    assert asked == warm_up + rounds
    assert (run.verified, run.stopped) == ({"fused": "the same 1 tokens and log-probabilities"}, None)
    assert run.said == {"fused": "vllm-gdn-plugin 0.1.0: fused on 3 of 3 GDN layers"}
    assert run.values("tpot_ms", "concurrency 2", "fused") == pytest.approx({0: 200.0, 1: 200.0})
    assert run.values("ttft_ms", "9 in", "off") == pytest.approx({0: 500.0, 1: 500.0})
    assert not run.values("ttft_ms", "concurrency 2", "off")
    assert [(s.variant, s.case, s.values) for s in run.samples if s.case == "start"] == [
        ("fused", "start", {"allocated_mib": 5.0})
    ]


def test_a_wrong_answer_ends_the_measurement_of_steps(stepped: Callable[..., Any]) -> None:
    from vllm_gdn_plugin.bench.errors import WrongResult

    with pytest.raises(WrongResult, match="fused: its answer is not the stock engine's"):
        stepped(logprob=-3.0)


def test_what_was_measured_is_kept_when_the_time_is_over(stepped: Callable[..., Any]) -> None:
    run, asked = stepped(minutes=0)
    assert (run.stopped, run.cases("tpot_ms")) == ("the time was over", [])
    assert len(asked) == 6


@needs("torch", "psutil")
def test_a_directory_that_cannot_be_made_gets_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    engine = ("--engine", '{"kv_cache_memory_bytes": 1}')
    done = script("in_process.py", "model", tmp_path / "file" / "out", "--device", "cpu", *engine)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "out cannot be made: Not a directory" in done.stderr


@needs("torch", "numpy", "scipy", "matplotlib", "psutil")
@pytest.mark.parametrize("ended_by", [signal.SIGINT, signal.SIGTERM])
def test_steps_that_were_measured_are_kept_when_it_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ended_by: signal.Signals
) -> None:
    import in_process

    def measure(run: Any, *_: Any) -> None:
        run.add(0, "off", "concurrency 1", {"tpot_ms": 1.0})
        signal.raise_signal(ended_by)

    monkeypatch.setattr(in_process, "measure", measure)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in the background of a shell
        engine = '{"kv_cache_memory_bytes": 1}'
        assert in_process.main(["model", str(tmp_path), "--device", "cpu", "--engine", engine]) == 130
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    kept = json.loads((tmp_path / "serve.json").read_text())
    assert (kept["stopped"], len(kept["samples"])) == ("interrupted", 1)
    assert "**not complete**: interrupted" in (tmp_path / "serve.md").read_text()


def test_an_engine_that_is_gone_is_named(tmp_path: Path) -> None:
    pytest.importorskip("psutil", reason="not installed: psutil")
    from in_process import Engine

    from vllm_gdn_plugin.bench.errors import BadInput

    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=-1, stdout=-1, text=True) as going:
        engine = Engine("fused", going, tmp_path / "off+fused.log")
        for _ in range(2):  # it ends while it is asked, and is asked once it has ended
            with pytest.raises(BadInput, match=r"off\+fused: the process is gone, see .*off\+fused\.log"):
                engine.ask({"probe": True})
            going.wait()
        with suppress(BrokenPipeError):
            going.stdin.close()


@needs("psutil")
@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--concurrency", "1,x"), "--concurrency '1,x' is not whole numbers"),
        (("--input-len", "0"), "--input-len '0' is not whole numbers"),
        (("--repeat", "0"), "--repeat '0' is not whole numbers"),
        (("--first-tokens", "1,2"), "--first-tokens '1,2' is not one number"),
        (("--engine", "[1]"), "--engine '[1]' is no JSON object"),
        (("--engine", "{"), "--engine '{' is no JSON object"),
        (("--engine", "{}"), "--engine needs kv_cache_memory_bytes: else each engine takes what it finds free"),
        (("--cpus", "0,x"), "--cpus '0,x' is no list of numbers"),
        (("--cpus", "0,99999"), "--cpus: this process may not run on 99999"),
        (("--output-len", "1"), "--output-len 1: one token has no time per output token"),
        (("--device", "cpu", "--strategy", "quick"), "--strategy 'quick' is not one of auto, fused, dual_stream"),
    ],
)
def test_wrong_options_of_the_steps(tmp_path: Path, options: tuple[str, ...], says: str) -> None:
    engine = () if "--engine" in options else ("--engine", '{"kv_cache_memory_bytes": 1}')
    done = script("in_process.py", "model", tmp_path, *engine, *options)
    assert done.returncode == 2
    assert says in done.stderr.splitlines()[-1]
