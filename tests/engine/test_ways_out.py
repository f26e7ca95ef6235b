"""Whatever ends a stream early, the caches are empty after it, and what comes next is decoded as if nothing
had been."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import islice
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from proxytune.config import Sampling, System, parse_alpha
from proxytune.decoding.decoder import Decoder
from proxytune.engine.engine import Engine
from proxytune.engine.kv.pages import PagedCache
from proxytune.engine.likelihood import Continuation, likelihoods
from proxytune.engine.request import Request
from proxytune.engine.speculative.drafter import LOOKUP, Speculation
from tests.support.decoders import by_id, decoder, kv_bytes, ragged, use_pages
from tests.support.on_device import as_on_a_device
from tests.support.tiers import examples as tries

WAYS = {
    "plain": (Speculation(k=0), Sampling(max_new_tokens=12)),
    "speculative": (Speculation(k=3), Sampling(max_new_tokens=12)),
    "lookup": (Speculation(k=4, drafter=LOOKUP), Sampling(max_new_tokens=12)),
    "sampled": (Speculation(), Sampling(max_new_tokens=12, temperature=0.9, top_k=20, n=3)),
}
"""How a stream decodes."""


class Wrong(Exception):
    """What a callback raises."""


def empty(d: Decoder) -> bool:
    """Whether no model has rows or pages in use."""
    caches = [runner.rows for runner in d.ensemble.runners.values()]
    paged = [cache for cache in caches if isinstance(cache, PagedCache)]
    return all(not cache.lengths for cache in caches) and all(
        sorted(cache.free_pages) == list(range(cache.pages)) and not any(cache.owners) for cache in paged
    )


def texts(d: Decoder, seed: int) -> list[Continuation]:
    """Texts to be scored."""
    draw = random.Random(seed)
    return [
        Continuation(d.contexts(e.prompt), tuple(draw.randrange(3, 259) for _ in range(draw.randint(1, 9))))
        for e in ragged(5, seed)
        for _ in range(2)
    ]


def answers(d: Decoder, s: Sampling, seed: int) -> Any:
    """What a stream gives, and the log-probabilities of texts."""
    said = {where: c.token_ids for where, c in by_id(list(d.stream(ragged(5, seed), s))).items()}
    alphas = [parse_alpha(1)]
    return said, [f.logprobs.tolist() for f in likelihoods(d.ensemble, texts(d, seed), alphas, tokens=40)]


def abandon(d: Decoder, s: Sampling, how: str, after: int, seed: int) -> Iterator[object]:
    """Begin a stream and leave it in one of many ways. -> what keeps it alive."""
    heard = 0

    def hear(*_: object) -> None:
        nonlocal heard
        heard += 1
        if how == "raise" and heard > after:
            raise Wrong
        if how == "interrupt" and heard > after:
            raise KeyboardInterrupt
        if how == "cancel" and heard % (after + 1) == 0:
            d.cancel(str(heard % 7))

    stream = d.stream(ragged(7, seed), s, on_text=hear)
    with suppress(Wrong, KeyboardInterrupt):
        for number, completion in enumerate(stream):
            if how == "cancel":
                d.cancel(str((number + after) % 7), None if number % 2 else 0)
            if number < after % 7:
                continue
            if how == "close":
                stream.close()  # type: ignore[attr-defined]
            if how == "throw":
                stream.throw(Wrong())  # type: ignore[attr-defined]
            if how == "hold":
                yield completion
                break
            if how == "score":
                scores = likelihoods(d.ensemble, texts(d, seed), [parse_alpha(1)], positions=9)
                list(islice(scores, after + 1))  # one that was never begun takes no rows from anybody
                break
    yield stream


@pytest.mark.thorough
@settings(
    max_examples=tries(6, 25), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    way=st.sampled_from(sorted(WAYS)),
    layout=st.sampled_from(["slots", "pages", "device"]),
    hows=st.lists(
        st.sampled_from(["raise", "interrupt", "cancel", "close", "throw", "hold", "score"]),
        min_size=1,
        max_size=3,
    ),
    after=st.integers(0, 40),
    batch=st.sampled_from([1, 3, 6]),
    pool=st.sampled_from([90, 400]),
    seed=st.integers(0, 5),
)
def test_nothing_is_left_behind(
    trio: System, way: str, layout: str, hows: list[str], after: int, batch: int, pool: int, seed: int
) -> None:
    speculation, s = WAYS[way]
    with pytest.MonkeyPatch.context() as patch:
        if layout == "pages":
            use_pages(patch)
        if layout == "device":
            as_on_a_device(patch)

        def fresh() -> Decoder:
            return decoder(
                trio, batch=batch, kv_memory=kv_bytes(decoder(trio), pool), speculation=speculation
            )

        want, d, kept = answers(fresh(), s, seed), fresh(), list[object]()
        for how in hows:
            kept += abandon(d, s, how, after, seed)
            if how not in ("hold",):
                assert empty(d), how
        assert answers(d, s, seed) == want
        assert empty(d)


@pytest.mark.parametrize("layout", ["slots", "pages", "device"])
@pytest.mark.parametrize("way", sorted(WAYS))
def test_others_go_on_when_one_is_cancelled(
    trio: System, way: str, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the callback, between two completions, while it waits: the others' tokens stay what they were."""
    {"slots": lambda _: None, "pages": use_pages, "device": as_on_a_device}[layout](monkeypatch)
    speculation, s = WAYS[way]
    want = by_id(list(decoder(trio, speculation=speculation).stream(ragged(8, 4), s)))
    d, heard = decoder(trio, batch=3, speculation=speculation), dict[str, int]()
    done: dict[tuple[str, int], Any] = {}

    def hear(name: str, sample: int, piece: str) -> None:
        heard[name] = heard.get(name, 0) + 1
        if name == "1" and heard[name] == 3:
            assert d.cancel("1") and not d.cancel("1")  # its own, in the middle of a step
        if name == "0" and heard[name] == 2:
            assert d.cancel("7")  # which waits

    for completion in d.stream(ragged(8, 4), s, on_text=hear):
        done[completion.example_id, completion.sample] = completion.token_ids
        d.cancel("5")
    gone = {"1", "5", "7"}
    assert {name for name, _ in done} <= {name for name, _ in want} - gone | {"5"}
    assert {where for where in want if where[0] not in gone} <= set(done)
    assert all(want[where].token_ids == tokens for where, tokens in done.items())
    assert heard["1"] == 3 and "7" not in heard and empty(d) and not d.cancel("0")


