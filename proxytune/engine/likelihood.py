"""Log-probabilities of given continuations, under one model or the proxy, for many alphas from one pass of
forwards.

A context's KV is computed once for all its continuations. Alpha meets the logits after the forwards, so a
further alpha costs a sum and a log-sum-exp. Vocabulary-sized tensors exist for one batch of positions at a
time."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from proxytune.config import AlphaSchedule
from proxytune.engine.ensemble import Ensemble
from proxytune.engine.logits import found_probability, largest
from proxytune.engine.request import Segment, Work
from proxytune.engine.runners.runner import Runner
from proxytune.engine.token_views import ranked_tokens
from proxytune.errors import UserError

POSITIONS = 1024
"""Positions whose logits exist at the same time."""
TOKENS = 2048
"""Tokens of contexts per forward, and about as many per batch."""
WORTH_SHARING = 16
"""Tokens with which all contexts of a batch begin that are worth a forward of their own."""


@dataclass(frozen=True)
class Continuation:
    """Text to be scored: contexts per model (in its own ids), and what follows (in the base's ids)."""

    contexts: Mapping[str, tuple[int, ...]]
    ids: tuple[int, ...]
    tag: object = None


@dataclass(frozen=True)
class Likelihood:
    """How probable every token of a continuation is."""

    continuation: Continuation
    logprobs: Tensor  # [alphas, tokens], natural logarithm, before bans and warping; NaN for broken logits
    greedy: Tensor  # [alphas] bool: whether greedy decoding would give exactly this
    ranked: Tensor  # [alphas, tokens, K] the K most probable tokens in each place, the first of them first
    ranked_logprobs: Tensor  # [alphas, tokens, K] float64


def likelihoods(
    ensemble: Ensemble,
    items: Sequence[Continuation],
    alphas: Sequence[AlphaSchedule],
    *,
    positions: int = POSITIONS,
    tokens: int = TOKENS,
    ranked: int = 0,
) -> Iterator[Likelihood]:
    """Score every continuation under every alpha, in the order given; equal contexts among neighbours, and
    what all of them begin with, are computed once. `ranked` is K, cut to the vocabulary.

    Raises UserError if a context window or KV pool cannot hold an item.
    """
    measured = [Measured.of(ensemble, item) for item in items]
    for item in measured:
        _check(ensemble, item)
    start = 0
    while start < len(measured):
        ensemble.claim(None)  # before it is asked what fits
        batch = _batch(ensemble, measured, start, positions, tokens)
        start += len(batch)
        try:
            found = list(_score(ensemble, batch, Scoring(alphas, positions, tokens, ranked)))
        finally:
            ensemble.clear_caches()
        yield from found


@dataclass(frozen=True)
class Measured:
    """A continuation as every model is fed it."""

    item: Continuation
    fed: Mapping[str, list[int]]
    """After the context but for the last id; the last token is only predicted."""
    ends: Mapping[str, list[int]]
    """Where in it logits are wanted: those after the context's last id are for the first token, and so on."""
    lengths: Mapping[str, int]
    """Tokens in the KV cache."""

    @classmethod
    def of(cls, ensemble: Ensemble, item: Continuation) -> Measured:
        fed, ends, lengths = {}, {}, {}
        for name, runner in ensemble.runners.items():
            fed[name], ends[name] = _fed(runner, item.ids)
            lengths[name] = len(item.contexts[name]) + len(fed[name])
        return cls(item, fed, ends, lengths)


def _fed(runner: Runner, tokens: Sequence[int]) -> tuple[list[int], list[int]]:
    """What a model is fed of these tokens of the base, and after how many of its ids each is predicted."""
    ids: list[int] = []
    ends = [0]
    for token in tokens[:-1]:
        ids += runner.alignment.spell(token)
        ends.append(len(ids))
    return ids, ends


def _check(ensemble: Ensemble, measured: Measured) -> None:
    item = measured.item
    if not item.ids:
        raise UserError(f"the continuation of {item.tag!r} is empty")
    for name, runner in ensemble.runners.items():
        if not item.contexts[name]:
            raise UserError(f"the context of {item.tag!r} is empty for the {name}")
        need = measured.lengths[name]
        if need > runner.window:
            raise UserError(
                f"{item.tag!r} has {need} tokens for the {name}, whose context window is {runner.window}"
            )
        if need > runner.rows.capacity:
            raise UserError(
                f"{item.tag!r} has {need} tokens for the {name}, but its KV pool holds "
                f"{runner.rows.capacity}: raise --kv-memory"
            )


def _batch(
    ensemble: Ensemble, items: Sequence[Measured], start: int, positions: int, tokens: int
) -> Sequence[Measured]:
    """As many items from `start` on as keep logits, tokens of contexts and every KV pool within bounds, one
    at least."""
    end, logits, fed = start, 0, 0
    before: Continuation | None = None
    while end < len(items):
        item = items[end].item
        logits += len(item.ids)
        fed += max(_new_tokens(before, item, name) for name in ensemble.runners)
        if end > start and (logits > positions or fed > tokens):
            break
        before, end = item, end + 1

    def fits(count: int) -> bool:
        return all(
            runner.rows.fits([item.lengths[name] for item in items[start : start + count]])
            for name, runner in ensemble.runners.items()
        )

    most = end - start
    if not fits(most):  # fewer rows need less: the largest number that fits
        most = bisect_left(range(1, most), True, key=lambda count: not fits(count + 1)) + 1
    return items[start : start + most]


def _new_tokens(before: Continuation | None, item: Continuation, name: str) -> int:
    """Tokens of a context that are not computed for the item before it."""
    if before is None:
        return len(item.contexts[name])
    shared = same_start((before.contexts[name], item.contexts[name]))
    whole = len(item.contexts[name])
    return whole - shared if shared == whole or shared >= WORTH_SHARING else whole


def same_start(sequences: Sequence[tuple[int, ...]]) -> int:
    """How many ids all sequences begin with."""
    first, last = min(sequences), max(sequences)  # all others lie between them
    return next(
        (at for at, pair in enumerate(zip(first, last, strict=False)) if pair[0] != pair[1]),
        min(len(first), len(last)),
    )


@dataclass(frozen=True)
class Scoring:
    """How continuations are scored."""

    alphas: Sequence[AlphaSchedule]
    positions: int
    """Positions whose logits exist at the same time."""
    tokens: int
    """Of a forward."""
    ranked: int


def _score(ensemble: Ensemble, batch: Sequence[Measured], how: Scoring) -> Iterator[Likelihood]:
    """One batch in empty caches: prefill every context once, feed the continuations, combine per alpha."""
    rows = {name: _prefill(runner, name, batch, how.tokens) for name, runner in ensemble.runners.items()}
    if len(batch) > 1 or len(batch[0].item.ids) <= how.positions:
        yield from _whole(ensemble, batch, rows, how)
    else:
        yield _in_pieces(ensemble, batch[0].item, how)


def _prefill(runner: Runner, name: str, batch: Sequence[Measured], tokens: int) -> list[int]:
    """A row for every item that has its context but for the last id. -> the rows, by item.

    Contexts that differ get the first rows; the items that have the context of an earlier one fork its row.
    What all contexts begin with is computed in the first of them, and forked too."""
    contexts = [measured.item.contexts[name] for measured in batch]
    first = dict.fromkeys(contexts)  # distinct, in order
    pending = [context[:-1] for context in first]
    shared = same_start(pending) if len(pending) > 1 else 0
    shared = shared if shared >= WORTH_SHARING else 0
    runner.rows.admit()
    if shared:
        _feed(runner, [(0, pending[0][:shared])], tokens)
    for _ in pending[1:]:
        runner.rows.admit(0, shared) if shared else runner.rows.admit()
    _feed(runner, [(row, context[shared:]) for row, context in enumerate(pending)], tokens)
    place, rows = {context: row for row, context in enumerate(first)}, list[int]()
    taken = set[int]()
    for context in contexts:
        source = place[context]
        if source in taken:
            runner.rows.admit(source, len(context) - 1)
            rows.append(len(runner.rows.lengths) - 1)
        else:
            taken.add(source)
            rows.append(source)
    lengths = list(runner.rows.lengths)
    for row, measured in zip(rows, batch, strict=True):
        lengths[row] = measured.lengths[name]
    runner.rows.reserve(lengths)
    return rows


def _feed(runner: Runner, parts: Sequence[tuple[int, Sequence[int]]], tokens: int) -> None:
    """Feed these ids to rows, ascending, as many tokens in a forward as are allowed."""
    lengths = list(runner.rows.lengths)
    for row, ids in parts:
        lengths[row] += len(ids)
    runner.rows.reserve(lengths)
    segments, room = list[Segment](), tokens
    for row, ids in parts:
        at = 0
        while at < len(ids):
            piece = tuple(ids[at : at + room])
            segments.append(Segment(row, piece))
            at, room = at + len(piece), room - len(piece)
            if room == 0:
                runner.forward(Work(segments, []))
                segments, room = [], tokens
    if segments:
        runner.forward(Work(segments, []))


def _whole(
    ensemble: Ensemble,
    batch: Sequence[Measured],
    rows: Mapping[str, Sequence[int]],
    how: Scoring,
) -> Iterator[Likelihood]:
    logits = {name: _continued(runner, name, batch, rows[name]) for name, runner in ensemble.runners.items()}
    targets = [token for measured in batch for token in measured.item.ids]
    offsets = [position for measured in batch for position in range(len(measured.item.ids))]
    logprobs, greedy, *ranked = _under_alphas(ensemble, logits, targets, offsets, how)
    start = 0
    for measured in batch:
        mine = slice(start, start + len(measured.item.ids))
        best = (found[:, mine] for found in ranked)
        yield Likelihood(measured.item, logprobs[:, mine], greedy[:, mine].all(1), *best)
        start = mine.stop


def _continued(runner: Runner, name: str, batch: Sequence[Measured], rows: Sequence[int]) -> Tensor:
    """Feed the continuations to their rows, which a forward takes in ascending order. -> logits [positions of
    all items, V], item by item."""
    order = sorted(range(len(batch)), key=rows.__getitem__)
    segments, keep, start = list[Segment](), list[int](), 0
    places = list[tuple[int, int]]()  # item, and where its logits begin
    for index in order:
        measured = batch[index]
        ids = (measured.item.contexts[name][-1], *measured.fed[name])
        segments.append(Segment(rows[index], ids))
        places.append((index, len(keep)))
        keep += [start + end for end in measured.ends[name]]
        start += len(ids)
    logits = runner.forward(Work(segments, keep))
    if order == list(range(len(batch))):
        return logits
    by_item = [
        at for index, first in sorted(places) for at in range(first, first + len(batch[index].item.ids))
    ]
    return logits[torch.tensor(by_item, device=logits.device)]


def _in_pieces(ensemble: Ensemble, item: Continuation, how: Scoring) -> Likelihood:
    """One continuation whose logits would be too many at once."""
    parts = []
    for start in range(0, len(item.ids), how.positions):
        piece = item.ids[start : start + how.positions]
        logits = {}
        for name, runner in ensemble.runners.items():
            before = item.contexts[name][-1:] if start == 0 else runner.alignment.spell(item.ids[start - 1])
            ids, ends = _fed(runner, piece)
            keep = [len(before) - 1 + end for end in ends]
            logits[name] = runner.forward(Work([Segment(0, (*before, *ids))], keep))
        offsets = list(range(start, start + len(piece)))
        parts.append(_under_alphas(ensemble, logits, list(piece), offsets, how))
    logprobs, greedy, *ranked = (torch.cat(tensors, 1) for tensors in zip(*parts, strict=True))
    return Likelihood(item, logprobs, greedy.all(1), *ranked)


def _under_alphas(
    ensemble: Ensemble,
    logits: Mapping[str, Tensor],
    targets: Sequence[int],
    offsets: Sequence[int],
    how: Scoring,
) -> tuple[Tensor, ...]:
    """Log-probability of every target, NaN where the logits are no distribution, and whether it is the first
    choice: two [alphas, tokens]. Then the most probable tokens, and their log-probabilities: two [alphas,
    tokens, K]."""
    device = logits[ensemble.target].device
    tokens = torch.tensor(targets, device=device)
    logprobs, greedy, ranked = [], [], []
    for schedule in how.alphas:
        strength = torch.tensor([schedule.at(at) for at in offsets], dtype=torch.float64, device=device)
        combined = ensemble.combine(logits, strength)
        logprobs.append(found_probability(combined, tokens))
        greedy.append(largest(combined) == tokens)
        ranked.append(ranked_tokens(combined, how.ranked))
    best = (torch.stack(found) for found in zip(*ranked, strict=True))
    return torch.stack(logprobs), torch.stack(greedy), *best
