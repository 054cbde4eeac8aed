"""The wheel holds the package and nothing else, and says of itself what the code says."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from email import message_from_bytes
from email.message import Message
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from vllm_gdn_plugin.host.plugins import GROUP, NAME

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "vllm_gdn_plugin"


def missing() -> str | None:
    if importlib.util.find_spec("build") is None:
        return "build is not installed"
    try:
        found = version("setuptools")
    except PackageNotFoundError:
        return "setuptools is not installed"
    return None if Version(found) >= Version("77") else f"setuptools {found} is older than 77"


pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Built from a copy, so that the tree gets no build directory and lends none to the wheel."""
    tree = tmp_path_factory.mktemp("tree")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    shutil.copytree(PACKAGE, tree / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tree / "out"), str(tree)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    (path,) = (tree / "out").glob("*.whl")
    return zipfile.ZipFile(path)


@pytest.fixture(scope="module")
def metadata(wheel: zipfile.ZipFile) -> Message:
    (name,) = (n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))
    return message_from_bytes(wheel.read(name))


def test_it_holds_the_package_and_nothing_else(wheel: zipfile.ZipFile, metadata: Message) -> None:
    info = f"vllm_gdn_plugin-{metadata['Version']}.dist-info"
    about = ("METADATA", "WHEEL", "RECORD", "entry_points.txt", "top_level.txt", "licenses/LICENSE")
    modules = {file.relative_to(ROOT).as_posix() for file in PACKAGE.rglob("*.py")}
    assert set(wheel.namelist()) == modules | {f"{PACKAGE.name}/py.typed"} | {f"{info}/{name}" for name in about}
    for module in modules:
        assert wheel.read(module) == (ROOT / module).read_bytes()


def test_it_requires_packaging_alone(metadata: Message) -> None:
    requirements = [Requirement(text) for text in metadata.get_all("Requires-Dist", [])]
    assert [r.name for r in requirements if r.marker is None] == ["packaging"]
    assert not {r.name for r in requirements} & {"vllm", "torch", "triton"}, "those are the host's"


def test_vllm_finds_the_plugin_and_the_shell_the_command(wheel: zipfile.ZipFile) -> None:
    (name,) = (n for n in wheel.namelist() if n.endswith("entry_points.txt"))
    points = ConfigParser()
    points.read_string(wheel.read(name).decode())
    assert {section: dict(points[section]) for section in points.sections()} == {
        GROUP: {NAME: "vllm_gdn_plugin:register"},
        "console_scripts": {"vllm-gdn-plugin": "vllm_gdn_plugin.cli.main:main"},
    }
