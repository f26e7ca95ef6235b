"""How one model's vocabulary maps to the base's."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class VocabMap:
    """How one model's vocabulary maps to the base's, by token identity."""

    size: int
    """Size V of the base's vocabulary without padding rows."""
    columns: Tensor | None = None
    """[V] this model's id of every base token (0 where it has none); None where the ids agree."""
    shared: Tensor | None = None
    """[V] bool: tokens that this model knows; None means all."""
    spelled: tuple[tuple[int, ...], ...] | None = None
    """For every base token the ids that say the same here: one where shared, its text's encoding
    elsewhere."""

    def align(self, logits: Tensor) -> Tensor:
        """[K, V of this model] -> [K, V of the base]."""
        if self.columns is None:
            return logits[:, : self.size]
        return logits[:, self.columns.to(logits.device)]

    def on(self, device: torch.device) -> VocabMap:
        """The same with its tensors on a device: copies within a step would wait for it."""
        columns, shared = (None if t is None else t.to(device) for t in (self.columns, self.shared))
        return replace(self, columns=columns, shared=shared)

    @cached_property
    def longest(self) -> int:
        """Most ids that one base token takes here."""
        return 1 if self.spelled is None else max(map(len, self.spelled))

    def spelt_by(self, token: int) -> list[int]:
        """The base tokens that are fed as this one id."""
        if self.columns is None or self.shared is None:
            return [token]
        found: list[int] = ((self.columns == token) & self.shared).nonzero().flatten().tolist()
        return found

    def spell(self, token: int) -> tuple[int, ...]:
        """The ids to feed this model after base token `token`."""
        return (token,) if self.spelled is None else self.spelled[token]
