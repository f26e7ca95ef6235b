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
    ranked: Tensor  # [N, M, K] the K most probable tokens, the first of them first
    ranked_logprob: Tensor  # [N, M, K] float64, natural logarithms

    @classmethod
    def of(
        cls,
        views: Mapping[str, Tensor],
        apart: Mapping[str, Tensor],
        tokens: Tensor,
        first: Callable[[Tensor], Tensor],
        ranked: int = 0,
    ) -> TokenViews:
        """From every model's logits [N, V] and divergences [N]. `first` gives the first of the largest
        logits of a row; `ranked` is K, cut to V."""
        chosen = [log_probability(logits, tokens).exp().double() for logits in views.values()]
        none = tokens.new_zeros(len(tokens), 0, dtype=torch.float64)
        return cls(
            torch.stack(chosen, 1),
            torch.stack([first(logits) for logits in views.values()], 1),
            torch.stack(list(apart.values()), 1) if apart else none,
            *_ranked(list(views.values()), ranked),
        )

    def packed(self) -> Tensor:
        """All of it as one [N, 2M + D + 2MK] of int64."""
        bits = (numbers.contiguous().view(torch.long) for numbers in (self.probability, self.divergence))
        logprobs = self.ranked_logprob.contiguous().view(torch.long)
        return torch.cat([self.top, *bits, self.ranked.flatten(1), logprobs.flatten(1)], 1)

    @classmethod
    def unpacked(cls, numbers: Tensor, models: int, ranked: int = 0) -> TokenViews:
        """`packed` undone; so many models, and K."""
        sizes = [models, models, numbers.shape[1] - (2 + 2 * ranked) * models, *[models * ranked] * 2]
        top, chosen, apart, best, logprobs = torch.split_with_sizes(numbers, sizes, 1)
        wide = (part.contiguous().view(torch.float64) for part in (chosen, apart, logprobs))
        probability, divergence, ranked_logprob = wide
        shape = len(numbers), models, ranked
        return cls(probability, top, divergence, best.reshape(shape), ranked_logprob.reshape(shape))

    def traces(
        self, models: Sequence[str], measured: Sequence[str], tokens: Sequence[int], alphas: Sequence[float]
    ) -> list[TokenTrace]:
        """The records, with the models by name and those whose divergence was measured."""
        pairs: list[list[list[tuple[int, float]]]] = [
            [list(zip(ids, logprobs, strict=True)) for ids, logprobs in zip(*rows, strict=True)]
            for rows in zip(self.ranked.tolist(), self.ranked_logprob.tolist(), strict=True)
        ]
        columns = self.probability.tolist(), self.top.tolist(), self.divergence.tolist(), pairs
        heads = models, models, measured, models
        return [
            TokenTrace(token, alpha, *(dict(zip(names, own, strict=True)) for names, own in named))
            for token, alpha, *rows in zip(tokens, alphas, *columns, strict=True)
            for named in [zip(heads, rows, strict=True)]
        ]


def ranked_tokens(logits: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """The most probable tokens of every row, the first of them first, and their natural log-probabilities:
    [N, V] -> two [N, K], the second in float64. K is `most`, cut to V."""
    if most == 0:
        none = logits.new_zeros(len(logits), 0)
        return none.long(), none.double()
    values, ids = logits.topk(min(most, logits.shape[-1]), dim=-1)
    return ids, values.double() - logits.logsumexp(-1, keepdim=True).double()


def _ranked(logits: Sequence[Tensor], most: int) -> tuple[Tensor, Tensor]:
    """As `ranked_tokens`, of several models: two [N, M, K]."""
    found = [ranked_tokens(own, most) for own in logits]
    return torch.stack([ids for ids, _ in found], 1), torch.stack([logprobs for _, logprobs in found], 1)
