"""Decode steps and times to the first token of engines side by side, without a server between them and the clock.

    python benchmarks/in_process.py MODEL DIRECTORY --engine JSON [--strategy NAME[=SETTING=VALUE],...] [--starts N]
        [--one-process] [--seconds N] [--rounds N] [--concurrency N,...] [--input-len N,...] [--cpus N,...]

Through HTTP the scatter of a slow host hides differences of a few percent (`bench serve` tells what a client sees).
Here each engine, stock and of each strategy, is vLLM's `LLM` with scheduler and model runner in one process; all stay
up and are stepped in turn, one at a time. A case `concurrency N` times the decode steps of N requests with short
prompts, a case `N in` the first token of one prompt of N tokens. Before them, each engine says how long it took to
build, and how much GPU memory it took. MODEL is a directory, such as gpu_models.py makes; weights are dummies.

- With `--starts 2` all of that is done twice: engines of each, `off-2` and so on, are built anew when the first are
  gone. What two starts differ by, no number of rounds takes away: the interval of the report holds that of each start.
- With `--one-process` all engines are in one process, built one after the other, at every second start from the last to
  the first: what only the second in a process gains or loses is then in both. A host that is slow for one process
  and not for another then slows all alike. Nothing is said of start-up and memory then, since the first engine's hold
  what later ones find done. Else each has a process; stock starts first, then `auto`, which times what it chooses from
  alone, then the others at once.
- Each round is at another depth of Python's stack, the same for all engines. At an unlucky depth Python 3.12 takes 3 us
  for a call in place of 0.03, every time (python/cpython#142183). Which calls of a step these are is luck, and another
  luck for a plugin that has a function more than stock vLLM. Where a step waits for the CPU, it is a tenth or more.
- With `--cpus`, once all have started, all their threads run on those CPUs alone.
- `no_kernel=VLLM_GDN_PLUGIN_DECODE_KERNEL=0` is `auto` with that setting.

Writes DIRECTORY/serve.json after each round, and serve.md and .png in the end, also with Ctrl-C or SIGTERM. The engines
share the GPU, so each needs the size of its KV cache, which must hold all requests: a GDN layer of Qwen3.5-27B keeps
3 MiB of float32 state for each. On a GPU host without a network, for vLLM 0.33:

    --engine '{"attention_backend": "FLASH_ATTN", "gdn_prefill_backend": "triton", "gpu_memory_utilization": 0.01,
    "kv_cache_memory_bytes": 4294967296, "max_model_len": 8448, "max_num_batched_tokens": 8448, "compilation_config":
    {"cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]}}'

Without a GPU: `--device cpu --strategy fused --engine '{"enforce_eager": true, "kv_cache_memory_bytes": 134217728}'`.
"""

import argparse
import gc
import json
import os
import random
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import IO, Any

from switch_plugin import switch_plugin

from vllm_gdn_plugin.bench.engine import probe
from vllm_gdn_plugin.bench.engine.results import SERVE, EngineRun
from vllm_gdn_plugin.bench.engine.serve import START, verified
from vllm_gdn_plugin.bench.engine.server import end_group
from vllm_gdn_plugin.bench.engine.variants import BEFORE_NUMBER, OFF, kind_of, require_at_work, start_of, variants
from vllm_gdn_plugin.bench.errors import EXIT_INTERRUPTED, BadInput, BenchError
from vllm_gdn_plugin.bench.shapes import count, counts
from vllm_gdn_plugin.decide.plan import AUTO

