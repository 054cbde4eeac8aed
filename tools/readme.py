"""Write the README's tables from the code and from benchmarks/results.

    python tools/readme.py [--check]

`--check` writes nothing and exits with 1 where the README is stale.
"""

import re
import sys
from pathlib import Path

from vllm_gdn_plugin.plan import DUAL_STREAM, FUSED, RULES
from vllm_gdn_plugin.settings import describe

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
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


def results() -> str:
    return RESULTS.read_text().strip()


def filled(text: str) -> str:
    for name, make in {"strategies": strategies, "settings": settings, "results": results}.items():
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
