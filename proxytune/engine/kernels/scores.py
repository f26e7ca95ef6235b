"""How attention turns products of queries and keys into weights."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class ScoreRule(NamedTuple):
    """What a layer asks of its scores beside causality."""

    scaling: float | None = None
    """Factor of the products; Dk**-0.5 unless given."""
    window: int | None = None
    """A token sees itself and the window - 1 before it."""
    softcap: float | None = None
    """Scores become softcap * tanh(score / softcap) (Gemma 2)."""
    sinks: Tensor | None = None
    """[H] one more score per head that takes weight but has no value (gpt-oss)."""

    @property
    def plain(self) -> bool:
        """Neither soft-capped scores nor sinks."""
        return self.softcap is None and self.sinks is None

    def scale(self, size: int) -> float:
        """The factor for heads of this size."""
        return size**-0.5 if self.scaling is None else self.scaling
