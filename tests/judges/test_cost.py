"""What a paid judge may cost: nothing is sent that could pass the limit, and nothing paid is forgotten."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from proxytune.endpoints import Budget, ReplyStore
from proxytune.errors import UserError
from proxytune.judges.judge import Estimate
from proxytune.judges.pairwise import PairwiseJudge
from proxytune.options import JudgeOptions
from proxytune.runs.judging import Judging
from tests.support.endpoint import Endpoint

ROWS = [{"instruction": f"Do {i}.", "output_1": f"plain {i}", "output_2": f"GOOD {i}"} for i in range(20)]
A_DOLLAR_A_TOKEN = (1e6, 1e6)


def spent(judge: PairwiseJudge) -> float:
    """US dollars by the store."""
    return judge.estimate(ROWS).spent


def test_what_is_reserved_for_calls_is_free_once_they_have_ended() -> None:
    """After a call that was dearer than its estimate more is reserved, and as much is given back."""
    budget = Budget(limit=100)
    for usd in (3.0, 1.0, 0.5):
        reserved = budget.need(1.0)
        budget.in_flight += reserved
        budget.settle(reserved, 1.0, usd)
        assert budget.in_flight == 0
    assert (budget.spent, budget.excess, budget.settled) == (4.5, 3.0, 3)


@pytest.mark.parametrize("tokens", [10, 300])
@pytest.mark.parametrize("workers", [1, 8])
@pytest.mark.parametrize("limit", [0, 500, 1200, 3000, 5100])
@pytest.mark.every(4)
def test_an_honest_endpoint_never_passes_the_limit(
    tokens: int, workers: int, limit: float, endpoint: Endpoint
) -> None:
    endpoint.usage = {"prompt_tokens": tokens, "completion_tokens": 1}
    judge = PairwiseJudge("m", price=A_DOLLAR_A_TOKEN, max_cost=limit, workers=workers)
    paid = tokens + 1
    try:
        judge.judge(ROWS)
    except UserError as error:
        assert f"--max-cost {limit}: {paid * len(endpoint.seen):.4f} USD are spent" in str(error)
        assert "same command with a higher limit continues" in str(error)
    else:
        assert len(endpoint.seen) == len(ROWS)
    assert spent(judge) == paid * len(endpoint.seen) <= limit


@pytest.mark.parametrize("workers", [1, 8])
def test_an_endpoint_that_counts_otherwise_is_found_out_by_one_call(workers: int, endpoint: Endpoint) -> None:
    endpoint.usage = {"prompt_tokens": 10**6, "completion_tokens": 1}
    judge = PairwiseJudge("m", price=(2, 8), max_cost=0.01, workers=workers)
    with pytest.raises(UserError, match=r"2\.0000 USD are spent, and the next call may cost 2\.0"):
        judge.judge(ROWS)
    assert len(endpoint.seen) == 1


def test_later_calls_are_expected_to_cost_what_the_dearest_did() -> None:
    budget = Budget(limit=100)
    assert budget.affords(1) and not budget.affords(101)
    budget.in_flight += 1
    budget.settle(reserved=1, estimate=1, usd=30)
    assert budget.spent == 30 and budget.in_flight == 0
    assert budget.affords(budget.need(2)) and not budget.affords(budget.need(3))
    budget.settle(reserved=0, estimate=1, usd=0)
    assert budget.need(2) == 60


@pytest.mark.parametrize(
    "usage",
    [
        None,
        [],
        {},
        {"prompt_tokens": -5, "completion_tokens": -(10**9)},
        {"prompt_tokens": "9", "completion_tokens": None},
        {"prompt_tokens": 0, "completion_tokens": 1e3},
    ],
)
@pytest.mark.every(2)
def test_usage_that_is_no_count_costs_the_estimate(usage: Any, endpoint: Endpoint) -> None:
    endpoint.usage = usage
    judge = PairwiseJudge("m", price=A_DOLLAR_A_TOKEN, workers=1)
    judge.judge(ROWS[:1])
    (pair,) = judge.pairs(ROWS[:1])
    assert spent(judge) >= pair.letters + 16, "no token is shorter than a byte"


def test_what_is_spent_counts_in_later_sessions(endpoint: Endpoint) -> None:
    def judge(limit: float) -> PairwiseJudge:
        return PairwiseJudge("m", price=A_DOLLAR_A_TOKEN, max_cost=limit, workers=2)

    with pytest.raises(UserError, match="--max-cost 2000"):
        judge(2000).judge(ROWS)
    before = len(endpoint.seen)
    assert 0 < before < 20 and spent(judge(2000)) == 101 * before
    with pytest.raises(UserError, match=f"{101 * before:.4f} USD are spent"):
        judge(2000).judge(ROWS)
    assert len(endpoint.seen) == before, "the same limit is not spent again"
    judge(1e6).judge(ROWS)
    assert len(endpoint.seen) == 20 and spent(judge(1)) == 20 * 101


def test_what_was_spent_counts_before_anything_is_asked() -> None:
    judging = Judging(PairwiseJudge("m"), JudgeOptions(yes=True, max_cost=1))
    estimate = Estimate(1, cached=0, prompt_tokens=9, completion_tokens=9, usd=0.4, seconds=1, spent=0.5)
    judging.agree(estimate)
    with pytest.raises(UserError, match=r"0\.7000 USD of earlier sessions are over --max-cost 1"):
        judging.agree(replace(estimate, spent=0.7))


def test_one_limit_for_all_that_a_judge_is_given(endpoint: Endpoint) -> None:
    """As `eval --as all` does, which judges one run after another."""
    judge = PairwiseJudge("m", price=A_DOLLAR_A_TOKEN, max_cost=1900)
    judge.judge(ROWS[:10])
    with pytest.raises(UserError, match="--max-cost 1900"):
        judge.judge(ROWS[10:])
    assert 10 <= len(endpoint.seen) < 20 and spent(judge) == 101 * len(endpoint.seen)


def test_a_call_that_was_in_flight_when_it_was_killed_counts(endpoint: Endpoint) -> None:
    judge = PairwiseJudge("m", price=A_DOLLAR_A_TOKEN, max_cost=5000)
    key = judge.key(judge.pairs(ROWS)[0])
    ReplyStore(judge.cache_path).sending(key, (4800, 16))
    with pytest.raises(UserError, match=r"4816\.0000 USD are spent"):
        judge.judge(ROWS)
    assert not endpoint.seen


def test_a_reply_that_is_no_verdict_is_paid_for(endpoint: Endpoint) -> None:
    endpoint.reply = "Both are fine"
    judge = PairwiseJudge("m", price=A_DOLLAR_A_TOKEN)
    judge.judge(ROWS)
    judge.judge(ROWS)
    assert spent(judge) == 40 * 101


def test_a_call_that_is_refused_costs_nothing(endpoint: Endpoint) -> None:
    endpoint.failures = 3
    judge = PairwiseJudge("m", price=A_DOLLAR_A_TOKEN, workers=1)
    judge.judge(ROWS)
    assert len(endpoint.seen) == 23 and spent(judge) == 20 * 101