PROMPT_TOKENS = 8
"""Of the requests whose decode steps are timed."""
SECONDS = 120
"""Of measuring, beside what the engines take to start: some two minutes for two of vLLM 0.33.0 on a fresh host."""
RESULT = "serve.json"
BUILDS = "in_process.py builds "
"""Before the name of an engine, in the log of its process."""
VOCABULARY = 256
"""Prompts are of the ids below it."""
DEPTHS = 136
"""So many calls of :func:`at_depth` in each other take 16 KiB, the size of the pieces in which Python has its stack."""
GOLDEN = 0.618
"""Of all depths, by which one round goes on from the last: so a few rounds lie as evenly as many."""
HELPING = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "INFO",
}
UNLESS_SET = {"VLLM_TRITON_FORCE_FIRST_CONFIG": "1"}
"""Triton tunes kernels of the prefill alone, which takes minutes: all engines take the first configuration."""


@dataclass(frozen=True)
class Case:
    """What is timed at once: `repeat` times, `batch` prompts of `length` tokens are answered with `tokens` tokens."""

    name: str
    batch: int
    length: int
    tokens: int
    repeat: int

    def at_once(self, runs: Sequence[Mapping[str, Any]]) -> bool:
        """Whether all requests got their first token in one step, and none waited for another later."""
        return all(len(set(run["first"])) == 1 and run["steps"] <= self.tokens for run in runs)

    def values(self, runs: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """The sample of one turn, from what :func:`work` says of each run."""
        if self.tokens == 1:
            return {"ttft_ms": 1e3 * statistics.median(run["first"][0] for run in runs)}
        pairs = [list(zip(run["first"], run["last"], strict=True)) for run in runs]
        tpot = [statistics.mean(last - first for first, last in run) / (self.tokens - 1) for run in pairs]
        found = {"tpot_ms": 1e3 * statistics.median(tpot)}
        if any(run["steps"] < self.tokens for run in runs):  # with speculation
            steps = [(max(run["last"]) - run["first"][0]) / (run["steps"] - 1) for run in runs]
            found["step_ms"] = 1e3 * statistics.median(steps)
        return found


@dataclass(frozen=True)
class Engine:
    """One of the engines in a process, as the parent of that sees it."""

    name: str
    process: "subprocess.Popen[str]"
    log_path: Path

    def ask(self, question: Mapping[str, object]) -> Any:
        """The answer of :func:`work`, decoded. Raises BadInput."""
        assert self.process.stdin
        assert self.process.stdout
        with suppress(BrokenPipeError):  # then there is no answer either
            print(json.dumps({"engine": self.name, **question}), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise BadInput(f"{self.log_path.stem}: the process is gone, see {self.log_path}")
        return json.loads(answer)

    def log(self) -> str:
        """What was said while it was built, and until the next was."""
        text = self.log_path.read_text(errors="replace")
        return text.partition(f"{BUILDS}{self.name}\n")[2].partition(BUILDS)[0]


@contextmanager
def engines(variants: Mapping[str, Mapping[str, str]], options: argparse.Namespace) -> Iterator[dict[str, Engine]]:
    """A process that builds an engine of each variant, one after the other; it is not waited for."""
    log_path = options.directory / f"{'+'.join(variants)}.log"
    line = [
        sys.executable,
        __file__,
        "work",
        options.model,
        json.dumps({"max_num_seqs": max(options.concurrency), **options.engine}),
        json.dumps(variants),
    ]
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            line,
            env={**UNLESS_SET, **os.environ, **HELPING},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            start_new_session=True,
        )
    try:
        yield {name: Engine(name, process, log_path) for name in variants}
    finally:
        end_group(process)


def at_depth(depth: int, call: Callable[[], Any]) -> Any:
    """What ``call`` gives, so many calls deeper."""
    return at_depth(depth - 1, call) if depth else call()


def work(arguments: Sequence[str]) -> None:
    """The engines: a line of JSON for each line of JSON on stdin."""
    answers: IO[str] = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what vLLM prints goes into the log
    model, engine, variants = arguments
    built: dict[str, Any] = {}
    kept = []
    about: dict[str, dict[str, float]] = {}
    for name, settings in json.loads(variants).items():
        print(f"{BUILDS}{name}", flush=True)
        if built:
            switch_plugin(settings)
        else:  # vLLM loads the plugin, or does not
            os.environ.update(settings)
        from vllm import LLM, SamplingParams
        from vllm.v1.worker import workspace

        given = json.loads(engine)
        alone = given.get("tensor_parallel_size", 1) == 1  # else the weights are in processes of their own
        before, began = memory() if alone else {}, time.perf_counter()
        built[name] = LLM(
            model,
            load_format="dummy",
            skip_tokenizer_init=True,
            language_model_only=True,
            enable_prefix_caching=False,
            **given,
        )
        about[name] = {"startup_s": time.perf_counter() - began}
        if workspace.is_workspace_manager_initialized():
            # The engine's CUDA graphs use its memory, which vLLM would free as soon as it makes that of the next one.
            kept.append(workspace.current_workspace_manager())
        if before:
            about[name] |= {metric: value - before[metric] for metric, value in memory().items()}
            runner = built[name].llm_engine.model_executor.driver_worker.model_runner
            about[name]["model_mib"] = runner.model_memory_usage / probe.MIB
    gc.collect()
    gc.freeze()  # as the engine of a server does

    def answer(llm: Any, prompts: Sequence[Sequence[int]], tokens: int, logprobs: int | None = None) -> Any:
        sampling = SamplingParams(
            temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False, logprobs=logprobs
        )
        first: dict[str, float] = {}
        last: dict[str, float] = {}
        answers: dict[str, Any] = {}
        began, steps = time.perf_counter(), 0
        for number, prompt in enumerate(prompts):
            llm.llm_engine.add_request(str(number), {"prompt_token_ids": prompt}, sampling)
        while llm.llm_engine.has_unfinished_requests():
            if outputs := llm.llm_engine.step():
                now, steps = time.perf_counter() - began, steps + 1
                for output in outputs:
                    first.setdefault(output.request_id, now)
                    last[output.request_id], answers[output.request_id] = now, output.outputs[0]
        if sorted(len(one.token_ids) for one in answers.values()) != [tokens] * len(prompts):
            raise RuntimeError(f"{len(prompts)} prompts were not answered with {tokens} tokens each")
        return {"first": list(first.values()), "last": [last[name] for name in first], "steps": steps}, answers

    for line in sys.stdin:
        asked = json.loads(line)
        llm = built[asked["engine"]]
        if "about" in asked:
            found: Any = about[asked["engine"]]
        elif "cpus" in asked:
            for thread in os.listdir("/proc/self/task"):
                os.sched_setaffinity(int(thread), asked["cpus"])
            found = None
        elif "probe" in asked:
            _, answers_of = answer(llm, [probe.PROMPT], probe.ANSWER_TOKENS, logprobs=1)
            one = answers_of["0"]
            tokens = list(one.token_ids)
            found = tokens, [step[token].logprob for token, step in zip(tokens, one.logprobs, strict=True)]
        else:
            ids = random.Random(asked["seed"])
            found = []
            for _ in range(asked["repeat"]):
                prompts = [[ids.randrange(VOCABULARY) for _ in range(asked["length"])] for _ in range(asked["batch"])]
                found.append(at_depth(asked["depth"], partial(answer, llm, prompts, asked["tokens"]))[0])
        print(json.dumps(found), file=answers, flush=True)


def memory() -> dict[str, float]:
    """What PyTorch's allocator has given out and what it holds, once all that it need not hold is freed; nothing on a
    CPU."""
    import torch

    if not torch.cuda.is_available():
        return {}
    gc.collect()
    torch.cuda.empty_cache()
    allocated, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    return {"allocated_mib": allocated / probe.MIB, "reserved_mib": reserved / probe.MIB}


def measure(run: EngineRun, cases: Sequence[Case], options: argparse.Namespace) -> None:
    """Add to the run what the engines of each start show, one start after the other. Raises BenchError."""
    stock: Any = None
    for start, of_start in groupby(run.variants, key=start_of):
        with ExitStack() as kept:
            known: dict[str, Engine] = {}
            names = list(of_start)
            for group in groups(names, options.one_process):
                started: dict[str, Engine] = {}
                for together in group:
                    started |= kept.enter_context(engines({name: run.variants[name] for name in together}, options))
                started = {name: started[name] for name in names if name in started}
                for name, this in started.items():
                    tokens, logprobs = this.ask({"probe": True})
                    found = [str(token) for token in tokens], logprobs
                    stock = stock or found
                    if name != OFF:
                        run.verified[name] = verified(name, stock, found)
                    if line := require_at_work(name, this.log()):
                        run.said[name] = line
                    if not options.one_process and not start:  # a later one finds full caches
                        run.add(run.rounds, name, START, this.ask({"about": True}))
                known |= started
            fitting = []
            for case in cases:  # each once, untimed
                ran = [this.ask(vars(case) | {"seed": 0, "repeat": 1, "depth": 0}) for this in known.values()]
                if case.tokens == 1 or all(map(case.at_once, ran)):
                    fitting.append(case)
                else:
                    where = f" of start {start}" if start else ""
                    run.load += f"; {case.name}{where} left out: not all requests ran at once (kv_cache_memory_bytes)"
            if options.cpus:
                for this in known.values():
                    this.ask({"cpus": options.cpus})
            until, last = time.monotonic() + options.seconds, run.rounds + options.rounds
            while run.rounds < last and time.monotonic() < until:
                add_round(run, known, fitting)
                run.save(options.directory / RESULT)


def add_round(run: EngineRun, known: Mapping[str, Engine], cases: Sequence[Case]) -> None:
    """Each case in each engine; who is first changes from round to round."""
    names, number = list(known), run.rounds
    run.rounds += 1
    first, depth = number % len(names), int(number * GOLDEN % 1 * DEPTHS)
    for n, case in enumerate(cases):
        seed = 1 + number * len(cases) + n  # new prompts in each round, the same for each engine
        for name in names[first:] + names[:first]:
            asked = vars(case) | {"seed": seed, "depth": depth}
            run.add(number, name, case.name, case.values(known[name].ask(asked)))


def groups(names: Sequence[str], one_process: bool) -> list[list[list[str]]]:
    """The names of the engines in each process, in groups of processes that start at once."""
    if one_process:
        is_second = int(start_of(names[0]) or 1) % 2 == 0
        return [[list(names[::-1] if is_second else names)]]
    alone = [[[name]] for name in names if kind_of(name) in (OFF, AUTO)]
    others = [[name] for name in names if kind_of(name) not in (OFF, AUTO)]
    return [*alone, others] if others else alone


def started_often(found: Mapping[str, dict[str, str]], starts: int) -> dict[str, dict[str, str]]:
    """The variants, and all of them once more for each further start."""
    return {
        name if start == 1 else f"{name}{BEFORE_NUMBER}{start}": settings
        for start in range(1, starts + 1)
        for name, settings in found.items()
    }


def main(arguments: Sequence[str]) -> int:
    options = parsed(arguments)
    from vllm_gdn_plugin.bench.machine import describe_machine, require_device
    from vllm_gdn_plugin.bench.report import write_report

    status = 0
    for signum in (signal.SIGINT, signal.SIGTERM):  # also where a shell ignores the first: no engine is left behind
        signal.signal(signum, signal.default_int_handler)
    try:
        require_device(options.device)
        try:
            options.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BadInput(f"{options.directory} cannot be made: {error.strerror}") from error
        decode = [
            Case(f"concurrency {n}", n, PROMPT_TOKENS, options.output_len, options.repeat) for n in options.concurrency
        ]
        cases = [*decode, *(Case(f"{n} in", 1, n, 1, options.repeat) for n in options.input_len)]
        run = EngineRun(
            kind=SERVE,
            command=shlex.join(["python", "benchmarks/in_process.py", *arguments]),
            date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            rounds=0,
            model=Path(options.model).name,
            vllm_arguments=[],
            variants=options.variants,
            machine=describe_machine(options.device),
            load=f"engines in {'one process' if options.one_process else 'processes of their own'}, no server, stepped"
            f" in turn while the others are idle; TPOT: {options.output_len} tokens for each of the requests at once,"
            f" after prompts of {PROMPT_TOKENS}; TTFT: a prompt from its arrival to its token; each {options.repeat}"
            f" times in a turn, each round at another depth of Python's stack; vLLM's LLM({json.dumps(options.engine)})"
            + (f"; each engine on CPUs {', '.join(map(str, options.cpus))}" if options.cpus else ""),
        )
        try:
            measure(run, cases, options)
        except KeyboardInterrupt:
            run.stopped, status = "interrupted", EXIT_INTERRUPTED
        except BenchError as wrong:
            run.stopped, status = str(wrong), wrong.exit_code
            print(f"in_process.py: {wrong}", file=sys.stderr)
        if not run.is_empty():
            run.save(options.directory / RESULT)
            write_report(options.directory / RESULT)
    except BenchError as wrong:
        print(f"in_process.py: {wrong}", file=sys.stderr)
        return wrong.exit_code
    return status


def parsed(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--strategy", metavar="NAME[=SETTING=VALUE],...", default=AUTO, help="beside stock")
    parser.add_argument("--starts", default="1", help="of the engines; default 1")
    parser.add_argument("--seconds", default=str(SECONDS), help=f"of each start; default {SECONDS}")
    parser.add_argument("--rounds", default="10000", help="of each start, if the seconds allow")
    parser.add_argument("--concurrency", metavar="N,...", default="1,2,4,8,16,32", help="default 1,2,4,8,16,32")
    parser.add_argument("--output-len", default="16", help="tokens of each answer; default 16")
    parser.add_argument("--input-len", metavar="N,...", default="8,512,1024,8192", help="default 8,512,1024,8192")
    parser.add_argument("--repeat", default="1", help="times of each case in a turn; default 1")
    parser.add_argument("--cpus", metavar="N,...", default="", help="numbers of CPUs; default: as the system has it")
    parser.add_argument("--one-process", action="store_true", help="all engines in one; default: each in its own")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--engine", metavar="JSON", required=True, help="arguments of vLLM's LLM; see above")
    options = parser.parse_args(arguments)
    try:
        for name in ("rounds", "starts", "seconds", "output_len", "repeat"):
            setattr(options, name, count(f"--{name.replace('_', '-')}", getattr(options, name)))
        options.concurrency = counts("--concurrency", options.concurrency)
        options.input_len = counts("--input-len", options.input_len)
        options.variants = started_often(variants(options.strategy.split(",")), options.starts)
    except BenchError as wrong:
        parser.error(str(wrong))
    if options.output_len < 2:
        parser.error(f"--output-len {options.output_len}: one token has no time per output token")
    try:
        options.cpus = sorted({int(number) for number in options.cpus.split(",") if number})
    except ValueError:
        parser.error(f"--cpus {options.cpus!r} is no list of numbers")
    if missing := set(options.cpus) - os.sched_getaffinity(0):
        parser.error(f"--cpus: this process may not run on {', '.join(map(str, sorted(missing)))}")
    text = options.engine
    try:
        options.engine = dict(**json.loads(text))
    except (TypeError, ValueError):
        parser.error(f"--engine {text!r} is no JSON object")
    if "kv_cache_memory_bytes" not in options.engine:
        parser.error("--engine needs kv_cache_memory_bytes: else each engine takes what it finds free")
    return options


if __name__ == "__main__":
    if sys.argv[1:2] == ["work"]:
        work(sys.argv[2:])
    else:
        sys.exit(main(sys.argv[1:]))
