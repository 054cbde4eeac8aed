"""vLLM's own tests of the GDN layer and of the plugin loader end with the plugin loaded as they do without it.

They come from the source distribution of the installed release, taken from the package index when this runs, and run
against the installed vLLM: nothing but its tests is unpacked. Where they name a model of the Hugging Face hub, they get
a tiny one with GDN layers, so no weights are downloaded.
"""

import functools
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import pytest
from packaging.version import Version
from serving import engine_env

from vllm_gdn_plugin.bench.engine.server import end_group
from vllm_gdn_plugin.host.imports import version

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

SELECTED = {
    "engines": {
        "tests/v1/e2e/test_cpu_linear_attn_chunked_prefix.py": "chunked prefill and the prefix cache of GDN layers",
        "tests/plugins_tests/test_stats_logger_plugins.py": "the plugin loader: loggers",
        # Last: it leaves its process with vLLM's environment variables cached.
        "tests/plugins_tests/test_scheduler_plugins.py": "a scheduler from outside",
    },
    "layer": {
        "tests/kernels/mamba/test_gdn_output_projection.py": "a method of the layer",
        "tests/kernels/mamba/test_gdn_rocm_layout_dispatch.py": "the same, all skipped without ROCm",
        "tests/kernels/mamba/cpu/test_cpu_gdn_ops.py": "the layer's kernels on CPU, and its methods that call them",
        "tests/v1/attention/test_gdn_aiter_flydsl.py": "the choice of the layer's prefill kernel",
        "tests/v1/attention/test_gdn_metadata_builder.py": "the metadata that the layer reads",
        "tests/v1/attention/test_gdn_zero_draft_spec_rows.py": "the same for speculative decoding",
        "tests/v1/worker/test_mamba_hybrid_model_state.py": "the state of a model with such layers",
        "tests/model_executor/test_qwen3_5_quantization.py": "the names of the layer's projections in a checkpoint",
    },
    "loader": {
        "tests/plugins_tests/test_endpoint_plugins.py": "HTTP endpoints",
        "tests/plugins_tests/test_io_processor_plugins.py": "processors of input and output",
        "tests/v1/worker/test_logits_processor_loader.py": "processors of logits",
        "tests/test_zen_cpu_platform_detection.py": "platforms",
        "tests/model_executor/test_enabled_custom_ops.py": "the registry beside that of replaced layers",
        "tests/test_envs.py": "vLLM's environment variables, to which the plugin adds its own",
    },
    "platform": {
        "tests/plugins_tests/test_platform_plugins.py": "a platform and a layer of another plugin",
    },
}
"""What is run, each group in a process of its own: files with a test that runs without a GPU, and what it is about.

Not every release has all of them. Left out: what needs Triton, flashinfer or a real checkpoint.
"""
DUMMY_PLUGINS = {
    "engines": ["vllm_add_dummy_stat_logger"],
    "layer": [],
    "loader": ["vllm_add_dummy_endpoint_plugin"],
    "platform": ["vllm_add_dummy_platform"],
}
"""The tests' own plugins, which a group finds installed."""
HUB_MODELS = ("Qwen/Qwen3.5-0.8B", "facebook/opt-125m")
RUN_SECONDS = 1500


class Run(NamedTuple):
    outcomes: dict[str, str]
    """By test: passed, failure, error, or the reason why it was skipped."""
    events: set[str]
    log: str


@pytest.fixture(scope="module")
def tree(scratch: Path, models: Callable[[str], Path]) -> Path:
    """A directory with vLLM's tests, the tests' own plugins in `plugins/GROUP` and a local model hub in `hub`."""
    how = "isn't installed: run `python3.11 dev.py test -m slow`"
    pypi_simple = pytest.importorskip("pypi_simple", reason=f"pypi-simple {how}")
    for package in ("tblib", "pytest_asyncio"):
        pytest.importorskip(package, reason=f"{package}, which vLLM's tests import, {how}")
    from source import CHECKED

    release = Version(version()).base_version
    archive = scratch / f"vllm-{release}.tar.gz"
    try:
        with pypi_simple.PyPISimple() as index:
            packages = index.get_project_page("vllm").packages
            found = [p for p in packages if p.package_type == "sdist" and p.version == release]
            if not found:
                pytest.skip(f"the package index has no source distribution of vLLM {release}")
            index.download_package(found[0], archive)
    except OSError as error:  # those of requests, too
        pytest.skip(f"the package index does not answer: {error}")
    tree = scratch / f"vllm-{release}"
    needed = re.compile(rf"{re.escape(tree.name)}/(pyproject\.toml$|tests/|examples/basic/)")
    with tarfile.open(archive) as tar:
        tar.extractall(scratch, [member for member in tar if needed.match(member.name)], **CHECKED)
    archive.unlink()
    for group, names in DUMMY_PLUGINS.items():
        sources = [source for name in names if (source := tree / "tests" / "plugins" / name).exists()]
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target"]
        if sources:
            subprocess.run([*command, tree / "plugins" / group, *sources], check=True)
    fill_hub(tree, models("qwen3_5"))
    return tree


