"""The measurement behind ``bench compile``: cold and warm starts of engines that take turns, and what they compiled."""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from vllm_gdn_plugin.bench.engine import probe
from vllm_gdn_plugin.bench.engine.results import EngineRun
from vllm_gdn_plugin.bench.engine.serve import started, turns, verified
from vllm_gdn_plugin.bench.engine.variants import OFF, STRING_NAMES
from vllm_gdn_plugin.bench.errors import BadInput

COLD, WARM = "cold", "warm"
WITH_STRING_NAMES = ", string names"

MIB = 1 << 20


def with_string_names(variants: dict[str, dict[str, str]]) -> dict[str, dict[str, str]]:
    """``variants``, and each strategy once more with layer names that are strings."""
    more = {name + WITH_STRING_NAMES: settings | STRING_NAMES for name, settings in variants.items() if name != OFF}
    return variants | more


def steps(run: EngineRun, layers: list[int]) -> int:
    """How many engines :func:`measure` starts for the rounds and the layers."""
    return 2 * run.rounds * len(run.variants) + len(layers) * len(with_string_names(run.variants))


def measure(run: EngineRun, layers: list[int], at_once: int, progress: Any) -> None:
    """Add the samples of ``run.rounds`` rounds to ``run``: each variant starts with empty caches, then with those.

    Then, for each number of layers, each variant starts once with empty caches on a model of that many layers with
    random weights, with ``LayerName`` and with string names.

    Args:
        run: gets the samples, and with them whatever was measured before an error.
        at_once: how many engines of the rounds start at the same time, each with caches of its own.
        progress: a ``tqdm``, of :func:`steps` steps.
    """
    with tempfile.TemporaryDirectory(prefix="gdn-bench-", ignore_cleanup_errors=True) as directory:
        scratch = Path(directory)
        stock = None
        left = list(turns(run))
        while left:
            these, left = left[:at_once], left[at_once:]
            names = [name for _, name in these]
            caches = [_empty(scratch / f"caches-{n}") for n in range(len(these))]
            for case in (COLD, WARM):
                progress.set_description(f"round {these[-1][0] + 1}, {', '.join(names)}, {case}")
                with started(run, names, scratch, settings=[_settings(each) for each in caches]) as servers:
                    for (number, variant), server, its_caches in zip(these, servers, caches, strict=True):
                        values = {"startup_s": server.seconds, **_compiled(its_caches)}
                        if number == 0 and case == COLD:
                            found = probe.answer(server)
                            stock = stock or found
                            if variant != OFF:
                                run.verified[variant] = verified(variant, stock, found)
                        run.add(number, variant, case, values)
                        progress.update()
        own = dict(run.variants)
        run.variants = with_string_names(own) if layers else own
        for count in layers:
            model = _model_with_layers(Path(run.model), count, _empty(scratch / "model"))
            for variant in run.variants:
                progress.set_description(f"{count} layers, {variant}")
                alone = _empty(scratch / "caches")
                dummy = ["--load-format", "dummy"]
                with started(run, [variant], scratch, model=model, more=dummy, settings=[_settings(alone)]) as [server]:
                    values = {"startup_s": server.seconds, **_compiled(alone)}
                run.add(0, variant, f"{COLD}, {count} layers", values)
                progress.update()


def _settings(caches: Path) -> dict[str, str]:
    """Every cache of vLLM, torch and Triton below one directory."""
    return {
        "VLLM_CACHE_ROOT": str(caches / "vllm"),
        "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
        "TRITON_CACHE_DIR": str(caches / "triton"),
    }


def _compiled(caches: Path) -> dict[str, float]:
    """Compiled graphs: AOTAutograd writes one directory for each that it has not seen before."""
    sizes = [path.stat().st_size for path in caches.rglob("*") if path.is_file()]
    graphs = [path for path in caches.rglob("aotautograd/*") if path.is_dir()]
    return {"artifacts": float(len(graphs)), "cache_mib": sum(sizes) / MIB}


def _model_with_layers(model: Path, count: int, directory: Path) -> str:
    """The model's files but its weights, with ``count`` layers in the configuration."""
    source = model if model.is_dir() else model.parent
    for file in source.iterdir():
        if file.suffix in (".json", ".txt", ".model", ".jinja", ".py") and "index" not in file.name:
            shutil.copy(file, directory)
    config = json.loads((source / "config.json").read_text())
    text = config.get("text_config") or config
    try:
        pattern = text.get("layer_types") or []
        interval = pattern.index("full_attention") + 1 if pattern else int(text.get("full_attention_interval", 4))
    except ValueError as error:
        raise BadInput(f"--layers: the layer types of {model} are not a repeated pattern") from error
    if count % interval:
        raise BadInput(f"--layers {count}: this model repeats a pattern of {interval} layers")
    text["num_hidden_layers"] = count
    if pattern:
        text["layer_types"] = (pattern[:interval] * count)[:count]
    (directory / "config.json").write_text(json.dumps(config))
    return str(directory)


def _empty(directory: Path) -> Path:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    return directory