def test_a_cancelled_sequence_gives_its_room_at_once(trio: System, layout: str) -> None:
    d = decoder(trio, speculation=Speculation(k=0))
    engine = Engine(d.ensemble, max_rows=2)
    tickets = [engine.submit(Request({n: (1, 40 + i) for n in d.loaded}, i, 9, tag=i)) for i in range(3)]
    engine.step(), engine.step()
    assert [row.request.tag for row in engine.scheduler.rows] == [0, 1]
    assert engine.cancel(tickets[0]) and not engine.cancel(tickets[0])
    assert all(len(runner.rows.lengths) == 1 for runner in d.ensemble.runners.values())
    ended = []
    while engine.busy:
        ended += engine.step()
    assert sorted(r.request.tag for r in ended) == [1, 2]  # type: ignore[type-var]
    assert not engine.cancel(tickets[1]) and empty(d)


def test_a_stream_that_lost_its_models_says_so(trio: System) -> None:
    """The newest one has them; an older one that is read on must not end as if it were complete."""
    d = decoder(trio, batch=2)
    old = d.stream(ragged(6), Sampling(max_new_tokens=5))
    next(old)
    assert len(list(d.stream(ragged(3), Sampling(max_new_tokens=5)))) == 3
    with pytest.raises(RuntimeError, match="another one was started on the same models"):
        list(old)
    assert empty(d)


def test_a_callback_cannot_start_another_stream(trio: System) -> None:
    d = decoder(trio)

    def hear(*_: object) -> None:
        list(d.stream(ragged(1), Sampling(max_new_tokens=2)))

    with pytest.raises(RuntimeError, match="a callback of a stream cannot start another"):
        list(d.stream(ragged(2), Sampling(max_new_tokens=5), on_text=hear))
    assert empty(d)


def failing(calls: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which has no memory left after so many calls."""
    count = 0

    def call(*parts: Any, **named: Any) -> Any:
        nonlocal count
        count += 1
        if count > calls:
            raise MemoryError
        return function(*parts, **named)

    return call


@pytest.mark.parametrize("calls", [0, 1, 3, 6])
def test_memory_that_runs_out_amid_a_step(
    trio: System, layout: str, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some models have seen the step's tokens then and others not."""
    d, s = decoder(trio, speculation=Speculation(k=2)), Sampling(max_new_tokens=6)
    want = answers(decoder(trio, speculation=Speculation(k=2)), s, 1)
    for run in (
        lambda: list(d.stream(ragged(4), s)),
        lambda: list(likelihoods(d.ensemble, texts(d, 1), [parse_alpha(1)], positions=9)),
    ):
        with monkeypatch.context() as patch, pytest.raises(MemoryError):
            runner: Any = d.ensemble.runners["antiexpert"]
            patch.setattr(runner, "forward", failing(calls, runner.forward))
            run()
        assert empty(d)
    assert answers(d, s, 1) == want