def fill_hub(tree: Path, model: Path) -> None:
    """Lay `model` out as the local cache of the Hugging Face hub does, under each of HUB_MODELS.

    With a tokenizer of whole words: in bytes the tests' prompts are longer than they allow.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel(unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    source = tree / next(iter(SELECTED["engines"]))
    words.train([str(source)] * source.exists(), trainers.WordLevelTrainer(vocab_size=320, special_tokens=["<unk>"]))
    for name in HUB_MODELS:
        repository = tree / "hub" / f"models--{name.replace('/', '--')}"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text("0")
        snapshot = shutil.copytree(model, repository / "snapshots" / "0")
        PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(snapshot)


@pytest.fixture(scope="module")
def run(tree: Path, scratch: Path, witness: Callable[..., Any]) -> Callable[..., Run]:
    """`run(group, strategy)`: vLLM's tests of `group` with the plugin, or without it where `strategy` is None."""

    @functools.cache
    def run_group(group: str, strategy: str | None) -> Run:
        files = [name for name in SELECTED[group] if (tree / name).exists()]
        if not files:
            pytest.skip(f"{tree.name} has none of these tests")
        settings, events = witness()
        first = [str(tree), str(tree / "plugins" / group), settings["PYTHONPATH"]]
        settings["PYTHONPATH"] = os.pathsep.join([*first, *filter(None, [os.environ.get("PYTHONPATH")])])
        settings |= {"HF_HUB_CACHE": str(tree / "hub"), "TORCH_COMPILE_DISABLE": "1", "OMP_NUM_THREADS": "1"}
        if strategy:
            settings["VLLM_GDN_PLUGIN_STRATEGY"] = strategy
        log_path, report = tree / f"{group}-{strategy}.log", tree / f"{group}-{strategy}.xml"
        command = [sys.executable, Path(__file__).with_name("host_pytest.py"), "with" if strategy else "without"]
        command += ["-p", "no:cacheprovider", "--timeout", "600", f"--junitxml={report}", *files]
        with log_path.open("wb") as log:
            process = subprocess.Popen(
                command, cwd=tree, env=engine_env(scratch, **settings), stdout=log, stderr=log, start_new_session=True
            )
            try:
                process.wait(RUN_SECONDS)
            finally:
                end_group(process)
        text = log_path.read_text(errors="replace")
        assert report.exists(), text[-4000:]
        return Run(read_outcomes(report), {event["event"] for event in events()}, text)

    return run_group


def read_outcomes(report: Path) -> dict[str, str]:
    outcomes = {}
    for case in ElementTree.parse(report).iter("testcase"):
        ends = [end for end in case if end.tag in ("skipped", "failure", "error")]
        said = [end.get("message", "") if end.tag == "skipped" else end.tag for end in ends]
        outcomes[f"{case.get('classname')}::{case.get('name')}"] = ", ".join(said) or "passed"
    return outcomes


@pytest.mark.parametrize(
    ("group", "strategy"),
    [("engines", "dual_stream"), ("engines", "fused"), ("layer", "fused"), ("loader", "fused"), ("platform", "fused")],
)
def test_they_end_as_without_the_plugin(run: Callable[..., Run], group: str, strategy: str) -> None:
    stock, got = run(group, None), run(group, strategy)
    assert "vllm_gdn_plugin loaded: False, replaced: []" in stock.log
    assert "vllm_gdn_plugin loaded: True" in got.log
    if group == "layer":
        assert re.search(r"replaced: \['\w+'\]", got.log), "the layer's class was not replaced"
    if group == "engines":
        ran = {event for event in got.events if event.endswith(" ran")}
        assert ran == {f"{strategy} ran"}, "the layers of the engines did not run with the plugin"
        assert not {event for event in stock.events if event.endswith(" ran")}
    assert "passed" in stock.outcomes.values()
    changed = {test for test, _ in stock.outcomes.items() ^ got.outcomes.items()}
    assert not changed, got.log[-4000:]
