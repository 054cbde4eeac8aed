"""Releases of vLLM to come, made here from the installed one: stock vLLM runs, and one line says what has changed.

Each is a directory of links to the installed package in which a few files are edited; nothing of vLLM is kept.
"""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from answered import our_lines, said
from serving import MODEL_NAME, engine_env, serve

from vllm_gdn_plugin.decide.contract import GDN_CLASSES, layer_module

MODULE, CLASS = next(iter(GDN_CLASSES.items()))
VERSION = "0.34.0+cpu"
ON = {"VLLM_GDN_PLUGIN_STRATEGY": "dual_stream"}
ALLOW = {"VLLM_GDN_PLUGIN_ALLOW_UNTESTED": "1"}

SPEC = importlib.util.find_spec("vllm")
INSTALLED = Path(next(iter(SPEC.submodule_search_locations or []))) if SPEC else Path()

pytestmark = pytest.mark.skipif(
    layer_module(INSTALLED) != MODULE, reason=f"the edits are made for releases of vLLM with {MODULE}"
)


def file_of(module: str) -> Path:
    return Path(*module.split(".")[1:]).with_suffix(".py")


LAYER, MODEL = file_of(MODULE), file_of("vllm.model_executor.models.qwen3_5")
CUSTOM_OP = file_of("vllm.model_executor.custom_op")

TWO_CALLS = """\
        mixed_qkvz, _ = self.in_proj_qkvz(hidden_states)
        ba, _ = self.in_proj_ba(hidden_states)
"""
HELPER_CALL = "        mixed_qkvz, ba = self._input_projection(hidden_states)\n"
HELPER = """\
    def _input_projection(self, hidden_states):
        return self.in_proj_qkvz(hidden_states)[0], self.in_proj_ba(hidden_states)[0]

"""
OP = """

def gdn_in_proj(
    hidden_states: torch.Tensor, qkvz_size: int, ba_size: int, layer_name: LayerNameType
) -> tuple[torch.Tensor, torch.Tensor]:
    self = get_forward_context().no_compile_layers[_resolve_layer_name(layer_name)]
    return self.in_proj_qkvz(hidden_states)[0], self.in_proj_ba(hidden_states)[0]


def _gdn_in_proj_fake(hidden_states, qkvz_size, ba_size, layer_name):
    return hidden_states.new_empty((hidden_states.size(0), qkvz_size)), hidden_states.new_empty(
        (hidden_states.size(0), ba_size)
    )


direct_register_custom_op(op_name="gdn_in_proj", op_func=gdn_in_proj, fake_impl=_gdn_in_proj_fake)
"""
OP_CALL = """\
        mixed_qkvz, ba = torch.ops.vllm.gdn_in_proj(
            hidden_states,
            self.in_proj_qkvz.output_size_per_partition,
            self.in_proj_ba.output_size_per_partition,
            _encode_layer_name(self.prefix),
        )
"""
NARROW_PROJECTION = """\
        self.in_proj_ba = self.create_ba_proj(
            hidden_size=self.hidden_size,
            num_v_heads=self.num_v_heads,
            quant_config=self.quant_config,
            prefix=f"{prefix}.in_proj_ba",
        )
"""
ONE_CALL = """\
        both, _ = self.in_proj(hidden_states)
        mixed_qkvz, ba = both.split([both.size(-1) - 2 * self.num_v_heads, 2 * self.num_v_heads], dim=-1)
"""
WIDE_SIZES = "[key_dim, key_dim, value_dim, value_dim]\n"

NEW_LAYER = """\
layer = super().__new__(layer_cls_to_instantiate)
        return layer"""

Edits = dict[Path, list[tuple[str, str]]]


class Release(NamedTuple):
    """What a release to come changes, and what the user is told."""

    edits: Callable[[], Edits]
    told: tuple[str, ...]
    moves: Mapping[Path, Path] = {}


def everywhere(old: str, new: str) -> Edits:
    texts = {file: file.read_text() for file in INSTALLED.rglob("*.py")}
    return {file.relative_to(INSTALLED): [(old, new)] for file, text in texts.items() if old in text}


