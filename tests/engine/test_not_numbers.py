"""Logits that are no numbers end one sequence with a reason; the others say what they would have said."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from proxytune.config import Sampling, System, parse_alpha
from proxytune.decoding.decoder import Decoder
from proxytune.engine.attention.attention import cleared
from proxytune.engine.attention.packed import Group
from proxytune.engine.likelihood import Continuation, likelihoods
from proxytune.engine.logits import found_probability
from proxytune.engine.sampling import RowPosition
from proxytune.engine.speculative.drafter import LOOKUP, Speculation
from tests.support.decoders import by_id, decoder, example, ragged, use_pages
from tests.support.on_device import as_on_a_device
from tests.support.tiers import slow

LAYOUTS = ("slots", "slots by torch", "pages", "device")
NAN, INF = float("nan"), float("inf")
BAD = "h"
"""A letter whose embedding is no number."""


@pytest.fixture(params=LAYOUTS)
def anywhere(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every way in which keys and values are kept and seen."""
    if request.param == "slots by torch":
        monkeypatch.setattr("proxytune.engine.attention.attention.takes", lambda query, stored: False)
    {"pages": use_pages, "device": as_on_a_device}.get(request.param, lambda _: None)(monkeypatch)
    return str(request.param)


def bad_token(d: Decoder) -> int:
    """The letter's id."""
    [token] = d.tokenizer.encode(BAD, add_special_tokens=False)
    return int(token)


@contextmanager
def broken(d: Decoder, name: str, value: float = NAN) -> Iterator[None]:
    """A model whose embedding of the letter is no number."""
    weight = d.loaded[name].module.get_input_embeddings().weight
    before = weight[bad_token(d)].clone()
    with torch.no_grad():
        weight[bad_token(d)] = value
    try:
        yield
    finally:
        with torch.no_grad():
            weight[bad_token(d)] = before


def until_bad(d: Decoder, prompt: str, tokens: Sequence[int], reason: str) -> tuple[Sequence[int], str]:
    """What is left of a response where reading the letter ends it."""
    if BAD in prompt:
        return (), "nan"
    at = tokens.index(bad_token(d)) + 1 if bad_token(d) in tokens else len(tokens)
    return (tokens[:at], "nan") if at < len(tokens) else (tokens, reason)


HOW = [
    (Speculation(k=0), {}),
    (Speculation(k=3), {}),
    (Speculation(k=3), {"temperature": 1.2, "n": 2}),
    (Speculation(k=4, drafter=LOOKUP), {"temperature": 1.2, "top_k": 30}),
]


@pytest.mark.parametrize(("speculation", "sampler"), HOW, ids=["plain", "drafts", "drawn", "lookup"])
@pytest.mark.parametrize("name", [slow("base"), "expert", slow("antiexpert")])
@pytest.mark.every(3)
def test_the_rest_of_the_batch_is_unharmed(
    trio: System, anywhere: str, name: str, speculation: Speculation, sampler: dict[str, Any]
) -> None:
    asked, s = ragged(12, 3, longest=14), Sampling(max_new_tokens=14, **sampler)
    d = decoder(trio, batch=5, speculation=speculation)
    want = by_id(list(d.stream(asked, s)))
    prompts = {e.id: e.prompt.plain for e in asked}
    with broken(d, name):
        found = by_id(list(d.stream(asked, s)))
    reasons = {c.finish_reason for c in found.values()}
    assert "nan" in reasons and len(reasons) > 1
    for where, c in found.items():
        clean = want[where]
        assert (c.token_ids, c.finish_reason) == until_bad(
            d, prompts[where[0]], clean.token_ids, clean.finish_reason
        )
        assert c.logprob == c.logprob and (c.fault == "nan") == (c.finish_reason == "nan")
    again = by_id(list(d.stream(asked, s)))  # the caches still hold what was no number
    assert {w: c.token_ids for w, c in again.items()} == {w: c.token_ids for w, c in want.items()}


