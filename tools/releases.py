"""Prove the plugin on every supported vLLM release, and write tools/releases.json.

    python3.11 dev.py releases [VERSION]...

For each release: the contract, checked on its source distribution as `vllm-gdn-plugin check --vllm-source` does; its
real layers with the plugin (tests/engine/test_construct.py); and where it has a working CPU build, its engine with and
without the plugin (tests/engine/test_tokens.py). With VERSIONs only these are done anew. Exits with 1 if something does
not hold, which the engines with experts of 0.21 to 0.23 do not on a CPU without AVX-512: there stock fails, too. The
table of docs/releases.md is made from the result.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from packaging.version import Version
from pypi_simple import DistributionPackage, PyPISimple
from source import fetch, packages

from dev import SOURCE_ONLY
from examples.tiny_model import KINDS
from vllm_gdn_plugin.decide.plan import DUAL_STREAM, FUSED
from vllm_gdn_plugin.versions import judge_version

ROOT = Path(__file__).resolve().parents[1]
RESULT = Path(__file__).with_suffix(".json")
CASES = [f"{strategy}-{kind}" for strategy in (DUAL_STREAM, FUSED) for kind in KINDS]
PROOFS = {
    "test_forward_cuda_runs_as_stock_does": CASES,
    "test_same_as_stock": [f"{case}-eager" for case in CASES],
}
"""The tests that a release must pass, with their cases; the second only where it has a working CPU engine."""
FILES = ("tests/engine/test_construct.py", "tests/engine/test_tokens.py")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("versions", nargs="*", metavar="VERSION")
    asked = parser.parse_args().versions
    with PyPISimple() as index:
        found = packages(index)
        supported = [v for v in found if judge_version(v).admitted and not Version(v).is_prerelease]
        if unknown := set(asked) - set(supported):
            parser.error(f"not a supported release: {', '.join(sorted(unknown))}")
        rows = {row["version"]: row for row in json.loads(RESULT.read_text())} if asked else {}
        wanted = sorted(asked or supported, key=Version)
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # an engine on a tiny model keeps one core busy
            for row in pool.map(lambda version: prove(index, found[version]), wanted):
                rows[row["version"]] = row
                print(f"{row['version']:<8} {'; '.join(row['failures']) or 'holds'}", flush=True)
                ordered = sorted(rows.values(), key=lambda row: Version(row["version"]))
                RESULT.write_text(json.dumps(ordered, indent=1) + "\n")
    return int(any(rows[version]["failures"] for version in wanted))


def prove(index: PyPISimple, package: DistributionPackage) -> dict[str, Any]:
    """All that was found out about a release: a row of the result."""
    version = str(package.version)
    with tempfile.TemporaryDirectory() as scratch:
        fetch(index, package, Path(scratch))
        command = [sys.executable, "-m", "vllm_gdn_plugin", "check", "--json", "--vllm-version", version]
        check = subprocess.run([*command, "--vllm-source", scratch], stdout=subprocess.PIPE, text=True)
        report = json.loads(check.stdout)
        tests = run_tests(version, Path(scratch, "results.xml"))
    row = {"version": version, "status": report["status"], "reason": report["reason"]} | tests
    if version in SOURCE_ONLY:
        row["no_engine"] = SOURCE_ONLY[version]
    row["failures"] = list(failures(row))
    return row


def run_tests(version: str, results: Path) -> dict[str, Any]:
    """The calls of the plugin's ops in each test that passed, by test and case, and what they ran with."""
    chosen = " or ".join(f"({test} and ({' or '.join(cases)}))" for test, cases in PROOFS.items())
    command = [sys.executable, str(ROOT / "dev.py"), "test", "--vllm", version, *FILES]
    command += ["-n", "0", "-m", "", "-k", chosen, f"--junitxml={results}", "-o", "junit_family=xunit1"]
    output = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True).stdout
    op_calls: dict[str, dict[str, int]] = {test: {} for test in PROOFS}
    ran: dict[str, set[str]] = {"vllm": set(), "torch": set()}
    for case in ElementTree.parse(results).iter("testcase") if results.exists() else ():
        test, _, parameters = case.attrib["name"].rstrip("]").partition("[")
        found = {p.attrib["name"]: p.attrib["value"] for p in case.iter("property")}
        if not any(case.find(tag) is not None for tag in ("failure", "error", "skipped")):
            op_calls[test][parameters] = int(found["op_calls"])
            for name, values in ran.items():
                values.add(Version(found[name]).public)
    if "all checks passed" not in output:
        print(output, file=sys.stderr)
    return {"op_calls": op_calls} | {name: ", ".join(sorted(values)) for name, values in ran.items()}


def failures(row: dict[str, Any]) -> Iterator[str]:
    if row["status"] != "active":
        yield row["reason"]
    if row["vllm"] != row["version"]:
        yield f"the tests ran with vLLM {row['vllm'] or 'of no version'}"
    for test, cases in PROOFS.items():
        if test == "test_same_as_stock" and "no_engine" in row:
            continue
        calls = row["op_calls"][test]
        yield from (f"{test}[{case}] did not pass" for case in cases if case not in calls)
        # fused is no op: its tests look at the weight themselves.
        ours = (case for case in cases if DUAL_STREAM in case)
        yield from (f"{test}[{case}] called no op of the plugin" for case in ours if calls.get(case) == 0)


if __name__ == "__main__":
    sys.exit(main())
