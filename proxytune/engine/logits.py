"""Logit mathematics: pure functions on [B, V], in the order in which a step applies them.

combine -> ban -> warp (temperature, min-p, top-k, top-p) -> argmax or sample.

Sampling is by the Gumbel-max trick with counter-based noise, so that a row's token depends on its own key,
position and distribution alone: not on the batch, the order or the number of steps taken together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

_MASK = 0xFFFFFFFF
_PHILOX_M = (0xD2511F53, 0xCD9E8D57)
_PHILOX_W = (0x9E3779B9, 0xBB67AE85)
_PHILOX_ROUNDS = 10


def widen(logits: Tensor) -> Tensor:
    """Logits in float32, or in their own dtype where that is wider: what `combine` computes in."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


@dataclass(frozen=True)
class Shift:
    """One expert's term of the sum: weight * (expert - antiexpert), where both know the token."""

    expert: Tensor  # [B, V]
    antiexpert: Tensor  # [B, V]
    weight: float = 1.0
    shared: Tensor | None = None  # [V] bool; None means every token is shared


def combine(base: Tensor, shifts: Sequence[Shift], alpha: Tensor, *, all_moved: bool = False) -> Tensor:
    """logits = base + alpha * sum_i weight_i * (expert_i - antiexpert_i) (paper eq. 1, with alpha of section
    6.2).

    base [B, V], alpha [B] -> [B, V]. Where alpha is 0, or expert and antiexpert agree, the result is the base
    bit for bit: the difference is taken first, and alpha multiplies it last. `all_moved`: the caller knows
    that no alpha is 0."""
    if not shifts:
        return base
    first, *others = map(_difference, shifts)
    delta = sum(others, first)
    strength = alpha.to(base.dtype)[:, None]  # [B, 1]
    combined = (strength * delta).add_(base)
    return combined if all_moved else torch.where(strength == 0, base, combined)


def _difference(shift: Shift) -> Tensor:
    """One term of the sum, [B, V]."""
    difference = shift.expert - shift.antiexpert
    if shift.weight != 1.0:
        difference = shift.weight * difference
    return difference if shift.shared is None else difference.masked_fill(~shift.shared, 0.0)


def ban(logits: Tensor, rows: Tensor, ids: Tensor) -> Tensor:
    """Forbid token ids[j] in row rows[j]: a copy with these logits at -inf."""
    if rows.numel() == 0:
        return logits
    banned = logits.clone()
    banned[rows, ids] = float("-inf")
    return banned


