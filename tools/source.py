"""Fetch the Python files of a vLLM release from its source distribution on the package index.

python tools/source.py VERSION DIRECTORY     (needs the package pypi-simple)
"""

import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

from pypi_simple import DistributionPackage, PyPISimple

CHECKED: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
"""For what is unpacked, where Python has it: from 3.11.4 on."""


def packages(index: PyPISimple) -> dict[str, DistributionPackage]:
    """The source distributions of vLLM by version."""
    found = index.get_project_page("vllm").packages
    return {package.version: package for package in found if package.package_type == "sdist" and package.version}


def fetch(index: PyPISimple, package: DistributionPackage, directory: Path) -> None:
    """Write the release's package `vllm` into `directory`."""
    with tempfile.TemporaryDirectory() as scratch:
        archive = Path(scratch, package.filename)
        index.download_package(package, archive)
        with tarfile.open(archive) as tar:
            for member in tar:
                _, _, member.name = member.name.partition("/")
                if member.name.startswith("vllm/") and member.name.endswith(".py"):
                    tar.extract(member, directory, **CHECKED)


if __name__ == "__main__":
    version, directory = sys.argv[1:]
    with PyPISimple() as index:
        fetch(index, packages(index)[version], Path(directory))
