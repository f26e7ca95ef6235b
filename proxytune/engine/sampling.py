"""Chooses the token at a position of a response: bans, forced tokens, and the choice from logits.

Noise belongs to a position, not to a step: the expert's drafts and the proxy's own choice for one position
draw the same noise. So a draft that the proxy agrees with is the token that plain decoding gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from proxytune.engine.logits import SamplingParams, ban, choose
from proxytune.engine.request import Row


class RowPosition(NamedTuple):
    """A position of a response, counted from 0, whose token is wanted."""

    row: Row
    position: int


Pick = Callable[[Tensor, Sequence[RowPosition]], Tensor]
"""Logits [P, V] and the P positions that they belong to -> tokens [P]."""
Propose = Callable[[Tensor, Tensor], Tensor]
"""Rows' keys [R] and response positions [R, 1] -> tokens [R, 1], by operations that a CUDA graph can hold."""


def banned(positions: Sequence[RowPosition]) -> tuple[list[int], list[int]]:
    """Pairs (index of a position, token) that may not be chosen: bans, and end-of-sequence before the minimum
    length."""
    where: list[int] = []
    ids: list[int] = []
    for index, (row, position) in enumerate(positions):
        request = row.request
        early = position < request.sampling.min_new_tokens
        if not (request.banned or early or (position == 0 and request.banned_first)):
            continue
        bans = set(request.banned)
        if position == 0:
            bans |= request.banned_first
        if early:
            bans |= request.eos
        where += [index] * len(bans)
        ids += sorted(bans)
    return where, ids


def pick(logits: Tensor, positions: Sequence[RowPosition]) -> Tensor:
    """The tokens [P] at these positions, given logits [P, V]."""
    device, requests = logits.device, [at.row.request for at in positions]
    where, ids = banned(positions)
    if where:
        logits = ban(logits, torch.tensor(where, device=device), torch.tensor(ids, device=device))
    tokens = choose(logits, _params(positions, device))
    for index, (request, at) in enumerate(zip(requests, positions, strict=True)):
        if at.position < len(request.forced):
            tokens[index] = request.forced[at.position]
    return tokens


def _params(positions: Sequence[RowPosition], device: torch.device) -> SamplingParams | None:
    """How the sampled positions choose; None if all are greedy."""
    sampled = [index for index, at in enumerate(positions) if at.row.request.sampling.temperature > 0]
    if not sampled:
        return None
    requests = [positions[index].row.request for index in sampled]
    wide = torch.float64
    return SamplingParams(
        rows=torch.tensor(sampled, device=device),
        temperature=torch.tensor([r.sampling.temperature for r in requests], dtype=wide, device=device),
        top_k=torch.tensor([r.sampling.top_k for r in requests], device=device),
        top_p=torch.tensor([r.sampling.top_p for r in requests], dtype=wide, device=device),
        min_p=torch.tensor([r.sampling.min_p for r in requests], dtype=wide, device=device),
        keys=torch.tensor([r.key for r in requests], device=device),
        positions=torch.tensor([positions[index].position for index in sampled], device=device),
    )
