"""How every model saw the tokens that were chosen: what a trace records of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from proxytune.engine.logits import log_probability
from proxytune.engine.request import TokenTrace


class TokenViews(NamedTuple):
    """N tokens as M models saw them, and D divergences from a reference; all on the device."""

    probability: Tensor  # [N, M] float64, of the token
    top: Tensor  # [N, M] the most probable token
    divergence: Tensor  # [N, D] float64

    @classmethod
    def of(
        cls,
        views: Mapping[str, Tensor],
        apart: Mapping[str, Tensor],
        tokens: Tensor,
        first: Callable[[Tensor], Tensor],
    ) -> TokenViews:
        """From every model's logits [N, V] and divergences [N]. `first` gives the first of the largest
        logits of a row."""
        chosen = [log_probability(logits, tokens).exp().double() for logits in views.values()]
        none = tokens.new_zeros(len(tokens), 0, dtype=torch.float64)
        return cls(
            torch.stack(chosen, 1),
            torch.stack([first(logits) for logits in views.values()], 1),
            torch.stack(list(apart.values()), 1) if apart else none,
        )

    def packed(self) -> Tensor:
        """All of it as one [N, 2M + D] of int64."""
        bits = (numbers.contiguous().view(torch.long) for numbers in (self.probability, self.divergence))
        return torch.cat([self.top, *bits], 1)

    @classmethod
    def unpacked(cls, numbers: Tensor, models: int) -> TokenViews:
        """`packed` undone; so many models."""
        sizes = [models, models, numbers.shape[1] - 2 * models]
        top, chosen, apart = torch.split_with_sizes(numbers, sizes, 1)
        wide = (part.contiguous().view(torch.float64) for part in (chosen, apart))
        probability, divergence = wide
        return cls(probability, top, divergence)

    def traces(
        self, models: Sequence[str], measured: Sequence[str], tokens: Sequence[int], alphas: Sequence[float]
    ) -> list[TokenTrace]:
        """The records, with the models by name and those whose divergence was measured."""
        columns = self.probability.tolist(), self.top.tolist(), self.divergence.tolist()
        return [
            TokenTrace(token, alpha, *(dict(zip(names, own, strict=True)) for names, own in named))
            for token, alpha, *rows in zip(tokens, alphas, *columns, strict=True)
            for named in [zip((models, models, measured), rows, strict=True)]
        ]
