"""The scheduler alone, with pools that only count: who decodes, who is fed, who waits and who makes room."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxytune.engine.request import Plan, Request, Row, Segment
from proxytune.engine.scheduler import HEADROOM, Scheduler


class FakeRows:
    """A pool of `tokens` tokens that checks what it is asked for."""

    rewinds = True

    def __init__(self, tokens: int) -> None:
        self.capacity = tokens
        self.lengths: list[int] = []
        self.room: list[int] = []
        self.forks: list[tuple[int, int]] = []
        self.rewound: list[tuple[int, int]] = []

    def fits(self, lengths: Sequence[int]) -> bool:
        return sum(lengths) <= self.capacity

    def reserve(self, lengths: Sequence[int]) -> None:
        assert len(lengths) == len(self.lengths) and self.fits(lengths)
        self.room = list(lengths)

    def admit(self, source: int | None = None, length: int = 0) -> None:
        if source is not None:
            assert length <= self.lengths[source]
            self.forks.append((source, length))
        self.lengths.append(length)

    def rewind(self, row: int, length: int) -> None:
        assert length <= self.lengths[row]
        self.rewound.append((row, length))
        self.lengths[row] = length

    def swap(self, one: int, other: int) -> None:
        self.lengths[one], self.lengths[other] = self.lengths[other], self.lengths[one]

    def drop(self, row: int) -> None:
        self.swap(row, -1)
        self.lengths.pop()

    def clear(self) -> None:
        self.lengths.clear()

    @property
    def peak_bytes(self) -> int:
        return 0


def request(number: int, lengths: Sequence[int] = (4, 6), new: int = 5, tag: object = None) -> Request:
    """A request whose prompts have these lengths for models a, b, ...; its ids are its own."""
    contexts = {
        name: tuple(1000 * number + i for i in range(n)) for name, n in zip("abc", lengths, strict=False)
    }
    return Request(contexts=contexts, key=number, max_new_tokens=new, tag=number if tag is None else tag)


class Bench:
    """A scheduler with its pools, and the part of the engine that feeds rows and makes tokens."""

    def __init__(
        self, tokens: int = 10_000, rows: int = 8, prefill: int = 100, models: str = "ab", draft: int = 0
    ) -> None:
        self.draft = draft
        self.pools = {name: FakeRows(tokens) for name in models}
        self.scheduler = Scheduler(self.pools, rows, prefill)
        self.done: list[object] = []
        self.responses: dict[object, list[int]] = {}

    @property
    def busy(self) -> bool:
        return bool(self.scheduler.rows or self.scheduler.waiting)

    def plan(self) -> Plan:
        """One plan, checked against what every plan must be, with its segments fed."""
        oldest = min((row.ticket for row in self.scheduler.rows), default=None)
        plan = self.scheduler.plan(self.wishes)
        rows = self.scheduler.rows
        assert oldest is None or oldest in {row.ticket for row in rows}, "the oldest row was preempted"
        assert len(rows) <= self.scheduler.max_rows
        assert set(plan.prefill) == set(self.pools) and len(plan.depths) == plan.decoding
        for name, segments in self.fed(plan).items():
            pool, indices = self.pools[name], [segment.row for segment in segments]
            assert len(pool.lengths) == len(rows)
            assert indices == sorted(set(indices)), "distinct rows, ascending"
            assert indices[: plan.decoding] == list(range(plan.decoding)), "rows that decode come first"
            prefill = sum(len(segment.ids) for segment in segments[plan.decoding :])
            assert prefill <= self.scheduler.prefill_tokens
            for segment in segments:
                ids, seen = rows[segment.row].ids[name], pool.lengths[segment.row]
                assert segment.ids and list(segment.ids) == ids[seen : seen + len(segment.ids)]
                last = seen + len(segment.ids) == len(ids)
                assert last == (segment.row < plan.decoding), "the last token is fed when the row decodes"
                pool.lengths[segment.row] += len(segment.ids)
                drafts = plan.depths[segment.row] if segment.row < plan.decoding else 0
                assert pool.lengths[segment.row] + drafts <= pool.room[segment.row]
        return plan

    def wishes(self, rows: Sequence[Row]) -> list[list[int]]:
        """Every row would like `draft` drafts."""
        return [[self.draft] * len(rows)]

    def fed(self, plan: Plan) -> dict[str, list[Segment]]:
        """What the engine feeds: the last token of every row that decodes, then prompts."""
        rows = self.scheduler.rows[: plan.decoding]
        return {
            name: [*(Segment(i, (row.ids[name][-1],)) for i, row in enumerate(rows)), *prefill]
            for name, prefill in plan.prefill.items()
        }

    def step(self) -> Plan:
        """A plan, and one token for every row that decodes: the token is how many the row had."""
        plan = self.plan()
        ended = []
        for index, row in enumerate(self.scheduler.rows[: plan.decoding]):
            token = len(row.tokens)
            row.tokens.append(token)
            for ids in row.ids.values():
                ids.append(token)
            if len(row.tokens) >= row.request.max_new_tokens:
                ended.append(index)
                assert row.request.tag not in self.responses, "no request is answered twice"
                self.responses[row.request.tag] = list(row.tokens)
                self.done.append(row.request.tag)
        self.scheduler.finish(ended)
        return plan

    def run(self, limit: int = 5000) -> None:
        for _ in range(limit):
            if not self.busy:
                return
            self.step()
        pytest.fail(
            f"no end after {limit} steps: {len(self.scheduler.rows)} rows, {len(self.scheduler.waiting)} wait"
        )


def test_prompts_are_fed_but_for_their_last_token_then_rows_decode() -> None:
    bench = Bench()
    bench.scheduler.submit(request(1, (4, 6)))
    plan = bench.plan()
    assert plan.decoding == 0
    assert {name: [len(s.ids) for s in segments] for name, segments in plan.prefill.items()} == {
        "a": [3],
        "b": [5],
    }
    assert bench.plan().decoding == 1


def test_a_prompt_of_one_token_decodes_at_once() -> None:
    bench = Bench()
    bench.scheduler.submit(request(1, (1, 1)))
    assert bench.plan().decoding == 1


def test_prefill_budget_holds_per_model_and_goes_to_the_oldest() -> None:
    bench = Bench(prefill=10)
    for number, lengths in enumerate([(8, 3), (8, 30), (8, 3)], 1):
        bench.scheduler.submit(request(number, lengths))
    first = bench.step()
    fed = {n: {s.row: len(s.ids) for s in segments} for n, segments in first.prefill.items()}
    tags = [row.request.tag for row in bench.scheduler.rows]
    assert [fed["a"][tags.index(tag)] for tag in (1, 2)] == [7, 3]
    assert [fed["b"][tags.index(tag)] for tag in (1, 2)] == [2, 8]
    bench.run()
    assert sorted(bench.done, key=str) == [1, 2, 3]


def test_decoding_goes_on_while_a_long_prompt_is_fed() -> None:
    bench = Bench(prefill=5)
    bench.scheduler.submit(request(1, (2, 2), new=30))
    bench.step()
    bench.scheduler.submit(request(2, (51, 51), new=1))
    plans = [bench.step() for _ in range(10)]
    assert all(plan.decoding == 1 for plan in plans)
    assert all(sum(len(s.ids) for s in plan.prefill["a"]) == 5 for plan in plans)
    assert bench.step().decoding == 2


def test_a_row_decodes_only_when_every_model_is_ready() -> None:
    bench = Bench(prefill=4)
    bench.scheduler.submit(request(1, (3, 12), new=2))
    decoding = [bench.step().decoding for _ in range(4)]
    assert decoding == [0, 0, 0, 1]


def test_admission_is_first_come_first_served() -> None:
    bench = Bench(rows=2)
    for number in range(1, 7):
        bench.scheduler.submit(request(number, new=number))
    bench.run()
    assert bench.done == [1, 2, 3, 4, 5, 6]
    assert bench.scheduler.preemptions == 0


def test_a_large_request_is_not_overtaken_for_want_of_room() -> None:
    """Small ones behind it could start now, but then it might wait for ever."""
    bench = Bench(tokens=200, rows=4)
    bench.scheduler.submit(request(1, (100, 100), new=20))
    bench.step()
    bench.scheduler.submit(request(2, (90, 90), new=20))
    bench.scheduler.submit(request(3, (5, 5), new=5))
    bench.step()
    assert [row.request.tag for row in bench.scheduler.rows] == [1]
    bench.run()
    assert bench.done[0] == 1 and len(bench.done) == 3


def test_samples_of_one_prompt_wait_for_it_and_share_it() -> None:
    bench = Bench(rows=4)
    for sample in range(3):
        bench.scheduler.submit(request(1, (9, 12), tag=sample))
    bench.step()
    assert len(bench.scheduler.rows) == 1, "the prompt is computed once"
    bench.step()
    assert len(bench.scheduler.rows) == 3
    assert bench.pools["a"].forks == [(0, 8)] * 2 and bench.pools["b"].forks == [(0, 11)] * 2
    bench.run()
    assert sorted(bench.done, key=str) == [0, 1, 2]


def alike(number: int, same: int, own: int = 6) -> Request:
    """A request whose prompts begin with `same` ids that all have."""
    contexts = {name: (*range(same), *(1000 * number + i for i in range(own))) for name in "ab"}
    return Request(contexts=contexts, key=number, max_new_tokens=4, tag=number)


def test_prompts_that_begin_alike_share_the_beginning() -> None:
    bench = Bench(rows=4)
    for number in range(1, 4):
        bench.scheduler.submit(alike(number, 20))
    bench.step()
    assert len(bench.scheduler.rows) == 1, "the beginning is computed once"
    bench.step()
    assert len(bench.scheduler.rows) == 3
    assert all(pool.forks == [(0, 20)] * 2 for pool in bench.pools.values())
    bench.scheduler.submit(alike(4, 20))  # while the others decode
    bench.step()
    assert all(pool.forks[2:] == [(0, 20)] for pool in bench.pools.values())
    bench.run()
    assert sorted(bench.done, key=str) == [1, 2, 3, 4]


def test_a_short_beginning_is_not_waited_for() -> None:
    bench = Bench(rows=4)
    for number in range(1, 4):
        bench.scheduler.submit(alike(number, 9))
    bench.step()
    assert len(bench.scheduler.rows) == 3 and bench.pools["a"].forks == []


def test_a_beginning_is_taken_over_once_it_is_there() -> None:
    bench = Bench(rows=4, prefill=30)
    bench.scheduler.submit(alike(1, 20, own=100))
    bench.step()
    longer = Request({n: (*ids, 7) for n, ids in alike(1, 20, own=3).contexts.items()}, 5, 4, tag="longer")
    bench.scheduler.submit(longer)
    bench.step()
    assert [row.request.tag for row in bench.scheduler.rows] == [1]  # the first row's prefill fills the steps
    bench.run()
    assert set(bench.done) == {1, "longer"} and bench.pools["a"].forks == [(0, 23)]


def test_other_prompts_do_not_wait_behind_samples_that_do() -> None:
    bench = Bench(rows=4)
    for number, tag in [(1, "1a"), (1, "1b"), (2, "2")]:
        bench.scheduler.submit(request(number, tag=tag))
    bench.step()
    assert [row.request.tag for row in bench.scheduler.rows] == ["1a", "2"]


def test_equal_ids_for_one_model_alone_are_not_the_same_prompt() -> None:
    """The base's prompt can be the same while the expert's chat context differs."""
    bench = Bench(rows=4)
    one = request(1, (5, 5))
    bench.scheduler.submit(one)
    bench.step()
    bench.scheduler.submit(Request({**one.contexts, "b": (7, 7, 7)}, key=2, max_new_tokens=3, tag=2))
    bench.step()
    assert bench.pools["a"].forks == [] and bench.pools["b"].forks == []


def test_a_finished_rows_place_goes_to_a_sample_of_its_prompt() -> None:
    bench = Bench(rows=1)
    for sample in range(3):
        bench.scheduler.submit(request(1, (9, 12), new=4, tag=sample))
    for other in range(2):
        bench.scheduler.submit(request(2, tag=f"other {other}"))
    bench.run()
    assert bench.done[:3] == [0, 1, 2]
    assert bench.pools["a"].rewound[:2] == [(0, 8), (0, 8)] and bench.pools["b"].rewound[:2] == [
        (0, 11),
        (0, 11),
    ]
    assert bench.pools["a"].forks == []


def test_preemption_takes_the_youngest_and_keeps_its_tokens() -> None:
    bench = Bench(tokens=120, rows=3)
    for number in (1, 2, 3):
        bench.scheduler.submit(request(number, (10, 10), new=60))
    tokens: dict[object, list[int]] = {}
    while not bench.scheduler.preemptions:
        tokens = {row.request.tag: list(row.tokens) for row in bench.scheduler.rows}
        bench.step()
    waits = bench.scheduler.waiting[0]
    assert waits.request.tag == 3 and waits.tokens == tokens[3] and len(waits.tokens) > 10
    assert waits.ids["a"][10:] == waits.tokens
    bench.run()
    assert bench.done == [1, 2, 3]
    assert all(response == list(range(60)) for response in bench.responses.values())


def test_drafts_give_way_before_a_row_does() -> None:
    bench = Bench(tokens=60, rows=2, draft=8)
    for number in (1, 2):
        bench.scheduler.submit(request(number, (10, 10), new=20))
    bench.step()
    depths = set()
    while bench.busy:
        plan = bench.step()
        depths |= set(plan.depths)
    assert depths == {0, 8} and bench.scheduler.preemptions == 0


def test_a_row_enters_only_with_room_to_grow() -> None:
    bench = Bench(tokens=2 * (10 + HEADROOM) + 9, rows=3)
    for number in (1, 2, 3):
        bench.scheduler.submit(request(number, (10, 10), new=2))
    bench.step()
    assert len(bench.scheduler.rows) == 2 and bench.scheduler.preemptions == 0


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    requests=st.integers(1, 14),
    rows=st.integers(1, 6),
    prefill=st.integers(1, 40),
    spare=st.integers(0, 120),
    models=st.sampled_from(["a", "ab", "abc"]),
    draft=st.integers(0, 8),
)
def test_any_pool_that_holds_one_row_answers_everything(
    seed: int, requests: int, rows: int, prefill: int, spare: int, models: str, draft: int
) -> None:
    """Whatever the pool, the budget and the mix: all end, each once, with all their tokens."""
    draw = random.Random(seed)
    wanted = [
        request(draw.randint(1, 4), [draw.randint(1, 30) for _ in models], draw.randint(1, 25), tag=number)
        for number in range(requests)
    ]
    need = max(len(ids) + r.max_new_tokens for r in wanted for ids in r.contexts.values())
    bench = Bench(need + spare, rows, prefill, models, draft)
    arriving = list(wanted)
    steps = 0
    while bench.busy or arriving:
        while arriving and (not bench.busy or draw.random() < 0.5):
            bench.scheduler.submit(arriving.pop(0))
        bench.step()
        steps += 1
        assert steps < 20_000
    assert {tag: len(response) for tag, response in bench.responses.items()} == {
        r.tag: r.max_new_tokens for r in wanted
    }
    assert all(response == list(range(len(response))) for response in bench.responses.values())
    assert all(pool.lengths == [] for pool in bench.pools.values())
