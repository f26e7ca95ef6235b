"""Means with 95% bootstrap intervals, and what is computed from them: differences, and the gap closed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from proxytune.records import Metric

RESAMPLES = 2000
"""Bootstrap resamples behind every interval."""
INTERVAL_SEED = 0


def mean_metric(values: Sequence[float]) -> Metric:
    """The mean with its 95% percentile-bootstrap interval over examples. Deterministic; the order of values
    has no effect.

    A resample of n values is a multinomial draw over the distinct ones, which is all that a mean needs. No
    interval below two values; where all values are equal the interval has no width, as the bootstrap sees no
    spread.
    """
    n = len(values)
    if n == 0:
        raise ValueError("the mean of no values")
    value = math.fsum(values) / n
    if n == 1:
        return Metric(value=value, n=1)
    distinct, counts = np.unique(np.asarray(values, dtype=np.float64), return_counts=True)
    draws = np.random.default_rng(INTERVAL_SEED).multinomial(
        n, counts / n, size=RESAMPLES
    )  # [RESAMPLES, distinct]
    low, high = np.quantile(draws @ distinct / n, [0.025, 0.975])
    return Metric(value=value, low=min(float(low), value), high=max(float(high), value), n=n)


def mean_metrics(scores: Sequence[Mapping[str, float | None]]) -> dict[str, Metric]:
    """Each score's mean over the examples that have it, in order of first appearance.

    None is a score that an example should have and lacks: it is left out, and counted in `of`. A score that
    nobody has is left out altogether.
    """
    found = dict[str, Metric]()
    for name in dict.fromkeys(name for row in scores for name in row):
        meant = [row[name] for row in scores if name in row]
        known = [value for value in meant if value is not None]
        if known:
            of = None if len(meant) == len(scores) else len(meant)
            found[name] = mean_metric(known).model_copy(update={"of": of})
    return found


def difference(a: Metric, b: Metric) -> Metric:
    """a - b with an interval from those of both, as if they were independent.

    Roles answer the same examples, so the true interval is usually narrower: this errs towards "no
    difference".
    """
    value = a.value - b.value
    if a.low is None or a.high is None or b.low is None or b.high is None:
        return Metric(value=value)
    return Metric(
        value=value,
        low=value - math.hypot(a.value - a.low, b.high - b.value),
        high=value + math.hypot(a.high - a.value, b.value - b.low),
    )


def gap_closed(base: Metric, proxy: Metric, tuned: Metric) -> float | None:
    """(proxy - base) / (tuned - base), not capped; None where the interval of tuned - base includes 0 or is
    unknown."""
    gap = difference(tuned, base)
    if gap.low is None or gap.high is None or gap.low <= 0 <= gap.high:
        return None
    return (proxy.value - base.value) / gap.value
