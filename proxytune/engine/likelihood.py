"""Log-probabilities of given continuations, under one model or the proxy, for many alphas from one pass of
forwards.

A context's KV is computed once for all its continuations. Alpha meets the logits after the forwards, so a
further alpha costs a sum and a log-sum-exp. Vocabulary-sized tensors exist for one batch of positions at a
time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from proxytune.config import AlphaSchedule
from proxytune.engine.ensemble import Ensemble
from proxytune.engine.logits import largest, log_probability
from proxytune.engine.request import Segment, Work
from proxytune.engine.runners.runner import Runner
from proxytune.errors import UserError

POSITIONS = 1024
"""Positions whose logits exist at the same time."""


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
    logprobs: Tensor  # [alphas, tokens], natural logarithm, before bans and warping
    greedy: Tensor  # [alphas] bool: whether greedy decoding would give exactly this


def likelihoods(
    ensemble: Ensemble,
    items: Sequence[Continuation],
    alphas: Sequence[AlphaSchedule],
    *,
    positions: int = POSITIONS,
) -> Iterator[Likelihood]:
    """Score every continuation under every alpha, in the order given; neighbours with equal contexts share
    them.

    Raises UserError if a context window or KV pool cannot hold an item.
    """
    for item in items:
        _check(ensemble, item)
    batch: list[Continuation] = []
    for item in items:
        if batch and not _joins(ensemble, batch, item, positions):
            yield from _score(ensemble, batch, alphas, positions)
            batch = []
        batch.append(item)
    if batch:
        yield from _score(ensemble, batch, alphas, positions)


def _fed(runner: Runner, item: Continuation) -> tuple[list[int], list[int]]:
    """What a model is fed after its context but for the last id, and where in it logits are wanted.

    Logits after the context's last id are for the first token, and so on; the last token is only predicted.
    """
    ids: list[int] = []
    ends = [0]
    for token in item.ids[:-1]:
        ids += runner.alignment.spell(token)
        ends.append(len(ids))
    return ids, ends


def _lengths(ensemble: Ensemble, name: str, batch: Sequence[Continuation]) -> list[int]:
    runner = ensemble.runners[name]
    return [len(item.contexts[name]) + len(_fed(runner, item)[0]) for item in batch]


def _check(ensemble: Ensemble, item: Continuation) -> None:
    if not item.ids:
        raise UserError(f"the continuation of {item.tag!r} is empty")
    for name, runner in ensemble.runners.items():
        if not item.contexts[name]:
            raise UserError(f"the context of {item.tag!r} is empty for the {name}")
        need = _lengths(ensemble, name, [item])[0]
        if need > runner.window:
            raise UserError(
                f"{item.tag!r} has {need} tokens for the {name}, whose context window is {runner.window}"
            )
        if need > runner.rows.capacity:
            raise UserError(
                f"{item.tag!r} has {need} tokens for the {name}, but its KV pool holds "
                f"{runner.rows.capacity}: raise --kv-memory"
            )


def _joins(ensemble: Ensemble, batch: Sequence[Continuation], item: Continuation, positions: int) -> bool:
    """Whether one more item keeps the logits and every KV pool within bounds."""
    joined = [*batch, item]
    if sum(len(i.ids) for i in joined) > positions:
        return False
    return all(r.rows.fits(_lengths(ensemble, name, joined)) for name, r in ensemble.runners.items())


def _score(
    ensemble: Ensemble, batch: Sequence[Continuation], alphas: Sequence[AlphaSchedule], positions: int
) -> Iterator[Likelihood]:
    """One batch: prefill every context once, feed the continuations, combine per alpha."""
    for name, runner in ensemble.runners.items():
        _prefill(runner, name, batch, positions)
        runner.rows.reserve(_lengths(ensemble, name, batch))
    try:
        if len(batch) > 1 or len(batch[0].ids) <= positions:
            yield from _whole(ensemble, batch, alphas)
        else:
            yield _in_pieces(ensemble, batch[0], alphas, positions)
    finally:
        for runner in ensemble.runners.values():
            while runner.rows.lengths:
                runner.rows.drop(len(runner.rows.lengths) - 1)


def _prefill(runner: Runner, name: str, batch: Sequence[Continuation], chunk: int) -> None:
    """One row per item with its context but for the last id; items with the context of an earlier one fork
    its row."""
    first: dict[tuple[int, ...], int] = {}
    for row, item in enumerate(batch):
        context = item.contexts[name]
        source = first.setdefault(context, row)
        if source != row:
            runner.rows.admit(source, len(context) - 1)
            continue
        runner.rows.admit()
        for start in range(0, len(context) - 1, chunk):
            piece = context[start : min(start + chunk, len(context) - 1)]
            lengths = list(runner.rows.lengths)
            lengths[row] += len(piece)
            runner.rows.reserve(lengths)
            runner.forward(Work([Segment(row, piece)], []))


def _whole(
    ensemble: Ensemble, batch: Sequence[Continuation], alphas: Sequence[AlphaSchedule]
) -> Iterator[Likelihood]:
    logits = {}
    for name, runner in ensemble.runners.items():
        segments, keep, start = [], [], 0
        for row, item in enumerate(batch):
            ids, ends = _fed(runner, item)
            segments.append(Segment(row, (item.contexts[name][-1], *ids)))
            keep += [start + end for end in ends]
            start += 1 + len(ids)
        logits[name] = runner.forward(Work(segments, keep))
    targets = [token for item in batch for token in item.ids]
    offsets = [position for item in batch for position in range(len(item.ids))]
    logprobs, greedy = _under_alphas(ensemble, logits, targets, offsets, alphas)
    start = 0
    for item in batch:
        mine = slice(start, start + len(item.ids))
        yield Likelihood(item, logprobs[:, mine], greedy[:, mine].all(1))
        start = mine.stop


def _in_pieces(
    ensemble: Ensemble, item: Continuation, alphas: Sequence[AlphaSchedule], positions: int
) -> Likelihood:
    """One continuation whose logits would be too many at once."""
    parts = []
    for start in range(0, len(item.ids), positions):
        piece = item.ids[start : start + positions]
        logits = {}
        for name, runner in ensemble.runners.items():
            before = item.contexts[name][-1:] if start == 0 else runner.alignment.spell(item.ids[start - 1])
            ids, ends = _fed(runner, Continuation(item.contexts, piece))
            keep = [len(before) - 1 + end for end in ends]
            logits[name] = runner.forward(Work([Segment(0, (*before, *ids))], keep))
        offsets = list(range(start, start + len(piece)))
        parts.append(_under_alphas(ensemble, logits, list(piece), offsets, alphas))
    logprobs, greedy = (torch.cat(tensors, 1) for tensors in zip(*parts, strict=True))
    return Likelihood(item, logprobs, greedy.all(1))


def _under_alphas(
    ensemble: Ensemble,
    logits: Mapping[str, Tensor],
    targets: Sequence[int],
    offsets: Sequence[int],
    alphas: Sequence[AlphaSchedule],
) -> tuple[Tensor, Tensor]:
    """Log-probability of every target, and whether it is the first choice: two [alphas, tokens]."""
    device = logits[ensemble.target].device
    tokens = torch.tensor(targets, device=device)
    logprobs, greedy = [], []
    for schedule in alphas:
        strength = torch.tensor([schedule.at(at) for at in offsets], dtype=torch.float64, device=device)
        combined = ensemble.combine(logits, strength)
        logprobs.append(log_probability(combined, tokens))
        greedy.append(largest(combined) == tokens)
    return torch.stack(logprobs), torch.stack(greedy)