ELSEWHERE = "vllm.model_executor.layers.gated_delta_net"
UPGRADE = "upgrade vllm-gdn-plugin, or use a release of vLLM >="
UNINSTALL = "the plugin is not needed any more and stands down; you can uninstall vllm-gdn-plugin"

RELEASES = {
    "the class is renamed": Release(
        lambda: everywhere(CLASS, "QwenDeltaNet"),
        (f"there is no class {CLASS} in {MODULE}, it may now be QwenDeltaNet", UPGRADE),
    ),
    "the module has moved": Release(
        lambda: everywhere(MODULE, ELSEWHERE),
        (f"the GDN layer has moved: there is neither {MODULE} nor", UPGRADE),
        {LAYER: file_of(ELSEWHERE)},
    ),
    "it overlaps by itself": Release(
        lambda: {LAYER: [(TWO_CALLS, OP_CALL), ("\nlogger = ", f"{OP}\nlogger = ")]},
        ("this vLLM already runs the two GDN input projections together by itself", UNINSTALL),
    ),
    "one in_proj": Release(
        lambda: {
            LAYER: [
                (TWO_CALLS, ONE_CALL),
                (NARROW_PROJECTION, ""),
                ("self.in_proj_qkvz = ", "self.in_proj = "),
                ('prefix=f"{prefix}.in_proj_qkvz"', 'prefix=f"{prefix}.in_proj"'),
                (WIDE_SIZES, "[key_dim, key_dim, value_dim, value_dim, self.num_v_heads, self.num_v_heads]\n"),
            ],
            MODEL: [
                ('(".in_proj_qkvz", (0, 1, 2))', '(".in_proj", (0, 1, 2))'),
                ('(".in_proj_qkvz", 3)', '(".in_proj", 3)'),
                ('(".in_proj_ba", 0)', '(".in_proj", 4)'),
                ('(".in_proj_ba", 1)', '(".in_proj", 5)'),
            ],
        },
        ("this vLLM already runs the two GDN input projections together by itself", UNINSTALL),
    ),
    "layers are made otherwise": Release(
        lambda: {CUSTOM_OP: [("return super().__new__(layer_cls_to_instantiate)", NEW_LAYER)]},
        ("PluggableLayer.__new__ does not look a layer's class up by its name and make one of it", UPGRADE),
    ),
    "a helper calls the projections": Release(
        lambda: {
            LAYER: [(TWO_CALLS, HELPER_CALL), ("    def _output_projection(", f"{HELPER}    def _output_projection(")]
        },
        ("forward_cuda: it calls _input_projection, which uses the projections itself", UPGRADE),
    ),
}
JOIN = OP.replace("gdn_in_proj", "gdn_in_proj_join")
SAME_OP_NAME = Release(lambda: {LAYER: [("\nlogger = ", f"{JOIN}\nlogger = ")]}, ())


def write(release: Release, site: Path) -> None:
    """Make `site` hold a `vllm` that is the installed one but for the edits, and calls itself `VERSION`."""
    files = {file: (INSTALLED / file).read_text() for file in (*release.edits(), *release.moves)}
    for file, replacements in release.edits().items():
        for old, new in replacements:
            assert old in files[file], f"{file} has no {old!r}: this edit changes nothing"
            files[file] = files[file].replace(old, new)
    files = {release.moves.get(file, file): text for file, text in files.items()}
    files[Path("_version.py")] = f"__version__ = {VERSION!r}\n__version_tuple__ = (0, 34, 0)\n"
    link(INSTALLED, site / "vllm", {INSTALLED / file for file in (*files, *release.moves)})
    for file, text in files.items():
        (site / "vllm" / file).write_text(text)
    information = site / f"vllm-{VERSION}.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {VERSION}\n")


def link(source: Path, target: Path, without: set[Path]) -> None:
    """Make `target` a directory of links to what is in `source`, but for the files `without` and compiled ones."""
    target.mkdir(parents=True)
    for entry in source.iterdir():
        if any(entry in file.parents for file in without):
            link(entry, target / entry.name, without)
        elif entry not in without and entry.name != "__pycache__":
            (target / entry.name).symlink_to(entry)


