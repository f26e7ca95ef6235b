"""The choice of tokens on the device: what `sampling` and `logits` do, without a host that looks.

Bit for bit the same tokens: the same operations in the same precision, with masks in place of the host's
decisions. What a batch does not need at all (noise, cuts, bans) is left out when its graph is made."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from proxytune.engine.logits import gumbel, min_p_floor


class SamplingNeeds(NamedTuple):
    """What the sampling settings of a batch need."""

    noise: bool
    """Whether any row samples."""
    cuts: bool
    """Whether any row that samples has min-p, top-k or top-p."""


class Sampler(NamedTuple):
    """How R rows choose their tokens; N bans, E ends and F forced tokens at most."""

    temperature: Tensor  # [R] float64; 0 is greedy
    top_k: Tensor  # [R]; 0 is off
    top_p: Tensor  # [R] float64; 1 is off
    min_p: Tensor  # [R] float64; 0 is off
    key: Tensor  # [R] randomness
    ban: Tensor  # [R, N] ids; one past the vocabulary where there are fewer
    ban_until: Tensor  # [R, N] the position from which an id may be generated
    eos: Tensor  # [R, E] ids that end a response; -1 where there are fewer
    forced: Tensor  # [R, F]
    forced_count: Tensor  # [R] how many of them count

    def noise(self, positions: Tensor, vocabulary: int) -> Tensor:
        """Gumbel noise at positions [R, Q]: [R, Q, V], float64."""
        keys = self.key[:, None].expand_as(positions)
        return gumbel(keys.flatten(), positions.flatten(), vocabulary).view(*positions.shape, vocabulary)

    def pick(self, logits: Tensor, positions: Tensor, noise: Tensor | None, needs: SamplingNeeds) -> Tensor:
        """Logits [R, Q, V] at response positions [R, Q] -> tokens [R, Q]."""
        logits = self._banned(logits, positions)
        tokens = logits.argmax(-1)
        if noise is not None:
            sampled = self.temperature > 0  # [R]
            scaled = logits / self.temperature.where(sampled, 1.0).to(logits.dtype)[:, None, None]
            if needs.cuts:
                limits = (self.top_k, self.top_p, self.min_p)
                scaled = cut(scaled, *(column[:, None].expand_as(positions) for column in limits))
            tokens = torch.where(sampled[:, None], (scaled.double() + noise).argmax(-1), tokens)
        if self.forced.shape[1]:
            at = positions.clamp(max=self.forced.shape[1] - 1)
            tokens = torch.where(positions < self.forced_count[:, None], self.forced.gather(1, at), tokens)
        return tokens

    def _banned(self, logits: Tensor, positions: Tensor) -> Tensor:
        """Logits with -inf where an id may not be generated."""
        if not self.ban.shape[1]:
            return logits
        free = positions[..., None] >= self.ban_until[:, None]  # [R, Q, N]
        size = logits.shape[-1]
        ids = self.ban[:, None].expand_as(free).masked_fill(free, size)
        # one column more than there are tokens: where what is free goes
        mask = torch.zeros(*positions.shape, size + 1, dtype=torch.bool, device=logits.device)
        return logits.masked_fill(mask.scatter_(-1, ids, True)[..., :size], float("-inf"))

    def ends(self, tokens: Tensor) -> Tensor:
        """Which of tokens [R, Q] end a response: [R, Q] bool."""
        return (tokens[..., None] == self.eos[:, None]).any(-1)


def cut(scaled: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Min-p, top-k, then top-p: logits [..., V] already divided by the temperature, top_k, top_p and min_p
    [...] -> the logits with -inf for what is cut, the same as `logits.warp` gives.

    One stable sort serves both: what top-k keeps is a prefix of the order."""
    scaled = scaled.masked_fill(scaled < min_p_floor(scaled, min_p), float("-inf"))
    ordered, index = scaled.sort(dim=-1, descending=True, stable=True)
    at = top_k.clamp(min=1, max=scaled.shape[-1])[..., None] - 1
    floor = ordered.gather(-1, at).masked_fill((top_k <= 0)[..., None], float("-inf"))
    probability = ordered.masked_fill(ordered < floor, float("-inf")).softmax(-1)
    before = probability.cumsum(-1) - probability  # mass of the more probable tokens
    out = (before >= top_p.to(before.dtype)[..., None]) & (top_p < 1)[..., None]
    out[..., 0] = False
    out |= ordered < floor
    return scaled.masked_fill(torch.zeros_like(out).scatter(-1, index, out), float("-inf"))