def warp(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Temperature, then min-p, top-k and top-p, per row. [B, V] and four [B] -> [B, V] with -inf for what is
    cut.

    min_p 0, top_k 0 and top_p 1 are off. Ties at the k-th value are kept; top-p keeps the smallest set of
    most probable tokens that reaches p, the token that crosses p included."""
    scaled = logits / temperature.to(logits.dtype)[:, None]
    if bool((min_p > 0).any()):
        scaled = scaled.masked_fill(scaled < min_p_floor(scaled, min_p), float("-inf"))
    if bool((top_k > 0).any()):
        k = int(top_k.max().clamp(max=logits.shape[-1]))
        values = scaled.topk(k, dim=-1).values  # [B, k]
        at = (top_k.clamp(min=1, max=k) - 1)[:, None]
        floor = values.gather(-1, at).masked_fill((top_k <= 0)[:, None], float("-inf"))
        scaled = scaled.masked_fill(scaled < floor, float("-inf"))
    if bool((top_p < 1).any()):
        ordered, index = scaled.sort(dim=-1, descending=True, stable=True)
        probability = ordered.softmax(-1)
        before = probability.cumsum(-1) - probability  # mass of the more probable tokens
        cut = (before >= top_p.to(before.dtype)[:, None]) & (top_p < 1)[:, None]
        cut[:, 0] = False
        scaled = scaled.masked_fill(torch.zeros_like(cut).scatter(-1, index, cut), float("-inf"))
    return scaled


def min_p_floor(scaled: Tensor, min_p: Tensor) -> Tensor:
    """The logit that a token needs: that of a probability of min_p times the largest (Nguyen et al. 2024,
    arXiv 2407.01082). Logits [..., V] already divided by the temperature, min_p [...] float64 -> [..., 1]; a
    min_p of 0 gives -inf, which cuts nothing."""
    return scaled.amax(-1, keepdim=True) + min_p.log().to(scaled.dtype)[..., None]


def philox(counter: Sequence[Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").

    Four counter words and two key words, 32-bit values in int64 tensors that broadcast, -> four 32-bit words.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_PHILOX_ROUNDS):
        # int64 products wrap modulo 2**64, which keeps all 64 bits of a 32 x 32 bit product
        p0, p1 = c0 * _PHILOX_M[0], c2 * _PHILOX_M[1]
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK) ^ c1 ^ k0,
            p1 & _MASK,
            ((p0 >> 32) & _MASK) ^ c3 ^ k1,
            p0 & _MASK,
        )
        k0, k1 = (k0 + _PHILOX_W[0]) & _MASK, (k1 + _PHILOX_W[1]) & _MASK
    return c0, c1, c2, c3


def gumbel(keys: Tensor, positions: Tensor, vocabulary: int, ids: Tensor | None = None) -> Tensor:
    """Standard Gumbel noise for every token of every row, or for the tokens `ids` [B, K] only: [B], [B] ->
    [B, V] (or [B, K]) in float64.

    keys are 64-bit (one per seed, example and sample), positions count the response's tokens from 0. The
    noise of token t is word t mod 4 of philox(counter=(t // 4, position, 0, 0), key), as (word + 1/2) / 2**32
    = u and -log(-log u)."""
    every = torch.arange((vocabulary + 3) // 4, device=keys.device)[None, :]  # [1, V/4]
    blocks = every if ids is None else ids // 4
    zero = torch.zeros_like(blocks)
    at = positions.to(torch.int64)[:, None]
    words = philox((blocks, at, zero, zero), ((keys & _MASK)[:, None], ((keys >> 32) & _MASK)[:, None]))
    table = torch.stack([word + zero for word in words], dim=-1)  # [B, blocks, 4]
    if ids is None:
        word = table.flatten(1)[:, :vocabulary]
    else:
        word = table.gather(-1, (ids % 4)[..., None]).squeeze(-1)
    uniform = (word.double() + 0.5) / 2**32
    return -torch.log(-torch.log(uniform))


def log_probability(logits: Tensor, tokens: Tensor) -> Tensor:
    """Natural log-probability of one token per row: [B, V], [B] -> [B]."""
    return -cross_entropy(logits, tokens, reduction="none")


def found_probability(logits: Tensor, tokens: Tensor) -> Tensor:
    """As `log_probability`, but NaN in every row whose logits are no distribution: a NaN or +inf is among
    them, or all are -inf."""
    return log_probability(logits, tokens).masked_fill(~logits.amax(-1).isfinite(), float("nan"))


def largest(logits: Tensor) -> Tensor:
    """The first of the largest logits per row, [B, V] -> [B]. On the CPU it is numpy's, which uses vector
    instructions: torch's takes ten times as long."""
    if logits.device.type == "cpu" and logits.dtype in (torch.float32, torch.float64):
        return torch.from_numpy(logits.detach().numpy().argmax(-1))
    return logits.argmax(-1)


def some(logits: Mapping[str, Tensor], rows: Sequence[int]) -> dict[str, Tensor]:
    """Rows of every model's logits [B, V], in the order given; the same tensors where that is all of them as
    they are."""
    count = len(next(iter(logits.values()), rows))
    if len(rows) == count and all(at == row for at, row in enumerate(rows)):
        return dict(logits)
    index = torch.tensor(rows, dtype=torch.long)
    return {name: values.index_select(0, index.to(values.device)) for name, values in logits.items()}


@dataclass(frozen=True)
class SamplingParams:
    """How some rows of a batch draw their tokens: all tensors [S]."""

    rows: Tensor
    """Which rows; the others take the largest logit."""
    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    keys: Tensor
    positions: Tensor


def choose(logits: Tensor, params: SamplingParams | None) -> Tensor:
    """The next token of every row, [B, V] -> [B]: the first of the largest logits, or a sample where asked
    for."""
    tokens = largest(logits)
    if params is None or params.rows.numel() == 0:
        return tokens
    drawing, top = logits[params.rows], params.top_k
    most = int(top.max())
    if int(top.min()) > 0 and 2 * most < logits.shape[-1]:
        drawn = _draw_among_few(drawing, params, most)
    else:
        drawn = _draw(drawing, params, None)
    return tokens.index_copy(0, params.rows, drawn)


def _draw(logits: Tensor, params: SamplingParams, ids: Tensor | None) -> Tensor:
    """Sample from [S, V], or from the columns `ids` [S, K] of the vocabulary. -> [S] columns."""
    warped = warp(logits, params.temperature, params.top_k, params.top_p, params.min_p)
    noise = gumbel(params.keys, params.positions, logits.shape[-1], ids)
    return largest(warped.double() + noise)


def _draw_among_few(logits: Tensor, params: SamplingParams, most: int) -> Tensor:
    """Top-k first: sorting and noise for the k survivors only, in the order of their ids as in `_draw`. Where
    more than k tokens tie at the k-th place, all of them survive, so all tokens are looked at."""
    values, ids = logits.topk(most + 1, dim=-1)
    if bool((values[:, most] == values.gather(-1, params.top_k[:, None] - 1).squeeze(-1)).any()):
        return _draw(logits, params, None)
    ids = ids.sort(dim=-1).values
    return ids.gather(-1, _draw(logits.gather(-1, ids), params, ids)[:, None]).squeeze(-1)