def test_a_draft_that_is_no_number_harms_nobody(trio: System, anywhere: str) -> None:
    """The drafter proposes a letter everywhere that the proxy may not choose and the base cannot read."""
    s = Sampling(max_new_tokens=10, ban=(BAD,))
    asked = [e for e in ragged(12, 3, longest=14) if BAD not in e.prompt.plain]
    plain = decoder(trio, speculation=Speculation(k=0))
    token = bad_token(plain)

    def draft(logits: Tensor, positions: Sequence[RowPosition]) -> Tensor:
        return torch.full((len(positions),), token)

    def propose(keys: Tensor, positions: Tensor) -> Tensor:
        return torch.full_like(positions, token)

    want = {c.example_id: (c.token_ids, c.finish_reason) for c in plain.stream(asked, s)}
    speculation = Speculation(k=3, lookup=False, pick=draft, propose=propose)
    d = decoder(trio, batch=4, speculation=speculation)
    with broken(d, "base"):
        found = {c.example_id: (c.token_ids, c.finish_reason) for c in d.stream(asked, s)}
    assert found == want and d.stats.drafted > 20 and d.stats.accepted == 0


def test_where_alpha_is_zero_a_broken_expert_is_not_asked(trio: System, anywhere: str) -> None:
    d, s = decoder(trio), Sampling(max_new_tokens=6)
    want = [c.token_ids for c in d.stream([example("he h")], s, alpha=parse_alpha(0))]
    with broken(d, "expert"):
        assert [c.token_ids for c in d.stream([example("he h")], s, alpha=parse_alpha(0))] == want


@pytest.mark.parametrize("value", [NAN, INF])
def test_texts_are_scored_apart(trio: System, anywhere: str, value: float) -> None:
    d = decoder(trio, speculation=Speculation(k=0))
    asked = [e.prompt for e in ragged(9, 3, longest=14)]
    items = [
        Continuation(d.contexts(prompt), (40, 50 + n), (prompt.plain, n)) for prompt in asked for n in (0, 1)
    ]
    want = [f.logprobs.tolist() for f in likelihoods(d.ensemble, items, [parse_alpha(1)])]
    with broken(d, "expert", value):
        found = list(likelihoods(d.ensemble, items, [parse_alpha(1), parse_alpha(0)]))
    harmed = 0
    for item, result, clean in zip(items, found, want, strict=True):
        assert result.logprobs[1].isfinite().all()
        if BAD in item.tag[0]:  # type: ignore[index]
            harmed += 1
            assert result.logprobs[0].isnan().all()
        else:
            assert result.logprobs[0].tolist() == pytest.approx(clean[0], abs=1e-9)
    assert 0 < harmed < len(items)


def test_what_is_no_distribution() -> None:
    logits = torch.tensor(
        [[0.0, 1.0, -INF], [0.0, NAN, 1.0], [0.0, INF, 1.0], [-INF, -INF, -INF], [-INF, 0.0, -INF]]
    )
    found = found_probability(logits, torch.tensor([0, 0, 0, 0, 0]))
    assert found.isnan().tolist() == [False, True, True, True, False]
    assert found[4] == -INF  # a token that cannot come is no fault


def test_what_is_left_behind_a_row_is_cleared() -> None:
    """Where looking at the result would wait for a device."""
    lines = torch.randn(4, 2, 9, 3)
    group = Group(1, rows=[3, 5, 6], starts=[0, 1, 2], lengths=[9, 4, 7])
    found = cleared(lines, group)
    for place, length in ((0, 9), (2, 4), (3, 7)):
        assert torch.equal(found[place, :, :length], lines[place, :, :length])
        assert not found[place, :, length:].any()
    lines[2, :, 4:], lines[1] = NAN, INF
    assert torch.equal(cleared(lines, group)[[0, 2, 3]], found[[0, 2, 3]])
