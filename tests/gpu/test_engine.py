"""The tokens of a real engine on a GPU, stock and with each strategy.

One process for each mode, a few minutes each: `pytest tests/gpu/test_engine.py -k mtp`, say.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from drafter import add_drafter
from generate_all import BUILDS
from packaging.version import Version
from quantize import quantize
from tiny_model import make_model

HERE = Path(__file__).parent
GDN_LAYERS = 3
ROUNDING = 0.1
"""How far log-probabilities may be apart where one GEMM rounds otherwise than two."""
FORCED = 0.05
"""The same where every step goes on with the same tokens."""
TIE = 0.25
"""Where the two best tokens are closer than this, rounding may choose either, and the texts part there."""


class Mode(NamedTuple):
    more: tuple[str, ...] = ("decode",)
    """Engines beside stock, dual_stream and fused."""
    engine: Mapping[str, Any] = {}
    """Arguments of vLLM's LLM."""
    kind: str = "qwen3_5"
    spoken: bool = False
    """The model has learned a sentence: no two tokens are ever close, so all must be the same."""
    forced: bool = False
    """All go on with stock's tokens."""
    no_kernel: str = ""
    """Why there is no decode kernel, as the log says it."""
    lengths: tuple[int, ...] = ()
    """Of the prompts, where not those of all modes."""
    env: Mapping[str, str] = {}


RUNNER = "VLLM_USE_V2_MODEL_RUNNER"
"""From 0.29 on the second is the one that vLLM takes on CUDA by itself."""
REPEATABLE = {"VLLM_TRITON_FORCE_FIRST_CONFIG": "1"}
"""Else Triton chooses by time what rounds differently; so does Inductor, see generate_all.py."""
MTP = {"speculative_config": {"method": "mtp", "num_speculative_tokens": 2}, "enable_prefix_caching": False}
LESS_WITH_MORE = {"num_speculative_tokens_per_batch_size": [[1, 2, 2], [3, 8, 1]]}
MODES = {
    "graphs": Mode(("decode", "auto")),
    "spoken": Mode(("decode", "auto"), {"async_scheduling": True}, spoken=True),
    "piecewise": Mode(
        engine={"compilation_config": {"cudagraph_mode": "PIECEWISE"}}, no_kernel="cudagraph_mode PIECEWISE"
    ),
    "decode-graphs": Mode(engine={"compilation_config": {"cudagraph_mode": "FULL_DECODE_ONLY"}}),
    "breakable": Mode(env={"VLLM_USE_BREAKABLE_CUDAGRAPH": "1"}, no_kernel="breakable CUDA graphs"),
    "runner-v1": Mode(env={RUNNER: "0"}),
    "eager": Mode(engine={"enforce_eager": True}),
    "eager-runner-v1": Mode((), {"enforce_eager": True}, env={RUNNER: "0"}),
    "preemption": Mode(
        engine={"num_gpu_blocks_override": 36, "enable_prefix_caching": False}, lengths=tuple(range(493, 501))
    ),
    "experts": Mode(kind="qwen3_5_moe", spoken=True, forced=True),
    "mtp": Mode(engine=MTP, spoken=True, no_kernel="with speculative decoding vLLM has a kernel of its own"),
    "mtp-dynamic": Mode((), MTP | {"speculative_config": MTP["speculative_config"] | LESS_WITH_MORE}),
    "mtp-runner-v1": Mode((), MTP, env={RUNNER: "0"}),
    "interleaved": Mode(("decode", "auto"), kind="qwen3_next"),
    "mixed": Mode(("auto",), kind="qwen3_next", spoken=True),  # where int8 rounds otherwise, others are 0.27 apart
    "sleep": Mode(),
    "tp2": Mode(("decode", "auto", "differ"), {"tensor_parallel_size": 2}, spoken=True),
    "tp2-eager": Mode(("decode", "differ"), {"tensor_parallel_size": 2, "enforce_eager": True}, spoken=True),
}


class Generated(NamedTuple):
    mode: str
    found: dict[str, Any]
    """What generate_all.py wrote."""
    log: str

    def log_of(self, name: str) -> str:
        return self.log.partition(f"{BUILDS}{name}\n")[2].partition(BUILDS)[0]


