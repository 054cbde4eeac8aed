"""The measurement behind ``bench serve``: vLLM's own ``vllm bench serve`` against engines that take turns."""

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_gdn_plugin.bench.engine import probe
from vllm_gdn_plugin.bench.engine.client import Client, client
from vllm_gdn_plugin.bench.engine.results import EngineRun
from vllm_gdn_plugin.bench.engine.server import (
    POLL_SECONDS,
    STOP_SECONDS,
    Server,
    ServerFailed,
    launch,
    may_start_at_once,
)
from vllm_gdn_plugin.bench.engine.variants import OFF, require_at_work
from vllm_gdn_plugin.bench.errors import BadInput, WrongResult
from vllm_gdn_plugin.host.plugins import PLUGINS

START = "start"


@dataclass(frozen=True)
class Load:
    """What the clients ask for."""

    concurrency: list[int]
    input_len: list[int]
    output_len: int
    requests: int
    """Of each client, one after the other."""

    def __str__(self) -> str:
        return (
            f"{self.requests} requests for each client, {', '.join(map(str, self.input_len))} random tokens in and"
            f" {self.output_len} out, as many warm-up requests as clients"
        )

    def cases(self) -> Iterator[tuple[str, int, int]]:
        """(name, input length, concurrency) of each run of the clients."""
        for length in self.input_len:
            for concurrency in self.concurrency:
                name = f"concurrency {concurrency}"
                yield name if len(self.input_len) == 1 else f"{length} in, {name}", length, concurrency


def measure(run: EngineRun, load: Load, side_by_side: bool, progress: Any) -> None:
    """Add the samples of ``run.rounds`` rounds to ``run``: in each, one engine of each variant, one after the other.

    Before them, one engine of each variant is started, asked once and compared; its time does not count, and it fills
    the caches.

    Args:
        run: gets the samples, and with them whatever was measured before an error.
        side_by_side: those first engines go on running and are driven in turn, so that nothing is said of start-up
            and memory; else each round starts new ones. They start at once where the arguments give the size of the
            KV cache, else one after the other, because each takes what it finds free.
        progress: a ``tqdm``, of one step for each engine.
    """
    at_once = side_by_side and may_start_at_once(run.vllm_arguments)
    groups = [list(run.variants)] if at_once else [[variant] for variant in run.variants]
    with tempfile.TemporaryDirectory(prefix="gdn-bench-", ignore_cleanup_errors=True) as directory, ExitStack() as kept:
        scratch = Path(directory)
        driver = kept.enter_context(client(os.environ | {PLUGINS: run.variants[OFF][PLUGINS]}, scratch))
        stock: Any = None
        servers: dict[str, Server] = {}
        for group in groups:
            progress.set_description(f"verify {', '.join(group)}")
            with ExitStack() as ended:
                these = (kept if side_by_side else ended).enter_context(started(run, group, scratch))
                for variant, server in zip(group, these, strict=True):
                    found = probe.answer(server)
                    stock = stock or found
                    if variant != OFF:
                        run.verified[variant] = verified(variant, stock, found)
                    progress.update()
            servers.update(zip(group, these, strict=True))
        for number, variant in turns(run):
            progress.set_description(f"round {number + 1}, {variant}")
            if side_by_side:
                _drive_all(run, number, variant, servers[variant], driver, load)
            else:
                with started(run, [variant], scratch) as [server]:
                    run.add(number, variant, START, {"startup_s": server.seconds})
                    _drive_all(run, number, variant, server, driver, load)
                    run.add(number, variant, START, probe.memory(server))
            progress.update()


def _drive_all(run: EngineRun, number: int, variant: str, server: Server, driver: Client, load: Load) -> None:
    for n, (case, length, concurrency) in enumerate(load.cases()):
        options = {
            "model": run.model,
            "served-model-name": json.loads(server.get("/v1/models"))["data"][0]["id"],
            "base-url": server.url,
            "random-input-len": length,
            "random-output-len": load.output_len,
            "num-prompts": load.requests * concurrency,
            "num-warmups": concurrency,
            "max-concurrency": concurrency,
            "seed": number * 1000 + n,  # new prompts in each run, the same for each variant
        }
        try:
            found = driver.run(options)
        except ServerFailed as error:
            raise BadInput(f"vllm bench serve, {case}: {error.cause()}") from error
        if found["completed"] != options["num-prompts"]:
            raise BadInput(f"vllm bench serve, {case}: {found['completed']} of {options['num-prompts']} were answered")
        values = {
            "output_tokens_per_s": found["output_throughput"],
            "output_tokens_per_s_per_request": found["output_throughput"] / concurrency,
            "tpot_ms": found["median_tpot_ms"],
            "itl_ms": found["median_itl_ms"],
            "ttft_ms": found["median_ttft_ms"],
        }
        run.add(number, variant, case, values)


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
    variants: Sequence[str],
    directory: Path,
    *,
    settings: Sequence[Mapping[str, str]] = (),
) -> Iterator[list[Server]]:
    """A server of each variant, started at once; each is what its name says. Raises BenchError.

    Args:
        settings: further environment variables of each server.
    """

    def launched(variant: str, settings: Mapping[str, str]) -> AbstractContextManager[Server]:
        env = {**os.environ, "VLLM_LOGGING_LEVEL": "INFO", **run.variants[variant], **settings}
        return launch(run.model, env=env, directory=directory, arguments=run.vllm_arguments)

    with ExitStack() as stack:
        pairs = zip(variants, settings or [{}] * len(variants), strict=True)
        servers = [(variant, stack.enter_context(launched(variant, its))) for variant, its in pairs]
        try:
            waiting = servers
            while waiting := [(variant, server) for variant, server in waiting if not _answers(variant, server)]:
                time.sleep(POLL_SECONDS)
            for variant, server in servers:
                line = require_at_work(variant, server.log_text())
                if line:
                    run.said[variant] = line
            try:
                yield [server for _, server in servers]
            except BadInput:
                for variant, server in servers:
                    if not _answers(variant, server):  # then it is stopping, and the reason
                        with suppress(subprocess.TimeoutExpired):
                            server.process.wait(STOP_SECONDS)
                        _answers(variant, server)
                raise
        finally:
            for _, server in servers:
                server.process.terminate()  # all of them; then each is waited for


def _answers(variant: str, server: Server) -> bool:
    """:meth:`Server.answers`, with the variant in the error; keeps the log of a server that has stopped."""
    try:
        return server.answers()
    except ServerFailed as error:
        log = Path(tempfile.gettempdir(), f"gdn-bench-{variant}-{time.time_ns()}.log")
        log.write_text(error.log)
        raise BadInput(f"{variant}: {error.cause()} (its log: {log})") from error
