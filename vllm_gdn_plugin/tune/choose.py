"""What is chosen by times: pure functions."""

from collections.abc import Mapping
from itertools import groupby
from statistics import fmean

from vllm_gdn_plugin.tune.times import Times

MARGIN = 0.03
"""Share of its time by which another way has to beat the planned one: graphs of the same work differ by so much at most
points where an input is quantised, which lies elsewhere in each (benchmarks/NOTES.md)."""


MARGIN_THROUGHOUT = 0.01
"""The same for the mean over all sizes, of graphs in which nothing is quantised."""


def fastest(times: Times, planned: str) -> dict[int, str]:
    """The way for each number of tokens: the ``planned`` one, or where another beats it by :data:`MARGIN`, the fastest.

    A size whose times are :attr:`~vllm_gdn_plugin.tune.times.Time.noisy` keeps the planned way.
    """
    chosen = {}
    for tokens, by_way in sorted(times.items()):
        best = min(by_way, key=lambda way: by_way[way].microseconds)
        beaten = by_way[best].microseconds < by_way[planned].microseconds * (1 - MARGIN)
        chosen[tokens] = best if beaten and not any(time.noisy for time in by_way.values()) else planned
    return chosen


def fastest_throughout(times: Times, planned: str) -> str:
    """The one way for all numbers of tokens: that with the least mean of its times in those of ``planned``, where it is
    less by :data:`MARGIN_THROUGHOUT`, else ``planned``."""
    quiet = [by_way for by_way in times.values() if not any(time.noisy for time in by_way.values())]
    if not quiet:
        return planned
    shares = {way: fmean(by[way].microseconds / by[planned].microseconds for by in quiet) for way in quiet[0]}
    best = min(shares, key=shares.__getitem__)
    return best if shares[best] < 1 - MARGIN_THROUGHOUT else planned


def at(chosen: Mapping[int, str], num_tokens: int, otherwise: str) -> str:
    """The way for a batch: that of the next larger size that was timed, else of the largest, else ``otherwise``."""
    if not chosen:
        return otherwise
    return chosen[min((size for size in chosen if size >= num_tokens), default=max(chosen))]


def described(chosen: Mapping[int, str]) -> str:
    """``dual_stream at 1 to 64 tokens, serial at 72 to 512 tokens``."""
    by_way = groupby(sorted(chosen.items()), key=lambda one: one[1])
    runs = [(way, [tokens for tokens, _ in run]) for way, run in by_way]
    return ", ".join(f"{way} at {_span(run)} token{'' if run == [1] else 's'}" for way, run in runs)


def _span(run: list[int]) -> str:
    return f"{run[0]} to {run[-1]}" if len(run) > 1 else str(run[0])
