"""The README says what the code does."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_its_tables_are_current() -> None:
    command = [sys.executable, ROOT / "tools" / "readme.py", "--check"]
    assert subprocess.run(command).returncode == 0, "run python tools/readme.py"
