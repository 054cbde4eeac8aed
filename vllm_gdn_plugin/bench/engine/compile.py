"""The measurement behind ``bench compile``: cold and warm starts of engines that take turns, and what they compiled."""

import shutil
import tempfile
from pathlib import Path
from typing import Any

from vllm_gdn_plugin.bench.engine import probe
from vllm_gdn_plugin.bench.engine.results import EngineRun
from vllm_gdn_plugin.bench.engine.serve import started, turns, verified
from vllm_gdn_plugin.bench.engine.variants import OFF

COLD, WARM = "cold", "warm"

MIB = 1 << 20


def steps(run: EngineRun) -> int:
    """How many engines :func:`measure` starts."""
    return 2 * run.rounds * len(run.variants)


def measure(run: EngineRun, at_once: int, progress: Any) -> None:
    """Add the samples of ``run.rounds`` rounds to ``run``: each variant starts with empty caches, then with those.

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


def _empty(directory: Path) -> Path:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    return directory
