"""Write tables and lists of README and docs from data: rules and settings from the code, releases from releases.json.

    python tools/readme.py [--check]

`--check` writes nothing and exits with 1 where a page is stale.
"""

import json
import re
import sys
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import Any

from vllm_gdn_plugin.decide.decode import DECODE_RULES
from vllm_gdn_plugin.decide.plan import DUAL_STREAM, FUSED, RULES
from vllm_gdn_plugin.settings import describe

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RELEASES = ROOT / "tools" / "releases.json"

WHAT = {
    FUSED: "one GEMM for both",
    DUAL_STREAM: "two CUDA streams, while a CUDA graph is captured",
}


def strategies() -> str:
    parts = [f"**{name}** ({WHAT[name]}) needs:\n\n{needs(rules)}" for name, rules in RULES.items()]
    return "\n\n".join([*parts, "**serial** is stock vLLM, and needs nothing."])


def needs(rules: Iterable[Any]) -> str:
    return "\n".join(f"- {rule.needs}" for rule in rules)


def decode() -> str:
    return needs(DECODE_RULES)


def settings() -> str:
    return "\n".join(f"- `{name}` (default `{default}`): {text}" for name, default, text in describe())


def releases() -> str:
    found = json.loads(RELEASES.read_text())
    lines = ["| vLLM | source | layer | CPU engine | torch |", "|---|---|---|---|---|", *map(proof_of_release, found)]
    without = [row for row in found if row.get("no_engine")]
    for why, rows in groupby(without, key=lambda row: row["no_engine"]):
        lines += ["", f"No CPU engine of {', '.join(row['version'] for row in rows)} was run: {why}."]
    return "\n".join(lines)


def proof_of_release(row: dict[str, Any]) -> str:
    """The line of the table about a release."""
    if row["failures"]:
        return f"| {row['version']} | {'; '.join(row['failures'])} | | | |"
    layer, engine = (len({case.split("-")[1] for case in cases}) for cases in row["op_calls"].values())
    cell = f"{engine} models" if engine else "not run"
    return f"| {row['version']} | holds | {layer} models | {cell} | {row['torch']} |"


def filled(text: str) -> str:
    for make in (strategies, decode, settings, releases):
        start, end = f"<!-- {make.__name__} -->", f"<!-- /{make.__name__} -->"
        body = f"{start}\n{make()}\n{end}"
        text = re.sub(f"{start}.*?{end}", lambda match, body=body: body, text, flags=re.DOTALL)
    return text


def main() -> int:
    stale = [page for page in PAGES if filled(page.read_text()) != page.read_text()]
    if "--check" in sys.argv[1:]:
        return int(bool(stale))
    for page in stale:
        page.write_text(filled(page.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
