"""The choice of tokens on the device: what `sampling` and `logits` do, without a host that looks.

The same tokens: by the same operations in the same precision with masks in place of the host's decisions, or
by the kernels of `triton_sampling`. What a batch does not need at all (noise, cuts, bans) is left out when
its graph is made."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from proxytune.engine.kernels.paged_attention import runs_triton
from proxytune.engine.kernels.trial import trusted
from proxytune.engine.logits import gumbel, min_p_floor


class SamplingNeeds(NamedTuple):
    """What the sampling settings of a batch need."""

    noise: bool
    """Whether any row samples."""
    cuts: bool
    """Whether any row that samples has min-p, top-k or top-p."""


class DrawSettings(NamedTuple):
    """How R rows draw, beside what is banned and forced: [R] each, the floats columns of one tensor and the
    integers of one, so that each have one stride."""

    temperature: Tensor  # float64; 0 takes the largest logit
    top_p: Tensor  # float64; 1 is off
    min_p: Tensor  # float64; 0 is off
    top_k: Tensor  # int64; 0 is off
    key: Tensor  # int64


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

    def pick(self, logits: Tensor, positions: Tensor, needs: SamplingNeeds) -> Tensor:
        """Logits [R, Q, V] at response positions [R, Q] -> tokens [R, Q]."""
        logits = self._banned(logits, positions)
        tokens = self._drawn(logits, positions, needs) if needs.noise else logits.argmax(-1)
        if self.forced.shape[1]:
            at = positions.clamp(max=self.forced.shape[1] - 1)
            tokens = torch.where(positions < self.forced_count[:, None], self.forced.gather(1, at), tokens)
        return tokens

    def _drawn(self, logits: Tensor, positions: Tensor, needs: SamplingNeeds) -> Tensor:
        """By the kernel, where it takes such logits and was found to be right."""
        if runs_triton(logits) and logits.dtype == torch.float32 and logits.numel() and _right(logits, needs):
            from proxytune.engine.cuda.triton_sampling import draw

            return draw(logits, positions, self.settings, cuts=needs.cuts)
        return drawn(logits, positions, self.settings, cuts=needs.cuts)

    @property
    def settings(self) -> DrawSettings:
        """What a draw depends on."""
        return DrawSettings(self.temperature, self.top_p, self.min_p, self.top_k, self.key)

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


def drawn(logits: Tensor, positions: Tensor, settings: DrawSettings, *, cuts: bool) -> Tensor:
    """The kernels of `triton_sampling` written out: tokens [R, Q]."""
    temperature, top_p, min_p, top_k, key = settings
    sampled, size = temperature > 0, logits.shape[-1]
    scaled = logits / temperature.where(sampled, 1.0).to(logits.dtype)[:, None, None]
    if cuts:
        limits = (top_k, top_p, min_p)
        scaled = cut(scaled, *(column[:, None].expand_as(positions) for column in limits))
    noise = gumbel(key[:, None].expand_as(positions).flatten(), positions.flatten(), size)
    found = (scaled.double() + noise.view(logits.shape)).argmax(-1)
    return torch.where(sampled[:, None], found, logits.argmax(-1))


def _right(logits: Tensor, needs: SamplingNeeds) -> bool:
    """Whether the kernel was found to draw the same tokens for such a vocabulary."""
    size, device = logits.shape[-1], logits.device
    return trusted("sampling kernel", (size, needs.cuts), device, lambda: _apart(size, device, needs.cuts), 0)


def _apart(size: int, device: torch.device, cuts: bool) -> float:
    """How many tokens differ, for logits that are peaked and flat, and settings of all kinds."""
    from proxytune.engine.cuda.triton_sampling import draw

    real = torch.tensor(TRIED, dtype=torch.float64, device=device)
    temperature, top_p, min_p, top_k = real.unbind(1)
    key = torch.arange(len(TRIED), device=device) * 0x9E3779B97F4A7C1
    settings = DrawSettings(temperature, top_p, min_p, top_k.long(), key)
    draw_from = torch.Generator(device).manual_seed(0)
    logits = torch.randn(len(TRIED), 2, size, generator=draw_from, device=device)
    logits[:, 0] *= 4
    positions = torch.arange(2 * len(TRIED), device=device).view(-1, 2)
    if not cuts:
        settings = settings._replace(top_p=real.new_ones(len(TRIED)))
        settings = settings._replace(min_p=real.new_zeros(len(TRIED)), top_k=top_k.long() * 0)
    got = draw(logits, positions, settings, cuts=cuts)
    return float((got != drawn(logits, positions, settings, cuts=cuts)).sum())


TRIED = (
    (0.0, 1.0, 0.0, 0),
    (1.0, 1.0, 0.0, 0),
    (0.7, 0.9, 0.0, 0),
    (1.3, 0.5, 0.0, 40),
    (1.0, 1.0, 0.1, 0),
    (1.5, 0.95, 0.02, 7),
)
"""Temperature, top-p, min-p and top-k of the rows on which the kernel is tried."""


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
