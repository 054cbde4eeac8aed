"""The statistics of the bench: medians, spreads, and ratios of paired samples with their intervals."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import bootstrap, quantile_test, ttest_1samp

from vllm_gdn_plugin.bench.results import Section

CONFIDENCE = 0.95
SPREAD = (5, 95)
RESAMPLES = 2000
SEED = 0


@dataclass(frozen=True)
class Summary:
    """Median, and 5th and 95th percentile: where nine of ten samples lie."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Ratio:
    """Median of the ratios within each round, and its 95 % bootstrap interval."""

    median: float
    low: float
    high: float

    @property
    def shows_difference(self) -> bool:
        """Whether the interval leaves 1.0 out."""
        return not self.low <= 1.0 <= self.high


@dataclass(frozen=True)
class Row:
    """One way at one point."""

    us: Summary
    to_baseline: Ratio
    to_limit: Ratio


def summary(samples: Sequence[float]) -> Summary:
    """Median and spread of ``samples``, in their unit."""
    low, median, high = (float(np.percentile(np.asarray(samples, dtype=float), q)) for q in (SPREAD[0], 50, SPREAD[1]))
    return Summary(median, low, high)


def ratios(samples: Sequence[float], baseline: Sequence[float]) -> list[float]:
    """Sample by sample; both lists are in the order of the rounds, so that slow drift of the machine cancels."""
    if len(samples) != len(baseline):
        raise ValueError(f"{len(samples)} samples cannot be paired with {len(baseline)}")
    return [float(one / other) for one, other in zip(samples, baseline, strict=True)]


def paired_ratio(samples: Sequence[float], baseline: Sequence[float]) -> Ratio:
    """How ``samples`` compare with ``baseline``, taken in the same rounds. The same samples give the same interval."""
    paired = np.asarray(ratios(samples, baseline))
    median = float(np.median(paired))
    if np.ptp(paired) == 0.0:  # one round, or no spread at all: nothing to resample
        return Ratio(median, *((median, median) if len(paired) > 1 else (0.0, float("inf"))))
    interval = bootstrap(
        (paired,),
        np.median,
        confidence_level=CONFIDENCE,
        n_resamples=RESAMPLES,
        method="percentile",
        rng=np.random.default_rng(SEED),
    ).confidence_interval
    return Ratio(median, float(interval.low), float(interval.high))


MANY = 10
"""Pairs, from which on their median has bounds that are worth something."""


@dataclass(frozen=True)
class Change:
    """By how many percent paired samples lie above their baseline, and the 95 % interval of that, which has no bounds
    where there is but one pair."""

    percent: float
    low: float
    high: float

    @property
    def shows_difference(self) -> bool:
        """Whether the interval leaves 0 out."""
        return not self.low <= 0.0 <= self.high


def paired_change(samples: Sequence[float], baseline: Sequence[float]) -> Change:
    """How ``samples`` compare with ``baseline``, taken in the same rounds.

    From :data:`MANY` rounds on, the median of the ratios and the interval that their order gives, whatever their
    distribution: a host that is slow for a moment moves neither. Of fewer, the geometric mean and Student's interval
    for the logarithms.
    """
    paired = np.asarray(ratios(samples, baseline))
    if len(paired) >= MANY:
        found = quantile_test(paired, q=1.0, p=0.5).confidence_interval(CONFIDENCE)
        return Change(*(100 * (float(ratio) - 1) for ratio in (np.median(paired), found.low, found.high)))
    logs = np.log(paired)
    if len(logs) < 2:
        return Change(_percent(float(logs.mean())), -math.inf, math.inf)
    if np.ptp(logs) == 0.0:
        return Change(*[_percent(float(logs[0]))] * 3)
    found = ttest_1samp(logs, 0.0).confidence_interval(CONFIDENCE)
    return Change(*(_percent(float(value)) for value in (logs.mean(), found.low, found.high)))


def over_pairs(changes: Sequence[Change]) -> Change:
    """One change from those of several pairs of engines, an engine of one kind against one of the other.

    The mean of them, from the lowest to the highest bound of their intervals: what two starts of the same engine differ
    by, which no number of rounds takes away, is a part of that.
    """
    percent = sum(change.percent for change in changes) / len(changes)
    return Change(percent, min(change.low for change in changes), max(change.high for change in changes))


def _percent(log_ratio: float) -> float:
    return 100 * float(np.expm1(log_ratio))


def compare(samples: Mapping[str, Sequence[float]], section: Section) -> dict[str, Row]:
    """Each way of one point against the section's baseline and its limit.

    Args:
        samples: microseconds per layer, by way, each in the order of the rounds.
    """
    baseline, limit = samples[section.baseline], samples[section.limit]
    return {
        way: Row(summary(values), paired_ratio(values, baseline), paired_ratio(values, limit))
        for way, values in samples.items()
    }
