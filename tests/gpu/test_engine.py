"""The tokens of a real engine on a GPU, stock and with each strategy."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
TINY_MODEL = HERE.parents[1] / "examples" / "tiny_model.py"


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Any:
    directory = tmp_path_factory.mktemp("engine")
    subprocess.run([sys.executable, TINY_MODEL, "qwen3_next", directory / "model"], check=True)
    command = [sys.executable, HERE / "generate_all.py", directory / "model", directory / "generated.json"]
    with (directory / "log").open("wb") as log:
        failed = subprocess.run(command, cwd=directory, stdout=log, stderr=log).returncode
    text = (directory / "log").read_text(errors="replace")
    assert not failed, text[-6000:]
    return json.loads((directory / "generated.json").read_text()) | {"log": text}


@pytest.mark.parametrize("mode", ["graphs", "eager"])
def test_dual_stream_gives_the_same_bits(generated: Any, mode: str) -> None:
    assert generated[f"dual_stream {mode}"] == generated[f"stock {mode}"]


@pytest.mark.parametrize("mode", ["graphs", "eager"])
def test_fused_gives_the_same_tokens(generated: Any, mode: str) -> None:
    """Up to the first step whose two best tokens are closer than rounding: from there on the texts may differ."""
    for fused, stock in zip(generated[f"fused {mode}"], generated[f"stock {mode}"], strict=True):
        for (token, logprob), (stock_token, stock_logprob) in zip(fused, stock, strict=True):
            assert logprob == pytest.approx(stock_logprob, abs=0.1)
            if token != stock_token:
                break


def test_each_strategy_was_at_work(generated: Any) -> None:
    for strategy in ("dual_stream", "fused"):
        assert f"{strategy} on 3 of 3 GDN layers (platform cuda" in generated["log"]
    assert "CUDA graphs are off" in generated["log"]
