"""Requests, rows and texts to be scored, by hand: how sequences share a beginning, what may not be chosen,
why a response ends, and what goes into a batch."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from proxytune.config import Sampling, System
from proxytune.engine import likelihood
from proxytune.engine.engine import Engine, finish_reason
from proxytune.engine.kv.reference_rows import ReferenceRows
from proxytune.engine.likelihood import Continuation, Measured
from proxytune.engine.logits import found_probability
from proxytune.engine.request import Plan, Request, Row, Segment, same_start
from proxytune.engine.runners import VocabMap
from proxytune.engine.sampling import RowPosition, _params, banned, pick
from proxytune.engine.scheduler import Scheduler
from proxytune.errors import PromptTooLong, UserError
from tests.engine.test_scheduler import Bench, FakeRows, alike, request
from tests.support.decoders import decoder, kv_bytes


@pytest.mark.parametrize(
    ("one", "other", "count"),
    [
        ((), (1, 2), 0),
        ((1, 2), (1, 2), 2),
        ((1, 2, 3), (1, 2), 2),
        ((1, 2, 3, 4), (1, 2, 9, 4), 2),
        ((7, 2), (8, 2), 0),
        ((1, 2, 3, 4, 5), (1, 2, 3, 4, 9), 4),
        ((1,), (1, 5, 6), 1),
    ],
)
def test_how_many_ids_sequences_begin_with(one: tuple[int, ...], other: tuple[int, ...], count: int) -> None:
    assert same_start(one, other) == same_start(other, one) == count
    assert likelihood.same_start([one, other]) == count
    assert likelihood.same_start([one, other, one]) == likelihood.same_start([other, one, one]) == count


def row(**contexts: tuple[int, ...]) -> Row:
    return Row(Request(contexts, 0, 5), 0, prompt=hash(tuple(contexts.values())), ids={})


def test_the_last_token_of_a_prompt_is_not_shared() -> None:
    """It is fed when a row decodes: in either of them."""
    mine = row(a=(1, 2, 3, 4), b=(5, 6, 7))
    assert mine.shared_with(row(a=(1, 2, 3, 4, 5), b=(5, 9))) == {"a": 3, "b": 1}
    assert mine.shared_with(row(a=(1, 2), b=(5, 6, 7))) == {"a": 1, "b": 2}
    assert mine.same_prompt(row(a=(1, 2, 3, 4), b=(5, 6, 7))) and not mine.same_prompt(row(a=(1, 2, 3, 4)))
    collision = row(a=(1, 2), b=(5, 6, 7))
    collision.prompt = mine.prompt
    assert not mine.same_prompt(collision), "the same hash is not the same prompt"
    plan = Plan(0, (), {"a": (Segment(0, (1, 2)), Segment(3, (4,))), "b": ()})
    assert plan.prompt_tokens("a") == 3 and plan.prompt_tokens("b") == 0


def asked(tokens: list[int], **parts: Any) -> Row:
    made = Request({"a": (1,)}, parts.pop("key", 0), parts.pop("most", 4), **parts)
    return Row(made, 0, 0, {}, tokens)


def test_why_a_response_ends() -> None:
    """An end of sequence before a stop string, and that before the length."""
    stop = lambda tokens: len(tokens) == 4  # noqa: E731
    ends = frozenset([9])
    assert finish_reason(asked([1, 1, 1, 9], eos=ends, stop=stop)) == "eos"
    assert finish_reason(asked([9, 1, 1, 1], eos=ends, stop=stop)) == "stop"
    assert finish_reason(asked([9, 1, 1, 1], eos=ends)) == "length"
    assert finish_reason(asked([9, 1, 1], eos=ends, stop=stop)) is None


def test_what_may_not_be_chosen_where() -> None:
    """Bans everywhere, those of the first position there, an end of sequence before the minimum length."""
    both = {"banned": frozenset([7, 5]), "banned_first": frozenset([6]), "eos": frozenset([2])}
    strict = asked([], sampling=Sampling(min_new_tokens=2), **both)
    first = asked([], banned_first=frozenset([8, 3]))
    short = asked([], sampling=Sampling(min_new_tokens=1), eos=frozenset([2, 1]))
    free = asked([], eos=frozenset([2]))
    places = [
        (strict, 0),
        (free, 0),
        (strict, 1),
        (strict, 2),
        (first, 0),
        (first, 1),
        (short, 0),
        (short, 1),
    ]
    where, ids = banned([RowPosition(*place) for place in places])
    assert list(zip(where, ids, strict=True)) == [
        *[(0, token) for token in (2, 5, 6, 7)],
        *[(2, token) for token in (2, 5, 7)],
        *[(3, token) for token in (5, 7)],
        *[(4, token) for token in (3, 8)],
        *[(6, token) for token in (1, 2)],
    ]


def test_forced_tokens_come_first_whatever_is_banned() -> None:
    made = asked([], forced=(3, 1), banned=frozenset([3, 0]))
    logits = torch.tensor([[9.0, 0.0, 5.0, 7.0]]).repeat(4, 1)
    places = [RowPosition(made, at) for at in range(3)] + [RowPosition(asked([]), 0)]
    assert pick(logits, places).tolist() == [3, 1, 2, 0]


def test_every_setting_goes_to_its_row() -> None:
    one = Sampling(temperature=0.5, top_k=4, top_p=0.75, min_p=0.125)
    two = Sampling(temperature=2.0, top_k=6, top_p=0.5, min_p=0.25)
    rows = [asked([], sampling=one, key=-11), asked([]), asked([], sampling=two, key=13)]
    found = _params([RowPosition(made, 5 + at) for at, made in enumerate(rows)], torch.device("cpu"))
    assert found is not None
    assert {name: column.tolist() for name, column in vars(found).items()} == {
        "rows": [0, 2],
        "temperature": [0.5, 2.0],
        "top_k": [4, 6],
        "top_p": [0.75, 0.5],
        "min_p": [0.125, 0.25],
        "keys": [-11, 13],
        "positions": [5, 7],
    }
    assert found.temperature.dtype == found.top_p.dtype == found.min_p.dtype == torch.float64
    assert _params([RowPosition(rows[1], 0)], torch.device("cpu")) is None


def test_rows_that_are_no_distribution() -> None:
    nan, inf = math.nan, math.inf
    logits = torch.tensor(
        [[0.0, 0.0], [0.0, nan], [inf, 0.0], [-inf, -inf], [-inf, 3.0]], dtype=torch.float64
    )
    found = found_probability(logits, torch.tensor([1, 0, 1, 0, 1]))
    assert found[[0, 4]].tolist() == pytest.approx([math.log(0.5), 0.0]) and bool(found[1:4].isnan().all())


# Admission


@pytest.mark.parametrize(("same", "waits"), [(15, False), (16, True)])
def test_sixteen_tokens_are_worth_waiting_for(same: int, waits: bool) -> None:
    bench = Bench(rows=4)
    for number in (1, 2):
        bench.scheduler.submit(alike(number, same))
    bench.step()
    assert len(bench.scheduler.rows) == (1 if waits else 2)
    bench.step()
    assert all(pool.forks == ([(0, 16)] if waits else []) for pool in bench.pools.values())


def test_what_is_worth_waiting_for_in_one_model_alone() -> None:
    """Sixteen tokens of a beginning, or the one before the last of the same prompt."""
    for contexts, shared in [
        ([(*range(16), 50, 51), (*range(16), 60)], 16),
        ([(7, 8), (7, 8)], 1),
    ]:
        bench = Bench(models="a", rows=4)
        for number, ids in enumerate(contexts):
            bench.scheduler.submit(Request({"a": ids}, number, 4, tag=number))
        bench.step()
        assert len(bench.scheduler.rows) == 1
        bench.step()
        assert bench.pools["a"].forks == [(0, shared)]


def test_sixteen_tokens_of_headroom_for_every_row() -> None:
    """Two rows of 10 and 20 tokens, each with 16 more: 62 have room for both, 61 have not."""
    for tokens, count in ((62, 2), (61, 1)):
        bench = Bench(tokens=tokens, rows=4)
        bench.scheduler.submit(request(1, (10, 10)))
        bench.scheduler.submit(request(2, (20, 20)))
        bench.step()
        assert len(bench.scheduler.rows) == count


def test_prompts_are_let_in_while_less_than_a_step_is_outstanding() -> None:
    """A prompt of n tokens has n - 1 to be fed before it decodes; the model with the most counts."""
    for length, count in ((11, 2), (10, 3)):
        bench = Bench(prefill=10, rows=8)
        bench.scheduler.submit(request(1, (2, length)))
        bench.scheduler.submit(request(2, (2, 2)))
        bench.scheduler.submit(request(3, (2, 2)))
        bench.scheduler._admit()
        assert len(bench.scheduler.rows) == count - 1


def test_what_would_join_a_batch() -> None:
    """Rows whose prompts are in; or one that waits, where there is room, and rows that do not decode yet."""
    bench = Bench(rows=2, prefill=10)
    scheduler = bench.scheduler
    for number, length in ((1, 3), (2, 30)):
        scheduler.submit(request(number, (length, length), new=50))
    bench.step(), bench.step()
    assert len(scheduler.rows) == 2 and not scheduler.joining(1) and scheduler.joining(0)
    scheduler.submit(request(3, (3, 3)))
    scheduler.prefill_tokens = 100
    assert not scheduler.joining(1), "there are two rows"
    scheduler.max_rows, scheduler.prefill_tokens = 3, 10
    assert not scheduler.joining(1), "19 tokens are outstanding, and a step has ten"
    scheduler.prefill_tokens = 20
    assert scheduler.joining(1) and not scheduler.joining(2)
    scheduler.waiting.clear()
    assert not scheduler.joining(1)


def test_room_is_made_for_all_models_or_none() -> None:
    pools: Any = {"a": FakeRows(20), "b": FakeRows(12)}
    scheduler = Scheduler(pools, 4, 100)
    for pool in pools.values():
        pool.admit(), pool.admit()
        pool.lengths[:] = [3, 4]
    prefill: Any = {"a": (Segment(1, (7,) * 5),), "b": (Segment(1, (7, 7)),)}
    assert scheduler.make_room({"a": [2], "b": [3]}, prefill)
    assert pools["a"].room == [5, 9] and pools["b"].room == [6, 6], "twelve, and no more"
    assert not scheduler.make_room({"a": [3], "b": [4]}, prefill)
    assert pools["a"].room == [5, 9] and pools["b"].room == [6, 6], "nothing was done"


def test_tokens_that_are_spelt_need_more_room() -> None:
    """A draft takes up to three ids in one of the models: 1 + 3 * 2 for two drafts."""
    pools: Any = {"a": FakeRows(100), "b": FakeRows(100)}
    scheduler = Scheduler(pools, 4, 100, {"a": 1, "b": 3})
    scheduler.submit(request(1, (1, 1)))
    plan = scheduler.plan(lambda rows: [[9] * len(rows), [2] * len(rows)])
    assert plan.depths == (9,) and (pools["a"].room, pools["b"].room) == ([10], [28])
    pools["b"].capacity = 27
    assert scheduler.plan(lambda rows: [[9] * len(rows), [2] * len(rows)]).depths == (2,)
    assert (pools["a"].room, pools["b"].room) == ([3], [7])
    pools["b"].capacity = 6
    assert scheduler.plan(lambda rows: [[9] * len(rows), [2] * len(rows)]).depths == (0,)


def test_preemptions_are_counted_by_row_too() -> None:
    bench = Bench(rows=3)
    for number in (1, 2, 3):
        bench.scheduler.submit(request(number))
    bench.step()
    youngest = max(bench.scheduler.rows, key=lambda made: made.ticket)
    bench.scheduler.preempt()
    assert bench.scheduler.preemptions == youngest.counts.preemptions == 1
    assert bench.scheduler.waiting[0] is youngest and youngest.request.tag == 3
    assert bench.scheduler.find(3) is youngest and bench.scheduler.find(9) is None
    bench.scheduler.remove(youngest)
    assert bench.scheduler.find(3) is None and not bench.scheduler.waiting


def test_what_fits_alone_is_taken(trio: System) -> None:
    """A prompt that fills the window but for one token has one token of a response; a pool is filled to its
    last."""
    d = decoder(trio, kv_memory=kv_bytes(decoder(trio), 260))
    engine = Engine(d.ensemble, max_rows=2)

    def submit(count: int, most: int, on: Engine = engine) -> Request:
        on.submit(Request({name: (5,) * count for name in d.loaded}, 0, most, tag="q"))
        return on.scheduler.waiting[-1].request

    assert submit(255, 9).max_new_tokens == 1 and submit(250, 9).max_new_tokens == 6
    assert submit(250, 5).max_new_tokens == 5
    with pytest.raises(PromptTooLong, match=r"prompt of request 'q' .*256 tokens for the base"):
        submit(256, 1)
    with pytest.raises(UserError, match="the prompt of request 'q' is empty for the base"):
        submit(0, 1)
    engine.close()
    small = decoder(trio, kv_memory=kv_bytes(decoder(trio), 40))
    tight = Engine(small.ensemble, max_rows=2)
    assert submit(30, 10, tight).max_new_tokens == 10
    with pytest.raises(UserError, match="needs KV memory for 41 tokens of the base, but its pool holds 40"):
        submit(30, 11, tight)
    tight.close()


# Texts that are scored


def runner(window: int = 99, tokens: int = 99, spelled: Any = None) -> Any:
    alignment = VocabMap(9, spelled=spelled)
    return SimpleNamespace(alignment=alignment, window=window, rows=ReferenceRows(tokens))


def test_what_a_model_is_fed_of_a_text() -> None:
    """All but the last token, by its own ids; logits are wanted before each token."""
    spelt = runner(spelled=((10,), (11, 12), (13, 14, 15)))
    assert likelihood._fed(spelt, (1, 2, 0)) == ([11, 12, 13, 14, 15], [0, 2, 5])
    assert likelihood._fed(spelt, (2,)) == ([], [0]) and likelihood._fed(runner(), (4, 7)) == ([4], [0, 1])
    ensemble: Any = SimpleNamespace(runners={"a": runner(), "b": spelt})
    made = Measured.of(ensemble, Continuation({"a": (1,) * 4, "b": (1,) * 3}, (1, 2, 0)))
    assert made.lengths == {"a": 6, "b": 8} and made.fed == {"a": [1, 2], "b": [11, 12, 13, 14, 15]}


def test_tokens_of_a_context_that_are_new() -> None:
    """All of them, unless they are those before or begin with sixteen of them."""

    def new(before: tuple[int, ...] | None, context: tuple[int, ...]) -> int:
        there = None if before is None else Continuation({"a": before}, (1,))
        return likelihood._new_tokens(there, Continuation({"a": context}, (1,)), "a")

    many = tuple(range(20))
    assert new(None, many) == 20 and new(many, many) == 0 and new((5, 6), (5, 6)) == 0
    assert new((*many[:16], 99), many) == 4 and new((*many[:15], 99), many) == 20
    assert new((5, 6, 7), (5, 6)) == 0 and new((5, 6), (5, 6, 7)) == 3


def test_how_much_is_scored_together() -> None:
    """Positions and new tokens up to their limits, and as many rows as every pool holds; one at least."""
    wide, small = runner(tokens=1000), runner(tokens=22)
    items = [Continuation({"a": (n,) * 10, "b": (n,) * 4}, (1,) * 4) for n in range(6)]
    for pool, positions, tokens, counts in [
        (wide, 12, 999, [3, 3]),
        (wide, 11, 999, [2, 2, 2]),
        (wide, 1, 999, [1] * 6),
        (wide, 999, 30, [3, 3]),
        (wide, 999, 29, [2, 2, 2]),
        (wide, 999, 999, [6]),
        (small, 999, 999, [3, 3]),  # of rows of 7 tokens
    ]:
        ensemble: Any = SimpleNamespace(runners={"a": wide, "b": pool})
        measured = [Measured.of(ensemble, item) for item in items]
        found, start = [], 0
        while start < len(measured):
            batch = likelihood._batch(ensemble, measured, start, positions, tokens)
            assert list(batch) == measured[start : start + len(batch)]
            found.append(len(batch))
            start += len(batch)
        assert found == counts


@pytest.mark.parametrize(
    ("window", "tokens", "why"),
    [
        (12, 12, None),
        (11, 99, "'q' has 12 tokens for the a, whose context window is 11"),
        (99, 11, "'q' has 12 tokens for the a, but its KV pool holds 11"),
    ],
)
def test_a_text_that_just_fits(window: int, tokens: int, why: str | None) -> None:
    ensemble: Any = SimpleNamespace(runners={"a": runner(window, tokens)})
    measured = Measured.of(ensemble, Continuation({"a": (1,) * 10}, (1, 2, 3), "q"))
    if why is None:
        likelihood._check(ensemble, measured)
        return
    with pytest.raises(UserError, match=why):
        likelihood._check(ensemble, measured)
    with pytest.raises(UserError, match="the context of 'q' is empty for the a"):
        likelihood._check(ensemble, Measured.of(ensemble, Continuation({"a": ()}, (1,), "q")))


def test_rows_with_a_cache_of_their_own() -> None:
    """A fork takes the cache where it takes the whole row, a copy of it; a rewind loses it, unless it is
    none."""
    rows = ReferenceRows(10)
    rows.admit()
    rows.ids[0], rows.lengths[0], rows.caches[0] = [4, 5, 6], 3, {"of": [0]}
    rows.admit(0, 3), rows.admit(0, 2), rows.admit()
    assert rows.lengths == [3, 3, 2, 0] and rows.ids == [[4, 5, 6], [4, 5, 6], [4, 5], []]
    assert rows.caches == [{"of": [0]}, {"of": [0]}, None, None]
    rows.caches[1]["of"].append(1)
    assert rows.caches[0] == {"of": [0]}, "a copy, however deep"
    rows.rewind(1, 3)
    assert rows.caches[1] == {"of": [0, 1]}
    rows.rewind(1, 2)
    assert (rows.ids[1], rows.lengths[1], rows.caches[1]) == ([4, 5], 2, None)
    rows.drop(0)
    assert rows.lengths == [0, 2, 2] and rows.ids == [[], [4, 5], [4, 5]] and rows.caches == [None] * 3
    assert rows.fits([4, 6]) and not rows.fits([4, 7]) and not rows.rewinds
    rows.clear()
    assert not rows.lengths and not rows.ids and not rows.caches and rows.peak_bytes == 0