@pytest.fixture(scope="module")
def to_come(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, str]]:
    """`to_come(change)`: the settings that run the release of this change in place of the installed one."""

    @cache
    def settings(change: str) -> dict[str, str]:
        site = tmp_path_factory.mktemp("release")
        write(RELEASES.get(change, SAME_OP_NAME), site)
        return {"PYTHONPATH": os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])}

    return settings


@pytest.fixture(scope="module")
def stock(run_generate: Callable[..., Any], to_come: Callable[[str], dict[str, str]]) -> Callable[[str], Any]:
    return cache(lambda change: run_generate("qwen3_5", env=to_come(change) | {"VLLM_PLUGINS": ""}))


def foretold(env: Mapping[str, str]) -> dict[str, Any]:
    """What `vllm-gdn-plugin check` reports there."""
    command = [sys.executable, "-m", "vllm_gdn_plugin", "check", "--json"]
    result = subprocess.run(command, env=env, cwd=env["TMPDIR"], stdout=subprocess.PIPE, text=True)
    report: dict[str, Any] = json.loads(result.stdout)
    assert (result.returncode, report["status"], report["strategy"]) == (1, "refused", "serial")
    assert report["vllm_version"] == VERSION
    return report


def the_line(log: str) -> str:
    (line,) = our_lines(log)
    return line


@pytest.mark.slow
@pytest.mark.parametrize("allow", [True, False])
@pytest.mark.parametrize("change", RELEASES)
def test_stock_vllm_runs_and_one_line_says_what_has_changed(
    run_generate: Callable[..., Any],
    to_come: Callable[[str], dict[str, str]],
    stock: Callable[[str], Any],
    scratch: Path,
    change: str,
    allow: bool,
) -> None:
    env = to_come(change) | ON | (ALLOW if allow else {})
    got = run_generate("qwen3_5", env=env)
    assert said(got) == said(stock(change))
    line = the_line(got["log"])
    reason = foretold(engine_env(scratch, **env))["reason"]
    assert line.endswith(f"steps aside, vLLM runs as it is: {reason}")
    for part in RELEASES[change].told:
        assert part in reason
    assert f"vLLM {VERSION} is newer than the supported range" in reason
    assert "to try it all the same" not in reason, "that would not help"


@pytest.mark.slow
def test_an_op_of_the_same_name_in_the_host_s_namespace_is_no_obstacle(
    run_generate: Callable[..., Any],
    to_come: Callable[[str], dict[str, str]],
    stock: Callable[[str], Any],
    witness: Callable[..., Any],
) -> None:
    change = "an op of the same name"
    env, _ = witness()
    env["PYTHONPATH"] = os.pathsep.join([to_come(change)["PYTHONPATH"], env["PYTHONPATH"]])
    got = run_generate("qwen3_5", env=env | ON | ALLOW)
    assert said(got) == said(stock(change))
    assert list(got["ran"]) == ["dual_stream"]
    assert f"dual_stream on 3 of 3 GDN layers (platform cpu, vLLM {VERSION})" in the_line(got["log"])


@pytest.mark.slow
def test_a_server_of_a_release_to_come(
    models: Callable[[str], Path], to_come: Callable[[str], dict[str, str]], scratch: Path
) -> None:
    body = {"model": MODEL_NAME, "prompt": "Gated delta", "max_tokens": 16, "temperature": 0, "logprobs": 1}
    args = ["--mamba-ssm-cache-dtype", "float32", "--max-model-len", "256", "--max-num-seqs", "4", "--enforce-eager"]
    answers = []
    for plugins in ({"VLLM_PLUGINS": ""}, ON | ALLOW):
        env = engine_env(scratch, **to_come("it overlaps by itself"), **plugins)
        with serve(models("qwen3_5"), env=env, args=args) as server:
            answers.append(server.post("/v1/completions", body)["choices"])
            log = server.log_text()
    assert answers[0] == answers[1]
    assert the_line(log).endswith(foretold(env)["reason"])
    assert UNINSTALL in the_line(log)
