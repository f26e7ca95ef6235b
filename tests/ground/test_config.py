"""What settings mean, by their definition: alpha by position, and the gap that is none."""

from __future__ import annotations

import pytest

from proxytune.config import Sampling, parse_alpha
from proxytune.errors import UserError
from proxytune.intervals import gap_closed
from proxytune.records import Metric


@pytest.mark.parametrize(
    ("text", "alphas"),
    [
        ("0.5", [0.5] * 6),
        ("first:2", [1, 1, 0, 0, 0, 0]),
        ("first:2:0.5", [0.5, 0.5, 0, 0, 0, 0]),
        ("first:0", [0] * 6),
        ("warmup:3", [0, 0, 0, 1, 1, 1]),
        ("warmup:1:2", [0, 2, 2, 2, 2, 2]),
        ("linear:0:1:4", [0, 0.25, 0.5, 0.75, 1, 1]),
        ("linear:2:1:2", [2, 1.5, 1, 1, 1, 1]),
    ],
)
def test_alpha_at_every_position(text: str, alphas: list[float]) -> None:
    schedule = parse_alpha(text)
    assert [schedule.at(position) for position in range(6)] == alphas
    assert parse_alpha(schedule.text) == schedule


def test_a_gap_whose_interval_touches_zero_is_none() -> None:
    """(tuned - base) has the half width of both intervals together: 0.3 and 0.4 give 0.5."""
    base = Metric(value=0.0, low=-0.3, high=0.3)

    def closed(value: float, tuned: float) -> float | None:
        return gap_closed(base, Metric(value=value), Metric(value=tuned, low=tuned - 0.4, high=tuned + 0.4))

    assert closed(0.25, 0.5) is None and closed(-0.25, -0.5) is None
    assert closed(0.25, 0.75) == pytest.approx(1 / 3) == closed(-0.25, -0.75)
    assert gap_closed(base, Metric(value=0.25), Metric(value=0.75)) is None


def test_a_temperature_just_above_zero_is_refused_in_one_line() -> None:
    """As any other value that is out of bounds, in Python and in a file."""
    with pytest.raises(UserError, match=r"^Sampling: temperature: 0\.0009 is below 0\.001: use 0 for greedy"):
        Sampling(temperature=0.0009)
    assert Sampling(temperature=0.001).temperature == 0.001
