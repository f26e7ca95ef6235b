"""How far distributions are from a reference: scalars per row, so that no vocabulary-sized tensor is kept."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def kl_divergence(reference: Tensor, other: Tensor, known: Tensor | None = None) -> Tensor:
    """KL(reference || other) per row, in nats: sum of p * (log p - log q) over tokens, p from the reference.

    reference, other [B, V] -> [B], in float64 (a divergence near 0 is a difference of near equals). `known`
    [V] bool are the tokens that the reference has; it gives no probability to others, where its logits mean
    nothing. Tokens without probability in the reference add nothing.
    """
    wide = reference.double()
    if known is not None:
        wide = wide.masked_fill(~known.to(wide.device), float("-inf"))
    log_p, log_q = wide.log_softmax(-1), other.double().log_softmax(-1)
    terms = torch.where(log_p == float("-inf"), 0.0, log_p.exp() * (log_p - log_q))
    return terms.sum(-1).clamp(min=0.0)  # rounding may leave -1e-17


def from_reference(
    views: Mapping[str, Tensor], reference: str, others: tuple[str, ...], known: Tensor | None = None
) -> dict[str, Tensor]:
    """KL(reference || other) of every row, for each of the others: [B]."""
    return {name: kl_divergence(views[reference], views[name], known) for name in others}
