"""The measurement behind ``bench serve``: vLLM's own ``vllm bench serve`` against engines that take turns."""

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_gdn_plugin.bench.engine import probe
from vllm_gdn_plugin.bench.engine.results import EngineRun
from vllm_gdn_plugin.bench.engine.server import VLLM, Server, ServerFailed, end_group, serve
from vllm_gdn_plugin.bench.engine.variants import OFF, PLUGINS, require_at_work
from vllm_gdn_plugin.bench.errors import BadInput, WrongResult

START = "start"


@dataclass(frozen=True)
class Load:
    """What the clients ask for."""

    concurrency: list[int]
    input_len: int
    output_len: int
    requests: int
    """Of each client, one after the other."""

    def __str__(self) -> str:
        return (
            f"{self.requests} requests for each client, {self.input_len} random tokens in and {self.output_len} out,"
            " as many warm-up requests as clients"
        )


def measure(run: EngineRun, load: Load, side_by_side: bool, progress: Any) -> None:
    """Add the samples of ``run.rounds`` rounds to ``run``: in each, one engine of each variant, one after the other.

    Before them, one engine of each variant is started, asked once and compared; its time does not count, and it fills
    the caches.

    Args:
        run: gets the samples, and with them whatever was measured before an error.
        side_by_side: those first engines go on running and are driven in turn, so that nothing is said of start-up
            and memory; else each round starts new ones.
        progress: a ``tqdm``, of one step for each engine.
    """
    with tempfile.TemporaryDirectory(prefix="gdn-bench-", ignore_cleanup_errors=True) as scratch, ExitStack() as kept:
        stock, servers = None, {}
        for variant in run.variants:
            progress.set_description(f"verify {variant}")
            with ExitStack() as ended:
                server = (kept if side_by_side else ended).enter_context(started(run, variant, Path(scratch)))
                found = probe.answer(server)
            servers[variant] = server
            stock = stock or found
            if variant != OFF:
                run.verified[variant] = verified(variant, stock, found)
            progress.update()
        for number, variant in turns(run):
            progress.set_description(f"round {number + 1}, {variant}")
            if side_by_side:
                _drive_all(run, number, variant, servers[variant], load)
            else:
                with started(run, variant, Path(scratch)) as server:
                    run.add(number, variant, START, {"startup_s": server.seconds})
                    _drive_all(run, number, variant, server, load)
                    run.add(number, variant, START, probe.memory(server))
            progress.update()


def _drive_all(run: EngineRun, number: int, variant: str, server: Server, load: Load) -> None:
    for concurrency in load.concurrency:
        values = _drive(run, server, load, concurrency, seed=number * 1000 + concurrency)
        run.add(number, variant, f"concurrency {concurrency}", values)


def turns(run: EngineRun) -> Iterator[tuple[int, str]]:
    """(round, variant): who is first changes from round to round, so that a drift of the machine favours nobody."""
    names = list(run.variants)
    for number in range(run.rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            yield number, name


def verified(variant: str, stock: Any, found: Any) -> str:
    """:func:`probe.compare`, with the variant in the error."""
    try:
        return probe.compare(stock, found)
    except WrongResult as error:
        raise WrongResult(f"{variant}: {error}") from error


@contextmanager
def started(
    run: EngineRun,
    variant: str,
    directory: Path,
    *,
    model: str | None = None,
    more: Sequence[str] = (),
    settings: Mapping[str, str] | None = None,
) -> Iterator[Server]:
    """A server of one variant that is what its name says. Raises BenchError, and keeps the log of a failed start.

    Args:
        model, more, settings: another model, further arguments and further environment variables of the server.
    """
    env = {**os.environ, "VLLM_LOGGING_LEVEL": "INFO", **run.variants[variant], **(settings or {})}
    arguments = [*run.vllm_arguments, *more]
    try:
        with serve(model or run.model, env=env, directory=directory, arguments=arguments) as server:
            require_at_work(variant, server.log_text())
            yield server
    except ServerFailed as error:
        log = Path(tempfile.gettempdir(), f"gdn-bench-{variant}-{time.time_ns()}.log")
        log.write_text(error.log)
        raise BadInput(f"{variant}: {error.cause()} (its log: {log})") from error


def _drive(run: EngineRun, server: Server, load: Load, concurrency: int, seed: int) -> dict[str, float]:
    """One run of ``vllm bench serve``. The prompts are new in each run, and the same for each variant."""
    directory = server.log_path.parent
    result = directory / "result.json"
    result.unlink(missing_ok=True)
    options = {
        "model": run.model,
        "served-model-name": json.loads(server.get("/v1/models"))["data"][0]["id"],
        "base-url": server.url,
        "dataset-name": "random",
        "random-input-len": load.input_len,
        "random-output-len": load.output_len,
        "num-prompts": load.requests * concurrency,
        "num-warmups": concurrency,
        "max-concurrency": concurrency,
        "seed": seed,
        "result-dir": directory,
        "result-filename": result.name,
    }
    command = [*VLLM, "bench", "serve", "--ignore-eos", "--save-result", "--disable-tqdm"]
    command += [text for name, value in options.items() for text in (f"--{name}", str(value))]
    env = os.environ | {PLUGINS: run.variants[OFF][PLUGINS]}
    failed = f"vllm bench serve at concurrency {concurrency}"
    log = directory / "client.log"
    with log.open("wb") as out:
        client = subprocess.Popen(command, cwd=directory, env=env, stdout=out, stderr=out, start_new_session=True)
        try:
            client.wait()
        finally:
            end_group(client)
    if client.returncode or not result.exists():
        error = ServerFailed(f"status {client.returncode}", log.read_text(errors="replace"))
        raise BadInput(f"{failed}: {error.cause()}")
    found = json.loads(result.read_text())
    if found["completed"] != load.requests * concurrency:
        raise BadInput(f"{failed}: {found['completed']} of {load.requests * concurrency} requests were answered")
    return {
        "output_tokens_per_s": found["output_throughput"],
        "output_tokens_per_s_per_request": found["output_throughput"] / concurrency,
        "tpot_ms": found["median_tpot_ms"],
        "itl_ms": found["median_itl_ms"],
        "ttft_ms": found["median_ttft_ms"],
    }
