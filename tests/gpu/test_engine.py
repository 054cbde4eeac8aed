"""The tokens of a real engine on a GPU, stock and with each strategy."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from quantize import quantize

from vllm_gdn_plugin.decide.plan import NARROW_KERNEL, PADDED_TO

HERE = Path(__file__).parent
TINY_MODEL = HERE.parents[1] / "examples" / "tiny_model.py"

MODES = {
    "graphs": [],
    "eager": ["--eager"],
    "mtp": ["--mtp"],
    "narrow": ["--take", NARROW_KERNEL],
    "padded": ["--take", ",".join(PADDED_TO)],
    "tp2": ["--tensor-parallel-size", "2"],
}


@pytest.fixture(scope="module", params=MODES)
def generated(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What generate_all.py wrote, and all that it printed as `log`."""
    if request.param == "tp2":
        import torch

        if torch.cuda.device_count() < 2:
            pytest.skip("there is one GPU")
    directory = tmp_path_factory.mktemp(request.param)
    bf16 = directory / "bf16" if request.param == "narrow" else directory / "model"
    subprocess.run([sys.executable, TINY_MODEL, "qwen3_next", bf16], check=True)
    if request.param == "narrow":
        quantize(bf16, directory / "model", only="in_proj_qkvz")
    if request.param == "mtp":
        add_mtp_head(directory / "model" / "model.safetensors")
    command = [sys.executable, HERE / "generate_all.py", directory / "model", directory / "generated.json"]
    with (directory / "log").open("wb") as log:
        failed = subprocess.run([*command, *MODES[request.param]], cwd=directory, stdout=log, stderr=log).returncode
    text = (directory / "log").read_text(errors="replace")
    assert not failed, text[-6000:]
    return json.loads((directory / "generated.json").read_text()) | {"log": text, "mode": request.param}


def add_mtp_head(file: Path) -> None:
    """Add the weights of an MTP head to the tiny model's: its attention layer once more, below a random projection."""
    import torch
    from safetensors.torch import load_file, save_file

    weights = load_file(file)
    layer = "model.layers.3."
    head = {name.replace(layer, "mtp.layers.0."): w.clone() for name, w in weights.items() if name.startswith(layer)}
    norm = weights["model.norm.weight"]
    hidden = len(norm)
    torch.manual_seed(0)
    head["mtp.fc.weight"] = torch.randn(hidden, 2 * hidden, dtype=norm.dtype) * hidden**-0.5
    head |= {f"mtp.{name}.weight": norm.clone() for name in ("norm", "pre_fc_norm_hidden", "pre_fc_norm_embedding")}
    save_file(weights | head, file, metadata={"format": "pt"})


def test_dual_stream_gives_the_same_bits(generated: Any) -> None:
    if generated["mode"] == "tp2":
        pytest.skip("each engine has processes of its own, which tune their kernels each for themselves")
    assert generated["dual_stream"] == generated["stock"]


@pytest.mark.parametrize("strategy", ["fused", "dual_stream", "auto"])
def test_gives_the_same_tokens(generated: Any, strategy: str) -> None:
    """Up to the first step whose two best tokens are closer than rounding: from there on the texts may differ."""
    for found, stock in zip(generated[strategy], generated["stock"], strict=True):
        for (token, logprob), (stock_token, stock_logprob) in zip(found, stock, strict=True):
            assert logprob == pytest.approx(stock_logprob, abs=0.1)
            if token != stock_token:
                break


def test_every_layer_was_captured_on_two_streams(generated: Any) -> None:
    """Where the compiler gave a join another tensor than its fork had, it would be serial, and nobody would see it."""
    if generated["mode"] == "tp2":
        pytest.skip("each engine has processes of its own")
    joined = generated["joined"]["dual_stream"]
    assert len(joined) == (0 if generated["mode"] == "eager" else 3)
    assert "serially" not in joined
    assert "dual_stream failed and runs serially" not in generated["log"]


def test_each_strategy_was_at_work(generated: Any) -> None:
    if generated["mode"] == "narrow":
        assert "one GEMM cannot serve" in generated["log"]
        assert "dual_stream on 3 of 3 GDN layers (platform cuda" in generated["log"]
        assert "; in CUDA graphs narrow_kernel at 1 to 8 tokens, dual_stream at 16" in generated["log"]
        assert "is left out" not in generated["log"]
        captured = {tokens for way, tokens in generated["captured"] if way == NARROW_KERNEL}
        assert {1, 2, 4, 8} <= captured, "in the engine's own graphs"
        return
    assert "fused on 3 of 3 GDN layers (platform cuda" in generated["log"]
    assert ("Qwen3NextMTP" in generated["log"]) == (generated["mode"] == "mtp")
    if generated["mode"] == "padded":
        captured = {(way, tokens) for way, tokens in generated["captured"] if way in PADDED_TO}
        assert {tokens for _, tokens in captured} >= {1, 2, 4, 8, 16}, "in the engine's own graphs"
        assert {way for way, _ in captured} == set(PADDED_TO)
        assert ", padded at " in generated["log"]
    if generated["mode"] == "eager":
        assert "CUDA graphs are off" in generated["log"]
    else:
        assert "; in CUDA graphs " in generated["log"], "auto timed the ways"
        assert "dual_stream on 3 of 3 GDN layers (platform cuda" in generated["log"]
