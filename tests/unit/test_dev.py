"""dev.py, with an environment that is not set up: what it runs there, and what it leaves alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WITHOUT_SETTING_UP = """
import dev, sys
dev.set_up = lambda env: None
dev.triton = lambda env: "/triton"
sys.exit(dev.main())
"""
TOOL = """#!{python}
import os, pathlib, sys, time
which = [a for a in sys.argv[1:] if a in ("check", "format", "tests/kernel") and "--ignore" not in sys.argv]
name = "-".join([pathlib.Path(sys.argv[0]).name, *which]).replace("/", "-")
here = pathlib.Path({here!r})
kernel = name == "pytest-tests-kernel"
assert os.environ.get("PYTHONPATH") == ("/triton" if kernel else None)
assert os.environ.get("TRITON_INTERPRET") == ("1" if kernel else None)
try:
    here.joinpath(name).write_text(" ".join(sys.argv[1:]))
    time.sleep(60 if name == os.environ.get("HANGS") else 0)
except KeyboardInterrupt:
    time.sleep(0.5)
    here.joinpath("stopped").touch()
sys.exit(name == os.environ.get("FAILS"))
"""


@pytest.fixture
def venv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An environment whose tools only note how they were called, each in a file."""
    (tmp_path / "bin").mkdir()
    for name in ("ruff", "mypy", "pytest"):
        path = tmp_path / "bin" / name
        path.write_text(TOOL.format(python=sys.executable, here=str(tmp_path)))
        path.chmod(0o755)
    monkeypatch.setenv("DEV_VENV", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return tmp_path


CHECKS = {"ruff-check", "ruff-format", "mypy", "pytest-tests-kernel", "pytest"}


def test_arguments_are_those_of_one_pytest(venv: Path) -> None:
    command = [sys.executable, "-c", WITHOUT_SETTING_UP, "test", "tests/unit", "-k", "contract"]
    passed = subprocess.run(command, capture_output=True, text=True)
    assert (passed.returncode, passed.stdout.splitlines()[-1]) == (0, "dev.py: all checks passed")
    assert (venv / "pytest").read_text().endswith("tests/unit -k contract")
    assert {path.name for path in venv.iterdir()} & CHECKS == CHECKS - {"pytest-tests-kernel"}


def test_all_checks_run_also_after_one_has_failed(venv: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = [sys.executable, "-c", WITHOUT_SETTING_UP, "test"]
    passed = subprocess.run(command, capture_output=True, text=True)
    assert (passed.returncode, passed.stdout.splitlines()[-1]) == (0, "dev.py: all checks passed")
    assert (venv / "pytest").read_text().endswith("--ignore tests/kernel")
    for name in CHECKS:
        (venv / name).unlink()
    monkeypatch.setenv("FAILS", "ruff-check")
    failed = subprocess.run(command, capture_output=True, text=True)
    assert (failed.returncode, failed.stdout.splitlines()[-1]) == (1, "dev.py: ruff check failed")
    assert {path.name for path in venv.iterdir()} >= CHECKS


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_what_it_runs_may_stop_first(
    venv: Path, number: signal.Signals, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HANGS", "pytest")
    ignoring = ["sh", "-c", 'trap "" INT; exec "$@"', "sh"]  # as a shell does for what it runs in the background
    command = [*ignoring, sys.executable, "-c", WITHOUT_SETTING_UP, "test"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    while not (venv / "pytest").exists() or not (venv / "pytest").read_text():
        assert process.poll() is None
        time.sleep(0.01)
    if number == signal.SIGINT:  # a terminal sends it to both
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    assert process.wait() == status
    assert (venv / "stopped").exists()


@pytest.mark.skipif(sys.version_info < (3, 11), reason="dev.py needs Python 3.11")
def test_a_directory_of_someone_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    env = os.environ | {"DEV_VENV": str(tmp_path)}
    refused = subprocess.run([sys.executable, ROOT / "dev.py", "setup"], env=env, capture_output=True, text=True)
    assert (refused.returncode, refused.stderr.count("\n")) == (1, 1)
    assert "wasn't made by dev.py" in refused.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
