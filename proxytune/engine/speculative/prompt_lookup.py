"""Prompt lookup (n-gram drafts), on the host and on the device.

Where the last few tokens of a row occurred before, what followed them then is a guess at what follows now
(Saxena 2023, "Prompt Lookup Decoding"; performance model: a step costs no forward more than plain decoding).
The latest occurrence counts. A continuation that runs into the end of the row is repeated from there on: that
is what a row in a loop will generate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

NGRAM = 3
"""How many tokens must have occurred before for what followed them to be a draft."""


@dataclass
class PromptLookup:
    """Where the n-grams of a growing sequence of ids were last followed by something."""

    ids: list[int] = field(default_factory=list)
    after: dict[tuple[int, ...], int] = field(default_factory=dict)

    def extend(self, ids: Sequence[int]) -> None:
        """Append ids; an n-gram is known once something follows it."""
        for token in ids:
            if len(self.ids) >= NGRAM:
                self.after[tuple(self.ids[-NGRAM:])] = len(self.ids)
            self.ids.append(token)

    def continuation(self, count: int) -> list[int]:
        """`count` ids that followed the last n-gram when it occurred before; none if it did not."""
        at = self.after.get(tuple(self.ids[-NGRAM:]))
        if at is None:
            return []
        period = len(self.ids) - at
        return [self.ids[at + ahead % period] for ahead in range(count)]


def continuations(history: Tensor, known: Tensor, count: int) -> Tensor:
    """`PromptLookup.continuation` for rows that the host cannot see: ids [R, L > NGRAM], of which known[i]
    count in row i -> [R, count], -1 in rows whose last n-gram is new."""
    places = torch.arange(NGRAM, history.shape[1], device=history.device)  # of what follows an n-gram
    last = (known[:, None] + torch.arange(-NGRAM, 0, device=history.device)).clamp(min=0)
    same = places < known[:, None]  # [R, L - NGRAM]
    for offset, token in enumerate(history.gather(1, last).unbind(1)):
        same &= history[:, offset : offset - NGRAM] == token[:, None]
    at = torch.where(same, places, 0).amax(1, keepdim=True)  # [R, 1]; 0 where there is none
    period = (known[:, None] - at).clamp(min=1)
    ahead = torch.arange(count, device=history.device)
    return history.gather(1, at + ahead % period).masked_fill(at == 0, -1)
