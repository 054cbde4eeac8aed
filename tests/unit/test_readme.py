"""The README and docs say what the code does, and what was measured."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.version import Version

from vllm_gdn_plugin.versions import NEWEST_SERIES, OLDEST

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
QUOTE = re.compile(r"^<!-- from (.*?) -->(.*?)^<!-- /from -->", re.DOTALL | re.MULTILINE)
NUMBER = re.compile(r"(?<![\w.])(\d+\.\d+(?:\.\d+)*|\d+(?= %| (?:us|ms|s|MiB|GiB)\b))")
"""What has a point or a unit."""


def test_its_tables_are_current() -> None:
    command = [sys.executable, ROOT / "tools" / "readme.py", "--check"]
    assert subprocess.run(command).returncode == 0, "run python tools/readme.py"


def missing_numbers(page: str) -> list[str]:
    """The numbers that a page quotes and that the files that it names do not have, not even with more digits."""
    found = []
    for files, text in QUOTE.findall(page):
        known = {number for file in files.split() for number in re.findall(r"[\d.]*\d", (ROOT / file).read_text())}
        known |= {f"{float(number):.1f}" for number in known if re.fullmatch(r"\d+\.\d+", number)}
        found += [number for number in NUMBER.findall(re.sub(r"\]\(.*?\)", "]", text)) if number not in known]
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_each_quoted_number_is_in_its_file(page: Path) -> None:
    text = page.read_text()
    assert text.count("\n<!-- from ") == text.count("\n<!-- /from -->") == len(QUOTE.findall(text))
    assert missing_numbers(text) == []


def test_a_number_that_is_not_in_its_file_is_found(tmp_path: Path) -> None:
    (tmp_path / "some.json").write_text('{"change": [6.662, 2004]}')
    page = f"<!-- from {tmp_path}/some.json -->\n6.7, not 6.6 or 12345.6, 98765 % of 2004\n<!-- /from -->\n"
    assert missing_numbers(page) == ["6.6", "12345.6", "98765"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tables_can_be_read_on_a_phone(page: Path) -> None:
    rows = [line for line in page.read_text().splitlines() if line.startswith("|")]
    cells = [re.sub(r"\[(.*?)\]\(.*?\)|`", r"\1", cell).strip() for row in rows for cell in row.split("|")]
    assert [cell for cell in cells if len(cell) > 30] == []
    assert max((row.count("|") for row in rows), default=0) <= 8


def anchor(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_within_the_repository_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text()):
        name, _, part = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), target
        if part:
            assert part in [anchor(line.lstrip("# ")) for line in file.read_text().splitlines() if line[:1] == "#"]


def test_what_is_kept_of_the_results_is_quoted_and_small() -> None:
    pages = "".join(page.read_text() for page in [*PAGES, ROOT / "benchmarks" / "NOTES.md"])
    kept = [path for path in (ROOT / "benchmarks" / "results").rglob("*") if path.is_file()]
    assert [path.name for path in kept if path.stem not in pages] == []
    assert sum(path.stat().st_size for path in kept) < 2 << 20


def test_every_series_is_proven() -> None:
    rows = json.loads((ROOT / "tools" / "releases.json").read_text())
    assert [row["version"] for row in rows if row["failures"]] == []
    oldest, newest = (int(version.split(".")[1]) for version in (OLDEST, NEWEST_SERIES))
    assert {Version(row["version"]).minor for row in rows} == set(range(oldest, newest + 1)), "run dev.py releases"
