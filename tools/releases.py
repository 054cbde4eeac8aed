"""Check the contract on the source of every supported vLLM release, and write tools/releases.json.

    python tools/releases.py [--also VERSION]...     (needs the package pypi-simple)

Takes each release's source distribution from the package index, unpacks the files that the contract reads, and runs
`vllm-gdn-plugin check --vllm-version X --vllm-source PATH` on them. Exits with 1 if one does not hold. The README's
table of supported releases is made from the result.
"""

import argparse
import json
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from packaging.version import Version
from pypi_simple import DistributionPackage, PyPISimple

from vllm_gdn_plugin.contract import GDN_CLASSES, HELPERS
from vllm_gdn_plugin.versions import judge_version

RESULT = Path(__file__).with_suffix(".json")
NEEDED = {name.replace(".", "/") + ".py" for name in (*GDN_CLASSES, *HELPERS)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--also", action="append", default=[], metavar="VERSION", help="one outside the range, too")
    also = parser.parse_args().also
    rows = []
    with PyPISimple() as index, tempfile.TemporaryDirectory() as scratch:
        for package in index.get_project_page("vllm").packages:
            if package.package_type == "sdist" and package.version and wanted(package.version, also):
                rows.append(check(package, index, Path(scratch)))
                print(f"{rows[-1]['version']:<8} {rows[-1]['status']:<8} {rows[-1]['reason']}", flush=True)
    rows.sort(key=lambda row: Version(row["version"]))
    RESULT.write_text(json.dumps(rows, indent=1) + "\n")
    return int(any(row["status"] != "active" for row in rows if row["version"] not in also))


def wanted(version: str, also: list[str]) -> bool:
    return version in also or (judge_version(version).admitted and not Version(version).is_prerelease)


def check(package: DistributionPackage, index: PyPISimple, scratch: Path) -> dict[str, str]:
    version = str(package.version)
    archive, source = scratch / package.filename, scratch / version
    index.download_package(package, archive)
    with tarfile.open(archive) as tar:
        members = [m for m in tar if m.name.partition("/")[2] in NEEDED]
        tar.extractall(source, members, filter="data")
    archive.unlink()
    (root,) = source.iterdir()
    command = [sys.executable, "-m", "vllm_gdn_plugin", "check", "--json", "--vllm-version", version]
    report = json.loads(subprocess.run([*command, "--vllm-source", root], stdout=subprocess.PIPE, text=True).stdout)
    return {"version": version, "status": report["status"], "reason": report["reason"]}


if __name__ == "__main__":
    sys.exit(main())
