"""The estimate of the time left, against batches whose end is known."""

from __future__ import annotations

import random

import pytest

from proxytune.terminal import WorkSoFar


def test_nothing_is_estimated_from_nothing() -> None:
    assert WorkSoFar(open=((0, 20),), unread=1).seconds_left() is None
    assert WorkSoFar(scoring=True, unread=5).seconds_left() is None
    assert WorkSoFar().seconds_left() == 0.0


def test_before_the_first_end_all_responses_are_long() -> None:
    work = WorkSoFar(open=((10, 100), (30, 100)), decode_seconds=4.0)
    assert work.tokens_per_second == 10 and work.seconds_left() == pytest.approx(16.0)


def test_prompts_that_wait_are_counted() -> None:
    """Two were read in 6 seconds, and three wait."""
    work = WorkSoFar(
        open=((10, 10), (10, 10), *[(0, 0)] * 3), unread=3, decode_seconds=2.0, prefill_seconds=6.0
    )
    assert work.seconds_left() == pytest.approx(9.0)


@pytest.mark.parametrize("rows", [8, 64])
def test_the_estimate_is_about_right_from_early_on(rows: int) -> None:
    """Responses that end anywhere, a batch that takes a second per step: the finished ones alone would give
    far too little while only the short ones are done."""
    draw = random.Random(rows)
    lengths = [min(400, 1 + int(draw.expovariate(1 / 120))) for _ in range(40 * rows)]
    waiting, running = [[length, 0] for length in lengths], list[list[int]]()
    done, seconds, estimates = 0, 0.0, list[tuple[float, float]]()
    tokens = 0
    while waiting or running:
        while waiting and len(running) < rows:
            running.append(waiting.pop())
        seconds += 1.0
        for row in running:
            row[1] += 1
        ended = [row for row in running if row[0] == row[1]]
        running = [row for row in running if row[0] > row[1]]
        done, tokens = done + len(ended), tokens + sum(row[0] for row in ended)
        left = tuple((row[1], 400) for row in (*running, *waiting))
        work = WorkSoFar(done, tokens, left, decode_seconds=seconds)
        found = work.seconds_left()
        assert found is not None
        estimates.append((seconds, found))
    for at, found in estimates[len(estimates) // 10 : len(estimates) * 3 // 4]:
        assert 0.6 < found / (seconds - at) < 1.6, at
