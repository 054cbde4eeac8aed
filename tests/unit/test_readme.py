"""The README says what the code does, and what was proven."""

import json
import subprocess
import sys
from pathlib import Path

from packaging.version import Version

from vllm_gdn_plugin.versions import NEWEST_SERIES, OLDEST

ROOT = Path(__file__).resolve().parents[2]


def test_its_tables_are_current() -> None:
    command = [sys.executable, ROOT / "tools" / "readme.py", "--check"]
    assert subprocess.run(command).returncode == 0, "run python tools/readme.py"


def test_every_series_is_proven() -> None:
    rows = json.loads((ROOT / "tools" / "releases.json").read_text())
    assert [row["version"] for row in rows if row["failures"]] == []
    oldest, newest = (int(version.split(".")[1]) for version in (OLDEST, NEWEST_SERIES))
    assert {Version(row["version"]).minor for row in rows} == set(range(oldest, newest + 1)), "run dev.py releases"
