"""What only runs elsewhere: the workflows, and their scripts with stand-ins for the tools that they call."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
from packaging.version import Version

import vllm_gdn_plugin

yaml = pytest.importorskip("yaml", reason="PyYAML isn't installed: run `python3.11 dev.py test`")

ROOT = Path(__file__).parents[2]
WORKFLOWS = {path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / ".github" / "workflows").glob("*.yml")}
JOBS = {f"{workflow}/{name}": job for workflow, spec in WORKFLOWS.items() for name, job in spec["jobs"].items()}


def step(job: str, name: str) -> str:
    """The script of a step."""
    (script,) = (s["run"] for s in JOBS[job]["steps"] if s.get("name") == name)
    return str(script)


def bash(script: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", script]
    return subprocess.run(command, cwd=cwd, env=os.environ | env, capture_output=True, text=True)


def test_every_action_is_pinned_and_every_right_is_given_to_one_job() -> None:
    uses = [s["uses"] for job in JOBS.values() for s in job.get("steps", ()) if "uses" in s]
    assert uses
    assert all(re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", action) for action in uses)
    whole = [job["uses"] for job in JOBS.values() if "uses" in job]
    assert all(workflow.startswith("./") for workflow in whole), "a job that is another workflow is one of ours"
    assert all(spec["permissions"] == {"contents": "read"} for spec in WORKFLOWS.values())
    rights = {name: job["permissions"] for name, job in JOBS.items() if "permissions" in job}
    assert rights == {"release/publish": {"id-token": "write"}, "newest-vllm/report": {"issues": "write"}}
    for name in rights:
        assert not any("checkout" in s.get("uses", "") for s in JOBS[name]["steps"]), "it runs none of our code"


def test_the_package_names_the_pythons_that_its_tests_run_on() -> None:
    names = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', (ROOT / "pyproject.toml").read_text())
    assert names == JOBS["ci/unit"]["strategy"]["matrix"]["python"]


def test_the_current_version_is_in_the_changelog() -> None:
    """Under a heading of its own, or below Unreleased as long as no later one is there."""
    text = (ROOT / "CHANGELOG.md").read_text()
    sections = re.findall(
        r"^## \[([^\]]+)\](?: - (\d{4}-\d\d-\d\d))?\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL
    )
    (unreleased, no_date, entries), *released = sections
    assert (unreleased, no_date) == ("Unreleased", "")
    versions = [Version(version) for version, _, _ in released]
    assert versions == sorted(versions, reverse=True)
    assert all(date and "- " in body for _, date, body in released)
    current = Version(vllm_gdn_plugin.__version__)
    assert current in versions[:1] or (current > max(versions, default=Version("0")) and "- " in entries)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    script = """
        git init --quiet --initial-branch main .
        git config user.email someone@example.org
        git config user.name Someone
        mkdir vllm_gdn_plugin
        touch CHANGELOG.md vllm_gdn_plugin/plan.py README.md
        git add --all
        git commit --quiet --message base
    """
    assert bash(script, tmp_path).returncode == 0
    return tmp_path


@pytest.mark.parametrize(
    ("changed", "status"),
    [
        (["vllm_gdn_plugin/new.py", "README.md"], 1),
        (["vllm_gdn_plugin/plan.py", "CHANGELOG.md"], 0),
        (["README.md"], 0),
    ],
    ids=str,
)
def test_a_change_of_the_package_needs_an_entry(repository: Path, changed: list[str], status: int) -> None:
    for name in changed:
        (repository / name).write_text("changed\n")
    assert bash("git add --all && git commit --quiet --message change", repository).returncode == 0
    script = step("ci/changelog", "A change of the package has an entry in CHANGELOG.md")
    result = bash(script, repository, BASE="HEAD~1")
    assert result.returncode == status
    assert ("CHANGELOG.md" in result.stdout) == bool(status)


def stand_in(folder: Path, name: str, script: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/bash\n{script}\n")
    path.chmod(0o755)


@pytest.mark.parametrize(("status", "fails"), [(1, False), (2, True)])
def test_the_newest_release_is_checked_by_its_wheel(tmp_path: Path, status: int, fails: bool) -> None:
    (tmp_path / "newest").mkdir()
    (tmp_path / "newest" / "vllm-0.34.1-cp38-abi3-manylinux1_x86_64.whl").touch()
    stand_in(tmp_path, "vllm-gdn-plugin", f'echo "reason: $*"; exit {status}')
    output = tmp_path / "output"
    script = step("newest-vllm/check", "Check its source; nothing of it is imported")
    result = bash(script, tmp_path, PATH=f"{tmp_path}:{os.environ['PATH']}", GITHUB_OUTPUT=str(output))
    assert bool(result.returncode) == fails
    arguments = "check --vllm-version 0.34.1 --vllm-source newest/vllm-0.34.1-cp38-abi3-manylinux1_x86_64.whl"
    assert result.stdout == f"reason: {arguments}\n"
    if not fails:
        told = f"report<<end of report\nreason: {arguments}\nend of report\n"
        assert output.read_text() == f"status={status}\n{told}"


@pytest.mark.parametrize("number", ["", "7"], ids=["no issue yet", "an open issue"])
def test_one_issue_is_opened_and_then_brought_up_to_date(tmp_path: Path, number: str) -> None:
    job = JOBS["newest-vllm/report"]
    assert job["if"] == "needs.check.outputs.status == '1'"
    name = "Open an issue, or bring the open one up to date"
    (env,) = (s["env"] for s in job["steps"] if s.get("name") == name)
    stand_in(tmp_path, "gh", f'printf "%s|" "$@" >>calls; echo >>calls; test "$2" != list || echo "{number}"')
    env = {"TITLE": env["TITLE"], "REPORT": "reason  `$(touch planted)`", "RUN": "https://example.org/run"}
    result = bash(step("newest-vllm/report", name), tmp_path, PATH=f"{tmp_path}:{os.environ['PATH']}", **env)
    assert result.returncode == 0, result.stderr
    calls = (tmp_path / "calls").read_text()
    assert calls.startswith("issue|list|--state|open|")
    action = f"issue|edit|{number}|--body|" if number else f"issue|create|--title|{env['TITLE']}|--body|"
    assert f"\n{action}```\n{env['REPORT']}\n```\n" in calls
    assert calls.count("issue|") == 2
    assert not (tmp_path / "planted").exists(), "what the report says is never run"