@pytest.fixture(scope="module", params=MODES)
def generated(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Generated:
    import torch
    import vllm

    name, mode = request.param, MODES[request.param]
    released = Version(vllm.__version__)
    if name.startswith("tp2") and torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU")
    if released < Version("0.29") and name in ("spoken", "experts", "mtp-dynamic", "runner-v1", "mtp-runner-v1"):
        pytest.skip(f"vLLM {released} has no second model runner to speak of")
    if name == "sleep":
        cumem = pytest.importorskip("vllm.device_allocator.cumem")
        if not cumem.cumem_available:
            pytest.skip("this build of vLLM has no allocator for the sleep mode")
    directory = tmp_path_factory.mktemp(name)
    model = make_model(mode.kind, directory / "model", learn=mode.spoken)
    if name == "mixed":
        model = quantize(model, directory / "quantized", only="in_proj_qkvz")
    if "speculative_config" in mode.engine:
        model = add_drafter(model, directory / "with_drafter")
    has_branch = released >= Version("0.28")  # of which the decode kernel takes the place
    more = [name for name in mode.more if has_branch or name not in ("decode", "differ")]
    names = ["stock", "dual_stream", "fused", *more]
    options = ["--arguments", json.dumps(mode.engine), *["--spoken"] * mode.spoken, *["--forced"] * mode.forced]
    options += ["--lengths", *map(str, mode.lengths)] if mode.lengths else []
    groups = [names]
    if name == "sleep":
        options += ["--sleep", str(make_model(mode.kind, directory / "other", seed=1))]
        groups = [[name] for name in names]  # the allocator that can give memory back serves one engine of a process
    plugin = directory / "ranks_differ-0.dist-info"
    plugin.mkdir()
    (plugin / "METADATA").write_text("Metadata-Version: 2.1\nName: ranks-differ\nVersion: 0\n")
    (plugin / "entry_points.txt").write_text("[vllm.general_plugins]\nranks_differ = ranks_differ:register\n")
    path = os.pathsep.join([str(HERE), str(directory), *filter(None, [os.environ.get("PYTHONPATH")])])
    runner = {RUNNER: "1" if released >= Version("0.29") else "0"}
    ranks = {"PYTHONPATH": path, "VLLM_WORKER_MULTIPROC_METHOD": "spawn"}  # so that each loads its own plugins
    env = os.environ | REPEATABLE | runner | ranks | mode.env
    found: dict[str, Any] = {}
    for group in groups:
        command = [sys.executable, HERE / "generate_all.py", model, directory / "generated.json", *group, *options]
        with (directory / "log").open("ab") as log:
            failed = subprocess.run(command, cwd=directory, env=env, stdout=log, stderr=log).returncode
        text = (directory / "log").read_text(errors="replace")
        assert not failed, text[-6000:]
        found |= json.loads((directory / "generated.json").read_text())
    return Generated(name, found, text)


def compares_bits(mode: str) -> bool:
    """Not where each engine has processes of its own, or what is batched together depends on how long a step takes."""
    return not mode.startswith("tp2") and not MODES[mode].engine.get("async_scheduling")


def strategies(generated: Generated) -> Iterator[tuple[str, dict[str, Any]]]:
    yield from ((name, found) for name, found in generated.found.items() if name != "stock")


def test_dual_stream_gives_the_same_bits(generated: Generated) -> None:
    if not compares_bits(generated.mode):
        pytest.skip("nothing can be said of bits in this mode")
    ours, stock = generated.found["dual_stream"], generated.found["stock"]
    assert ours["batches"] == stock["batches"], "or nothing can be said of bits"
    assert parted(ours["answers"], stock["answers"]) == []


def parted(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """Where each text first differs, in a token or a bit of a log-probability."""
    found = []
    for when in theirs.keys() - {"host bytes asleep"}:
        for number, texts in enumerate(zip(ours[when], theirs[when], strict=True)):
            steps = (step for step, (one, other) in enumerate(zip(*texts, strict=True)) if one != other)
            found += [f"{when}, text {number}, step {step}" for step in [next(steps, None)] if step is not None]
    return found


def test_gives_the_same_tokens(generated: Generated) -> None:
    """Up to the first step whose two best tokens are closer than rounding; in one that says what it has learned, all.

    With experts rounding may choose another expert, so each step goes on from stock's tokens.
    """
    mode, stock = MODES[generated.mode], generated.found["stock"]["answers"]
    for name, found in strategies(generated):
        for when in stock.keys() - {"host bytes asleep"}:
            pairs = list(zip(found["answers"][when], stock[when], strict=True))
            if mode.forced:
                assert max(compare_forced(*texts) for texts in pairs) < FORCED
                continue
            steps = [compare(*texts) for texts in pairs]
            print(f"{name}, {when}: the same tokens for {steps} steps")
            if mode.spoken:
                assert steps == [len(theirs) for _, theirs in pairs]
            assert max(steps) > 16, "all texts part too soon to tell anything"


def compare_forced(ours: list[Any], theirs: list[Any]) -> float:
    """How far the log-probabilities of stock's best tokens are apart at the most; another one may be best where stock's
    two are closer than that."""
    apart = 0.0
    for step, ((token, best), (stock_token, stock_best)) in enumerate(zip(ours, theirs, strict=True)):
        assert token == stock_token, "it was to go on with stock's"
        if best[0][1] != stock_best[0][1]:
            assert stock_best[0][0] - stock_best[1][0] < FORCED, f"step {step}: another token, and no tie"
        apart = max(apart, abs(dict(map(reversed, best))[stock_best[0][1]] - stock_best[0][0]))
    return apart


def compare(ours: list[Any], theirs: list[Any]) -> int:
    """How many steps two texts go together; they may part where there is a tie."""
    for step, ((token, best), (stock_token, stock_best)) in enumerate(zip(ours, theirs, strict=True)):
        assert best[0][0] == pytest.approx(stock_best[0][0], abs=ROUNDING), f"step {step}"
        if token != stock_token:
            near = [other for logprob, other in stock_best if stock_best[0][0] - logprob < TIE]
            assert token in near, f"step {step}: another token, and no tie"
            return step
    return len(theirs)


def test_the_answers_can_differ(generated: Generated) -> None:
    """Or the comparison above would compare nothing: the texts are not one token over and over, nor one another."""
    texts = [tuple(token for token, _ in text) for text in generated.found["stock"]["answers"]["first"]]
    assert len({*texts}) == len(texts)
    assert min(len({*text}) for text in texts) > 16


def test_every_layer_was_captured_on_two_streams(generated: Generated) -> None:
    """Where the compiler gave a join another tensor than its fork had, it would be serial, and nobody would see it."""
    assert "dual_stream runs serially in a CUDA graph" not in generated.log
    if generated.mode.startswith("tp2"):
        pytest.skip("each engine has processes of its own")
    joins = generated.found["dual_stream"]["joins"]
    if "enforce_eager" in MODES[generated.mode].engine:
        assert joins == {}
    else:
        assert joins["overlapped"] >= GDN_LAYERS
        assert joins["overlapped"] % GDN_LAYERS == 0
        assert "serially" not in joins or generated.mode == "breakable"  # whose captures have breaks


def test_each_strategy_was_at_work(generated: Generated) -> None:
    expected = {"dual_stream": "dual_stream", "fused": "fused", "decode": "fused", "auto": "fused"}
    if generated.mode == "mixed":
        assert "one GEMM cannot serve" in generated.log
        expected = {"dual_stream": "dual_stream", "auto": "dual_stream"}
        assert "; in CUDA graphs " in generated.log, "auto timed the ways"
    if "enforce_eager" in MODES[generated.mode].engine:
        assert "CUDA graphs are off" in generated.log
        del expected["dual_stream"]
    no_kernel = MODES[generated.mode].no_kernel
    for name, strategy in expected.items():
        if name in generated.found:
            kernel = {"auto": r"( \+ decode kernel)?", "decode": "" if no_kernel else r" \+ decode kernel"}.get(
                name, ""
            )
            end = f".*; no decode kernel: .*{no_kernel}" if no_kernel and name == "decode" else ""
            line = rf"{strategy}{kernel} on {GDN_LAYERS} of {GDN_LAYERS} GDN layers \(platform cuda{end}"
            assert re.search(line, generated.log_of(name)), line
            ranks = generated.found[name]["ranks"]
            assert len(ranks) == MODES[generated.mode].engine.get("tensor_parallel_size", 1)
            for rank in ranks:
                assert rank["strategies"] == GDN_LAYERS * [strategy], name
                assert name == "auto" or rank["decodes"] == GDN_LAYERS * [bool(kernel)], name


def test_ranks_that_timed_differently_capture_and_answer_together(generated: Generated) -> None:
    """Their tokens: see above."""
    if "differ" not in generated.found:
        pytest.skip("there is one rank")
    first, second = generated.found["differ"]["ranks"]
    assert first["rows"] != second["rows"]
    assert first["decodes"] == second["decodes"] == GDN_LAYERS * [True]
    assert first["ways"] != second["ways"]


def test_vllm_s_kernel_for_speculation_reads_what_fused_gives(generated: Generated) -> None:
    """Rows of one GEMM's result, which lie further apart than they are long."""
    import vllm

    if not generated.mode.startswith("mtp") or Version(vllm.__version__) < Version("0.28"):
        pytest.skip("it is a kernel for speculation, of 0.28 and later")
    assert "Qwen3_5MTP" in generated.log
    assert [rank["fused speculation"] for rank in generated.found["fused"]["ranks"]] == [GDN_LAYERS * [True]]


def test_requests_give_way_and_start_anew(generated: Generated) -> None:
    if generated.mode != "preemption":
        pytest.skip("the cache is large enough for all")
    assert min(found["preempted"] for found in generated.found.values()) > 0


def test_what_sleeps_is_kept_on_the_host_as_in_stock_vllm(generated: Generated) -> None:
    if generated.mode != "sleep":
        pytest.skip("nothing sleeps")
    asleep = {name: found["answers"]["host bytes asleep"] for name, found in generated.found.items()}
    assert len({*asleep.values()}) == 1, asleep
    for found in generated.found.values():
        first, awake, reloaded = (found["answers"][when] for when in ("first", "awake", "reloaded"))
        assert max(compare(*texts) for texts in zip(awake, first, strict=True)) > 16
        assert [text[0] for text in reloaded] != [text[0] for text in first]


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What count_artifacts.py found for 8 and 16 layers, at a first start and at one with the caches of the first; both
    at once, since each takes minutes."""
    directory = tmp_path_factory.mktemp("artifacts")
    models = {str(4 * blocks): make_model("qwen3_5", directory / f"{4 * blocks}", blocks=blocks) for blocks in (2, 4)}
    found = []
    for _ in range(2):
        started = {}
        for layers, model in models.items():
            command = [sys.executable, HERE / "count_artifacts.py", model, directory / f"{layers}.json"]
            env = os.environ | {"VLLM_CACHE_ROOT": str(directory / f"{layers}-cache")}
            with (directory / f"{layers}.log").open("wb") as log:
                started[layers] = subprocess.Popen(command, cwd=directory, env=env, stdout=log, stderr=log)
        for layers, process in started.items():
            assert process.wait() == 0, (directory / f"{layers}.log").read_text(errors="replace")[-6000:]
        found.append({layers: json.loads((directory / f"{layers}.json").read_text()) for layers in models})
    return found


@pytest.mark.parametrize("strategy", ["dual_stream", "fused", "decode"])
def test_there_are_as_many_compiled_artifacts_as_in_stock(artifacts: list[dict[str, Any]], strategy: str) -> None:
    """dual_stream's fork and join lie within a piece, so that there are as many pieces as stock has: 6 and 8 of vLLM
    0.33, which has one for each that differs."""
    first, second = artifacts
    print(json.dumps(artifacts))
    for layers in ("8", "16"):
        assert first[layers][strategy] == first[layers]["stock"]
        assert second[layers][strategy] == second[layers]["stock"]
        assert second[layers][strategy]["num_compiled_artifacts_saved"] == 0, "what the first start has saved serves"
    assert (
        0
        < first["8"][strategy]["num_compiled_artifacts_saved"]
        <= first["16"][strategy]["num_compiled_artifacts_saved"]
        < 16
    )
