"""Write the tables of README and docs from data: rules and settings from the code, releases from tools/releases.json.

    python tools/readme.py [--check]

`--check` writes nothing and exits with 1 where a page is stale.
"""

import json
import re
import sys
from itertools import groupby
from pathlib import Path
from typing import Any

from vllm_gdn_plugin.decide.contract import GDN_CLASSES
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
    head = ["| strategy | what runs | needs |", "|---|---|---|"]
    rows = [f"| `{name}` | {WHAT[name]} | {'; '.join(rule.needs for rule in rules)} |" for name, rules in RULES.items()]
    return "\n".join([*head, *rows, "| `serial` | stock vLLM | nothing |"])


def decode() -> str:
    return "\n".join(f"- {rule.needs}" for rule in DECODE_RULES)


def settings() -> str:
    rows = [f"| `{name}` | `{default}` | {text} |" for name, default, text in describe()]
    return "\n".join(["| environment variable | default | |", "|---|---|---|", *rows])


def releases() -> str:
    lines = [
        "| vLLM | layer class | source | layer, its `forward_cuda` | CPU engine | with torch |",
        "|---|---|---|---|---|---|",
    ]
    for cells, rows in groupby(json.loads(RELEASES.read_text()), proof_of_release):
        lines.append(f"| {', '.join(row['version'] for row in rows)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def proof_of_release(row: dict[str, Any]) -> tuple[str, ...]:
    """What the table says about a release: layer class, source, layer, engine, torch."""
    if row["failures"]:
        return ("", "; ".join(row["failures"]), "", "", "")
    (name,) = (name for module, name in GDN_CLASSES.items() if f" {module}.{name} is as" in row["reason"])
    layer, engine = (len({case.split("-")[1] for case in cases}) for cases in row["op_calls"].values())
    engine_cell = f"{engine} models: the same" if engine else f"not run: {row['no_engine']}"
    return f"`{name}`", "holds", f"{layer} models: the same", engine_cell, row["torch"]


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
