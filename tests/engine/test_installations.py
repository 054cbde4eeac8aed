"""The ways in which the plugin can be installed, or half removed, in a copy of this environment without it."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from answered import said
from serving import engine_env

ROOT = Path(__file__).parents[2]
PACKAGE = "vllm_gdn_plugin"
ON = {"VLLM_GDN_PLUGIN_STRATEGY": "dual_stream"}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, zipfile.ZipFile]:
    """The `wheel`, and the `editable` one, which holds metadata and a pointer to the tree that it was built from."""
    tree = tmp_path_factory.mktemp("tree")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    shutil.copytree(ROOT / PACKAGE, tree / PACKAGE, ignore=shutil.ignore_patterns("__pycache__"))
    wheels = {}
    for kind in ("wheel", "editable"):
        out = tree / kind
        command = f"import sys; from setuptools import build_meta; build_meta.build_{kind}(sys.argv[1])"
        subprocess.run([sys.executable, "-c", command, str(out)], cwd=tree, check=True, capture_output=True)
        (path,) = out.glob("*.whl")
        wheels[kind] = zipfile.ZipFile(path)
    return wheels


def environment(directory: Path) -> tuple[Path, Path]:
    """(interpreter, site directory) of an environment that has everything this one has, but for the plugin."""
    venv.create(directory, with_pip=False, symlinks=True)
    (site,) = directory.glob("lib/python*/site-packages")
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if PACKAGE not in entry.name:
            (site / entry.name).symlink_to(entry)
    return directory / "bin" / "python", site


def twice(built: dict[str, zipfile.ZipFile], site: Path, path: Path) -> None:
    built["wheel"].extractall(site)
    built["wheel"].extractall(path)


def editable_beside_a_wheel(built: dict[str, zipfile.ZipFile], site: Path, path: Path) -> None:
    built["editable"].extractall(site)
    built["wheel"].extractall(path)


def metadata_without_files(built: dict[str, zipfile.ZipFile], site: Path, path: Path) -> None:
    built["wheel"].extractall(site)
    shutil.rmtree(site / PACKAGE)


def files_without_metadata(built: dict[str, zipfile.ZipFile], site: Path, path: Path) -> None:
    built["wheel"].extractall(site)
    (information,) = site.glob(f"{PACKAGE}-*.dist-info")
    shutil.rmtree(information)


ACTIVE = (2, ["dual_stream on 3 of 3 GDN layers"], 0, "active")
INSTALLATIONS: dict[Callable[..., None], tuple[int, list[str], int, str]] = {
    twice: ACTIVE,
    editable_beside_a_wheel: ACTIVE,
    # vLLM loads the entry point, and says itself that this failed; there is nothing of ours to ask.
    metadata_without_files: (1, ["Failed to load plugin vllm_gdn_plugin"], 1, ""),
    # vLLM sees no plugin, so only `check` can say why nothing happens.
    files_without_metadata: (0, [], 1, "disabled"),
}
"""How often there is metadata, what the engine's log says of the plugin, and exit status and status of `check`."""


@pytest.mark.parametrize("install", INSTALLATIONS, ids=lambda install: install.__name__)
def test_the_engine_answers_and_one_line_tells(
    run_generate: Callable[..., Any],
    built: dict[str, zipfile.ZipFile],
    stock: Any,
    scratch: Path,
    tmp_path: Path,
    install: Callable[..., None],
) -> None:
    times, told, code, status = INSTALLATIONS[install]
    python, site = environment(tmp_path / "venv")
    (tmp_path / "path").mkdir()
    install(built, site, tmp_path / "path")
    # What the caller has on the path stays, an other vLLM say, but for the plugin.
    others = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p and not Path(p, PACKAGE).exists()]
    env = {"PYTHONPATH": os.pathsep.join([str(tmp_path / "path"), *others])} | ON

    count = "from importlib.metadata import distributions as d; print(len(list(d(name='vllm-gdn-plugin'))))"
    seen = subprocess.run([python, "-c", count], env=env, cwd=tmp_path, check=True, stdout=subprocess.PIPE, text=True)
    assert int(seen.stdout) == times
    got = run_generate("qwen3_5", env=env, launcher=[python])
    assert said(got) == said(stock)
    lines = [line for line in got["log"].splitlines() if "vllm-gdn-plugin" in line or "Failed to load" in line]
    assert len(lines) == len(told), got["log"]
    assert all(part in line for part, line in zip(told, lines, strict=True))

    command = [python, "-m", PACKAGE, "check", "--json"]
    check = subprocess.run(command, env=engine_env(scratch, **env), cwd=tmp_path, capture_output=True, text=True)
    assert check.returncode == code
    if status:
        assert json.loads(check.stdout)["status"] == status
    else:
        assert f"No module named {PACKAGE}" in check.stderr
