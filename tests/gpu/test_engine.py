"""The tokens of a real engine on a GPU, stock and with each strategy."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
TINY_MODEL = HERE.parents[1] / "examples" / "tiny_model.py"


@pytest.fixture(scope="module", params=["graphs", "eager"])
def generated(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What generate_all.py wrote, and all that it printed as `log`."""
    directory = tmp_path_factory.mktemp(request.param)
    subprocess.run([sys.executable, TINY_MODEL, "qwen3_next", directory / "model"], check=True)
    command = [sys.executable, HERE / "generate_all.py", directory / "model", directory / "generated.json"]
    with (directory / "log").open("wb") as log:
        eager = ["--eager"] if request.param == "eager" else []
        failed = subprocess.run([*command, *eager], cwd=directory, stdout=log, stderr=log).returncode
    text = (directory / "log").read_text(errors="replace")
    assert not failed, text[-6000:]
    return json.loads((directory / "generated.json").read_text()) | {"log": text, "mode": request.param}


def test_dual_stream_gives_the_same_bits(generated: Any) -> None:
    assert generated["dual_stream"] == generated["stock"]


def test_fused_gives_the_same_tokens(generated: Any) -> None:
    """Up to the first step whose two best tokens are closer than rounding: from there on the texts may differ."""
    for fused, stock in zip(generated["fused"], generated["stock"], strict=True):
        for (token, logprob), (stock_token, stock_logprob) in zip(fused, stock, strict=True):
            assert logprob == pytest.approx(stock_logprob, abs=0.1)
            if token != stock_token:
                break


def test_each_strategy_was_at_work(generated: Any) -> None:
    assert "fused on 3 of 3 GDN layers (platform cuda" in generated["log"]
    if generated["mode"] == "graphs":
        assert "dual_stream on 3 of 3 GDN layers (platform cuda" in generated["log"]
    else:
        assert "CUDA graphs are off" in generated["log"]
