"""An open batch: responses that come and go give what they give alone, and leave nothing behind."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import pytest
import torch

from proxytune.config import Sampling, System, parse_alpha
from proxytune.decoding.open_batch import Asked, OpenBatch, Piece
from proxytune.engine.token_views import TokenViews, ranked_tokens
from tests.support.decoders import decoder, example
from tests.support.on_device import as_on_a_device, drafting

TEXTS = ("abc", "one two three four", "x", "what is 2 + 3?")
SAMPLINGS = (
    Sampling(max_new_tokens=12),
    Sampling(max_new_tokens=9, temperature=1.0, seed=7),
    Sampling(max_new_tokens=15, temperature=0.8, top_k=9, seed=3, stop=("a", "bc")),
    Sampling(max_new_tokens=6, temperature=1.2, min_p=0.2, min_new_tokens=3),
)
ALPHAS = ("1", "0", "first:3", "0.5")


def asked(batch: OpenBatch, place: int, *, trace: bool = False, whole: bool = False) -> Asked:
    context, alpha = batch.of_prompt(TEXTS[place]), parse_alpha(ALPHAS[place])
    return Asked(context, SAMPLINGS[place], str(place), 0, alpha, trace, whole)


def drained(batch: OpenBatch, pieces: Sequence[Piece] = ()) -> dict[int, list[Piece]]:
    """All pieces by ticket, until nothing is under way."""
    found = defaultdict(list)
    for piece in pieces:
        found[piece.ticket].append(piece)
    while batch.busy:
        for piece in batch.step():
            found[piece.ticket].append(piece)
    return found


@pytest.mark.parametrize("k", [0, 3])
@pytest.mark.parametrize("on_device", [False, True])
def test_responses_that_join_late_are_those_of_a_stream(
    trio: System, monkeypatch: pytest.MonkeyPatch, k: int, on_device: bool
) -> None:
    """Each with its own sampling, alpha, stops and trace, piece by piece and whole, joining while others
    decode: in float64 the text, the tokens and the traces of a decoder that has it alone."""
    if on_device:
        as_on_a_device(monkeypatch)
    d = decoder(trio, speculation=drafting(k))
    expected = [
        next(
            d.stream(
                [example(text, place)], SAMPLINGS[place], alpha=parse_alpha(ALPHAS[place]), trace="tokens"
            )
        )
        for place, text in enumerate(TEXTS)
    ]
    batch, early, place_of = OpenBatch(d, ranked=4), list[Piece](), dict[int, int]()
    for place in range(len(TEXTS)):
        place_of[batch.submit(asked(batch, place, trace=place % 2 == 0, whole=place > 1))] = place
        early += batch.step()
    for ticket, pieces in drained(batch, early).items():
        want, place = expected[place_of[ticket]], place_of[ticket]
        assert "".join(piece.text for piece in pieces) == want.text
        assert pieces[-1].finish_reason == want.finish_reason and pieces[-1].generated == len(want.token_ids)
        assert (len(pieces) == 1) == (place > 1)
        tokens = [token for piece in pieces for token in piece.tokens]
        assert [token.id for token in tokens] == list(want.token_ids)[: len(tokens)]
        if place % 2:
            assert not tokens
        elif want.finish_reason != "stop":
            assert len(tokens) == len(want.token_ids)
        for token, seen in zip(tokens, want.trace, strict=False):
            assert dict(token.probability) == pytest.approx(seen.probability, rel=1e-9)
            assert token.alpha == seen.alpha and token.ranked.keys() == seen.probability.keys()
            assert all(len(ranked) == 4 for ranked in token.ranked.values())
    assert not any(tokens for _, tokens, _ in batch.kv())


def test_cancelled_responses_leave_nothing(trio: System) -> None:
    d = decoder(trio)
    batch = OpenBatch(d)
    [expected] = d.stream([example(TEXTS[0], 0)], SAMPLINGS[0], alpha=parse_alpha("1"))
    batch = OpenBatch(d)
    kept, gone, waiting = (
        batch.submit(asked(batch, 0)),
        batch.submit(asked(batch, 1)),
        batch.submit(asked(batch, 3)),
    )
    assert batch.cancel(waiting) and not batch.cancel(waiting)
    pieces = batch.step() + batch.step()
    assert batch.cancel(gone) and batch.running == 1
    found = drained(batch, pieces)
    assert "".join(piece.text for piece in found[kept]) == expected.text
    assert all(piece.finish_reason is None for piece in found[gone])
    assert batch.running == batch.waiting == 0 and not any(tokens for _, tokens, _ in batch.kv())


def test_scores_beside_a_batch_change_nothing(trio: System) -> None:
    """A text is scored in the middle of a response, which goes on as before; its figures are those of the
    decoder."""
    d = decoder(trio)
    [expected] = d.stream([example(TEXTS[0], 0)], SAMPLINGS[0], alpha=parse_alpha("1"))
    ids = tuple(d.tokenizer.encode("hello there"))
    [logprob] = d.likelihoods([example("h", 0)], lambda _: ["ello there"], alpha=parse_alpha("0.5"))
    batch = OpenBatch(d)
    ticket = batch.submit(asked(batch, 0))
    pieces = batch.step()
    scored = batch.score(ids, parse_alpha("0.5"), 3)
    found = drained(batch, pieces)
    assert "".join(piece.text for piece in found[ticket]) == expected.text
    assert len(scored.logprobs) == len(ids) - 1 and len(scored.ranked) == len(ids)
    assert sum(scored.logprobs[1:]) == pytest.approx(logprob.logprob, abs=1e-9)
    for token, own, ranked in zip(ids[1:], scored.logprobs, scored.ranked, strict=False):
        assert dict(ranked).get(token, own) == pytest.approx(own, abs=1e-12) and own <= ranked[0][1] + 1e-12


def test_ranked_tokens_are_packed_and_unpacked() -> None:
    logits = {"one": torch.randn(3, 11), "two": torch.randn(3, 11)}
    tokens = torch.tensor([1, 5, 10])
    views = TokenViews.of(logits, {}, tokens, lambda values: values.argmax(-1), 4)
    again = TokenViews.unpacked(views.packed(), 2, 4)
    assert all(torch.equal(one, other) for one, other in zip(views, again, strict=True))
    trace, *_ = again.traces(("one", "two"), (), tokens.tolist(), [0.5] * 3)
    expected = logits["one"][0].log_softmax(-1).sort(descending=True)
    assert [token for token, _ in trace.ranked["one"]] == expected.indices[:4].tolist()
    assert [p for _, p in trace.ranked["one"]] == pytest.approx(expected.values[:4].tolist(), abs=1e-6)
    ids, logprobs = ranked_tokens(logits["one"], 0)
    assert ids.shape == logprobs.shape == (3, 0) and ranked_tokens(logits["one"], 99)[0].shape == (3, 11)
