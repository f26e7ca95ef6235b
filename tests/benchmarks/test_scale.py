"""The simulation of workers, and the arithmetic of the plan, on cases that a hand can check."""

from __future__ import annotations

import pytest

from benchmarks.scale import Trouble, Workload, finished_at, lengths_of, simulate
from benchmarks.scale_plan import TRIOS, Assumed, plan

QUIET = Trouble("none")


def test_rows_leave_as_they_end_and_others_come() -> None:
    """Two rows at a time: steps of 3 s with both, of 2 s with one."""
    workload = Workload(1.0, 1.0, 2, (), 0.0)
    assert finished_at(workload, [2, 3, 1], 1.0) == [6.0, 9.0, 9.0]
    assert finished_at(workload, [2, 4], 2.0) == [12.0, 20.0]


def test_one_worker_alone() -> None:
    """Equal lengths in parts of 4: as many steps as tokens."""
    found = simulate(Workload(0.5, 0.25, 4, (3,) * 8, 10.0), 1, QUIET)
    assert found.seconds == 10 + 2 * 3 * 1.5 and found.tokens == 24 and (found.lost, found.repeated) == (0, 0)


@pytest.mark.parametrize("workers", [2, 7])
def test_trouble_costs_and_loses_nothing(workers: int) -> None:
    workload = Workload(0.03, 0.0004, 16, lengths_of(400, 50), 20.0)
    quiet = simulate(workload, workers, QUIET)
    slow = simulate(workload, workers, Trouble("slow", slow=0.5, factor=3.0))
    dying = simulate(workload, workers, Trouble("dying", between=40.0), seed=1)
    assert quiet.seconds < slow.seconds and quiet.seconds < dying.seconds
    assert quiet.tokens == slow.tokens == dying.tokens == sum(workload.lengths)
    assert dying.lost > 0 and dying.repeated > 0
    assert simulate(workload, 1, QUIET).seconds / quiet.seconds <= workers


def test_the_plan_reads_all_weights_once_per_step() -> None:
    trio = TRIOS["70B trio (8B experts)"]
    assumed = Assumed(context=2048, rows=64, reached=1.0, collective=0.0, price=3.6)
    split, one_by_one = plan(trio, 4, True, assumed), plan(trio, 4, False, assumed)
    assert split is not None and one_by_one is not None and plan(trio, 2, True, assumed) is None
    assert split.weights == pytest.approx((70.6 + 2 * 8.03) * 2e9)
    kv = 64 * 1024 * 2 * 8 * 128 * 2 * (80 + 32 + 32)
    assert split.seconds == pytest.approx((split.weights + kv) / (4 * 3350e9))
    assert one_by_one.seconds == pytest.approx(4 * split.seconds)
    assert split.usd == pytest.approx(4 * 0.001 * split.seconds / 64 * 1e6)
