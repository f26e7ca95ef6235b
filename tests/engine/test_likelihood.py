"""Log-probabilities against full forwards without a cache, in float64."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from proxytune.config import System, parse_alpha
from proxytune.decoding.decoder import Decoder
from proxytune.engine.likelihood import Continuation, likelihoods
from proxytune.errors import UserError
from tests.support import oracle, tiny
from tests.support.decoders import decoder, example, kv_bytes, plain, ragged, use_pages
from tests.support.tiny import spec

ALPHAS = [parse_alpha(a) for a in (0, 0.5, 1, 2, "first:2", "linear:0:1:5")]


def items_for(d: Decoder, seed: int = 0) -> list[Continuation]:
    """Contexts with one to four continuations of 1 to 12 tokens."""
    draw = random.Random(seed)
    return [
        Continuation(
            d.contexts(e.prompt), tuple(draw.randrange(3, 259) for _ in range(draw.randint(1, 12))), (e.id, n)
        )
        for e in ragged(6, seed)
        for n in range(draw.randint(1, 4))
    ]


def expected(d: Decoder, item: Continuation, alpha: object) -> tuple[list[float], bool]:
    """Token by token, one full forward per model."""
    schedule = parse_alpha(alpha)
    values, greedy = [], True
    for position, token in enumerate(item.ids):
        views = {
            n: oracle.last_logits(plain(d, n), [*item.contexts[n], *item.ids[:position]]) for n in d.loaded
        }
        z = views[d.target]
        for term in d.ensemble.terms:
            z = z + schedule.at(position) * term.weight * (views[term.expert] - views[term.antiexpert])
        values.append(float(z.log_softmax(-1)[token]))
        greedy &= int(z.argmax()) == token
    return values, greedy


@pytest.mark.parametrize("pages", [False, True])
@pytest.mark.parametrize("positions", [1024, 20, 3])
@pytest.mark.every(6)
def test_all_alphas_from_one_pass(
    trio: System, positions: int, pages: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if pages:
        use_pages(monkeypatch)
    d = decoder(trio)
    items = items_for(d)
    found = list(likelihoods(d.ensemble, items, ALPHAS, positions=positions))
    assert [f.continuation.tag for f in found] == [i.tag for i in items]
    for result in found[:: 1 if positions == 1024 else 4]:
        for row, alpha in enumerate(ALPHAS):
            values, greedy = expected(d, result.continuation, alpha)
            assert result.logprobs[row].tolist() == pytest.approx(values, abs=1e-9)
            assert bool(result.greedy[row]) == greedy
    assert all(not runner.rows.lengths for runner in d.ensemble.runners.values())


def test_a_schedule_goes_on_where_a_text_is_scored_in_pieces(trio: System) -> None:
    """Position 4 of a text has alpha 0 under first:4, also where it is the first of its piece."""
    d = decoder(trio)
    (item,) = items_for(d)[:1]
    item = replace(item, ids=tuple(range(40, 53)))
    (found,) = likelihoods(d.ensemble, [item], [parse_alpha("first:4")], positions=4)
    values, _ = expected(d, item, "first:4")
    assert found.logprobs[0].tolist() == pytest.approx(values, abs=1e-9)


def test_greedy_flag_is_true_for_what_greedy_decoding_says(trio: System) -> None:
    from proxytune.config import Sampling

    d, e = decoder(trio), example("what?")
    response = next(iter(d.stream([e], Sampling(max_new_tokens=6))))
    item = Continuation(d.contexts(e.prompt), response.token_ids)
    result = next(iter(likelihoods(d.ensemble, [item], [parse_alpha(1), parse_alpha(0)])))
    assert result.greedy.tolist() == [True, False]
    assert float(result.logprobs[0].sum()) == pytest.approx(response.logprob, abs=1e-9)


def test_any_role_and_the_slow_path(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "bloom", tiny.build("bloom"))
    d = decoder(System(base=spec(folder)), "base")
    items = items_for(d, 2)
    for item, found in zip(items, likelihoods(d.ensemble, items, ALPHAS[:1]), strict=True):
        # Bloom adds its position bias in float32
        assert found.logprobs[0].tolist() == pytest.approx(expected(d, item, 0)[0], abs=1e-6)


def test_a_small_pool_gives_the_same(trio: System) -> None:
    d = decoder(trio)
    tight = decoder(trio, kv_memory=kv_bytes(d, 60))
    items = items_for(d, 3)
    roomy = torch.cat([f.logprobs for f in likelihoods(d.ensemble, items, ALPHAS)], 1)
    assert torch.allclose(
        torch.cat([f.logprobs for f in likelihoods(tight.ensemble, items, ALPHAS)], 1), roomy
    )


def test_what_does_not_fit_is_refused_with_the_numbers(trio: System) -> None:
    d = decoder(trio, kv_memory=kv_bytes(decoder(trio), 40))
    contexts = d.contexts(example("a" * 30).prompt)
    with pytest.raises(UserError, match="has 50 tokens for the base, but its KV pool holds 40"):
        list(likelihoods(d.ensemble, [Continuation(contexts, (5,) * 20)], ALPHAS))
    with pytest.raises(UserError, match="context window is 256"):
        list(likelihoods(d.ensemble, [Continuation(contexts, (5,) * 300)], ALPHAS))
    with pytest.raises(UserError, match="empty"):
        list(likelihoods(d.ensemble, [Continuation(contexts, ())], ALPHAS))


def primed(d: Decoder, shots: int) -> list[Continuation]:
    """Questions that begin with the same words, two texts each; the third one is asked again later."""
    draw, opener = random.Random(shots), "abc de " * shots
    asked = [example(opener + e.prompt.plain) for e in ragged(6, 7, longest=12)]
    return [
        Continuation(d.contexts(e.prompt), tuple(draw.randrange(3, 259) for _ in range(draw.randint(1, 6))))
        for e in [*asked, asked[2], asked[0]]
        for _ in range(2)
    ]


@pytest.mark.parametrize("tokens", [2048, 90, 7])
@pytest.mark.parametrize("shots", [0, 6])
@pytest.mark.every(3)
def test_contexts_that_begin_alike(trio: System, layout: str, shots: int, tokens: int) -> None:
    d = decoder(trio)
    items = primed(d, shots)
    for item, found in zip(items, likelihoods(d.ensemble, items, ALPHAS[:3], tokens=tokens), strict=True):
        assert found.continuation is item
        for row, alpha in enumerate(ALPHAS[:3]):
            values, greedy = expected(d, item, alpha)
            assert found.logprobs[row].tolist() == pytest.approx(values, abs=1e-9)
            assert bool(found.greedy[row]) == greedy


def test_contexts_that_begin_alike_on_the_slow_path(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "bloom", tiny.build("bloom"))
    d = decoder(System(base=spec(folder)), "base")
    items = primed(d, 6)
    for item, found in zip(items, likelihoods(d.ensemble, items, ALPHAS[:1]), strict=True):
        assert found.logprobs[0].tolist() == pytest.approx(expected(d, item, 0)[0], abs=1e-6)


def test_a_few_forwards_that_read_everything_once(trio: System, monkeypatch: pytest.MonkeyPatch) -> None:
    """60 questions with four texts each: contexts are packed, and what they begin with is read once."""
    d, fed = decoder(trio, "base"), list[list[int]]()
    runner: Any = d.ensemble.runners["base"]
    forward = runner.forward

    def counted(work: Any) -> Any:
        fed.append([len(segment.ids) for segment in work.segments])
        return forward(work)

    monkeypatch.setattr(runner, "forward", counted)
    opener = "abc de " * 10
    asked = [d.contexts(example(opener + e.prompt.plain).prompt) for e in ragged(60, 7, longest=12)]
    items = [Continuation(contexts, (50 + n, 60)) for contexts in asked for n in range(4)]
    assert len(list(likelihoods(d.ensemble, items, ALPHAS[:1]))) == 240
    distinct = {contexts["base"] for contexts in asked}
    shared = 1 + len(opener)
    assert len(fed) == 3  # the opener, the questions, the texts
    assert fed[0] == [shared] and sum(fed[1]) == sum(len(ids) - 1 - shared for ids in distinct)
    assert fed[2] == [2] * 240


def test_batches_are_found_in_linear_time(trio: System, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice the items, twice the work: rows are counted where a pool is asked whether they fit."""

    def rows_asked(count: int) -> int:
        d, asked = decoder(trio, "base"), 0
        rows: Any = d.ensemble.runners["base"].rows
        fits = rows.fits

        def counted(lengths: Any) -> bool:
            nonlocal asked
            asked += len(lengths)
            return bool(fits(lengths))

        with monkeypatch.context() as patch:
            patch.setattr(rows, "fits", counted)
            contexts = d.contexts(example("abc").prompt)
            list(likelihoods(d.ensemble, [Continuation(contexts, (5,))] * count, ALPHAS[:1], positions=4000))
        return asked

    assert rows_asked(600) <= 2.2 * rows_asked(300)
