"""Write the README's tables from the code and from benchmarks/results.

    python tools/readme.py [--check]

`--check` writes nothing and exits with 1 where the README is stale.
"""

import json
import re
import sys
from pathlib import Path

from vllm_gdn_plugin.contract import GDN_CLASSES
from vllm_gdn_plugin.plan import DUAL_STREAM, FUSED, RULES
from vllm_gdn_plugin.settings import describe

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
RELEASES = ROOT / "tools" / "releases.json"
RESULTS = ROOT / "benchmarks" / "results" / "README-section.md"

WHAT = {
    FUSED: "one GEMM for both",
    DUAL_STREAM: "two CUDA streams, while a CUDA graph is captured",
}


def strategies() -> str:
    head = ["| strategy | what runs | needs |", "|---|---|---|"]
    rows = [f"| `{name}` | {WHAT[name]} | {'; '.join(rule.needs for rule in rules)} |" for name, rules in RULES.items()]
    return "\n".join([*head, *rows, "| `serial` | stock vLLM | nothing |"])


def settings() -> str:
    rows = [f"| `{name}` | `{default}` | {text} |" for name, default, text in describe()]
    return "\n".join(["| environment variable | default | |", "|---|---|---|", *rows])


def releases() -> str:
    rows = json.loads(RELEASES.read_text())
    classes = {f"{module}.{name}": name for module, name in GDN_CLASSES.items()}
    lines = ["| vLLM | layer class | contract |", "|---|---|---|"]
    for path, name in reversed(classes.items()):
        versions = [row["version"] for row in rows if row["status"] == "active" and f" {path} is as" in row["reason"]]
        lines.append(f"| {', '.join(versions)} | `{name}` | holds |")
    lines += [f"| {row['version']} | | {row['reason']} |" for row in rows if row["status"] != "active"]
    return "\n".join(lines)


def results() -> str:
    return RESULTS.read_text().strip()


def filled(text: str) -> str:
    for name, make in {
        "strategies": strategies,
        "settings": settings,
        "releases": releases,
        "results": results,
    }.items():
        start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        body = f"{start}\n{make()}\n{end}"
        text = re.sub(f"{start}.*?{end}", lambda match, body=body: body, text, flags=re.DOTALL)
    return text


def main() -> int:
    text = README.read_text()
    if "--check" in sys.argv[1:]:
        return int(filled(text) != text)
    README.write_text(filled(text))
    return 0


if __name__ == "__main__":
    sys.exit(main())
