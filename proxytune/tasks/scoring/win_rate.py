"""Win rates from pairwise preferences: plain, as the paper's judge tool gave them, and length-controlled."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from proxytune.intervals import INTERVAL_SEED
from proxytune.records import Metric

Vector = NDArray[np.float64]

RESAMPLES = 500
"""Bootstrap resamples behind the interval of the length-controlled win rate (each one is a fit)."""
RIDGE = 0.05
"""Pull towards 0 on both coefficients, in pseudo-examples; keeps them finite when one side always wins."""
STEPS = 30


def wins(preference: object) -> float | None:
    """An annotation's `preference` -> 1 the model's output won, 0 the baseline's, 0.5 a draw, None invalid.

    1 is the baseline (output_1), 2 the model (output_2), 0 or 1.5 a draw; newer judges give numbers between.
    """
    if isinstance(preference, bool) or not isinstance(preference, int | float) or math.isnan(preference):
        return None
    if preference == 0:
        return 0.5
    return float(preference) - 1 if 1 <= preference <= 2 else None


def win_rate(won: Sequence[float], interval: Metric) -> dict[str, Metric]:
    """The figures of AlpacaEval 0.3.1 (reference: the paper's metrics.json), from scores of 0, 0.5 and 1.

    `interval` is the mean of the scores with its bootstrap interval, as a share.
    """
    scores = np.asarray(won, dtype=np.float64)
    n = len(won)
    found = {
        "win_rate": Metric(
            value=100 * float(scores.mean()),
            low=None if interval.low is None else 100 * interval.low,
            high=None if interval.high is None else 100 * interval.high,
            unit="percent",
            n=n,
        )
    }
    if n > 1:
        error = 100 * float(scores.std(ddof=1)) / math.sqrt(n)
        found["standard_error"] = Metric(value=error, unit="percent")
    counts = {"n_wins": scores > 0.5, "n_wins_base": scores < 0.5, "n_draws": scores == 0.5}
    found |= {name: Metric(value=int(which.sum()), unit="number") for name, which in counts.items()}
    return found | {"n_total": Metric(value=n, unit="number")}


def length_controlled_win_rate(
    won: Sequence[float], lengths: Sequence[int], baseline: Sequence[int]
) -> Metric:
    """The win rate that a logistic model expects between outputs of equal length, in percent.

    The idea of AlpacaEval 2 (Dubois et al. 2024): win ~ sigmoid(a + b * tanh(d / std(d))), d the difference
    of the lengths; the answer is sigmoid(a). Theirs also has a term for each instruction's difficulty, fitted
    on other models' outputs, so figures differ from their leaderboard's.
    """
    y = np.asarray(won, dtype=np.float64)
    d = np.asarray(lengths, dtype=np.float64) - np.asarray(baseline, dtype=np.float64)
    spread = d.std()
    x = np.tanh(d / spread) if spread > 0 else np.zeros_like(d)
    value = _percent(_fit(x, y, np.ones((1, len(y)))))[0]
    if len(y) < 2:
        return Metric(value=float(value), unit="percent", n=len(y))
    draws = np.random.default_rng(INTERVAL_SEED).multinomial(
        len(y), np.full(len(y), 1 / len(y)), size=RESAMPLES
    )  # [RESAMPLES, n]
    low, high = np.quantile(_percent(_fit(x, y, draws.astype(np.float64))), [0.025, 0.975])
    return Metric(
        value=float(value),
        low=min(float(low), float(value)),
        high=max(float(high), float(value)),
        unit="percent",
        n=len(y),
    )


def _percent(intercepts: Vector) -> Vector:
    """100 * sigmoid."""
    return np.asarray(100 / (1 + np.exp(-intercepts)))


def _fit(x: Vector, y: Vector, weights: Vector) -> Vector:
    """Intercepts [R] of weighted ridge logistic regressions of y on x, by Newton's method; weights [R, n]."""
    a, b = np.zeros(len(weights)), np.zeros(len(weights))
    for _ in range(STEPS):
        p = 1 / (1 + np.exp(-(a[:, None] + b[:, None] * x)))  # [R, n]
        gap, curve = weights * (y - p), weights * p * (1 - p)
        ga, gb = gap.sum(1) - RIDGE * a, gap @ x - RIDGE * b
        haa, hab, hbb = curve.sum(1) + RIDGE, curve @ x, curve @ (x * x) + RIDGE
        det = haa * hbb - hab * hab
        da, db = (hbb * ga - hab * gb) / det, (haa * gb - hab * ga) / det
        size = np.maximum(np.maximum(np.abs(da), np.abs(db)), 1.0)  # a step of at most 1 cannot overshoot
        a, b = a + da / size, b + db / size
        if max(np.abs(da).max(), np.abs(db).max()) < 1e-10:
            break
    return a
