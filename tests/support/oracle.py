"""The plain definition, written independently of proxytune: one example, full forwards without any cache,
float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

M0, M1, W0, W1 = 0xD2511F53, 0xCD9E8D57, 0x9E3779B9, 0xBB67AE85


def philox(counter: Sequence[int], key: Sequence[int]) -> list[int]:
    """Philox4x32-10 on Python integers."""
    c, k = list(counter), list(key)
    for _ in range(10):
        p0, p1 = M0 * c[0], M1 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 % 2**32, (p0 >> 32) ^ c[3] ^ k[1], p0 % 2**32]
        k = [(k[0] + W0) % 2**32, (k[1] + W1) % 2**32]
    return c


def noise(key: int, position: int, token: int) -> float:
    """Gumbel noise of one token."""
    word = philox((token // 4, position, 0, 0), (key % 2**32, (key >> 32) % 2**32))[token % 4]
    return -math.log(-math.log((word + 0.5) / 2**32))


@dataclass
class Settings:
    """What the oracle needs to know of a request."""

    max_new: int
    alpha: Callable[[int], float] = lambda position: 1.0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    key: int = 0
    eos: frozenset[int] = frozenset()
    banned: frozenset[int] = frozenset()
    banned_first: frozenset[int] = frozenset()
    min_new: int = 0
    stop: Callable[[Sequence[int]], bool] | None = None


@torch.inference_mode()
def last_logits(model: Any, ids: Sequence[int]) -> torch.Tensor:
    """Logits after the last id, by one forward over all of them."""
    return model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0, -1].double()


def pick(logits: torch.Tensor, s: Settings, position: int) -> int:
    """One token from combined logits [V]."""
    z = logits.clone()
    bans = set(s.banned) | (set(s.eos) if position < s.min_new else set())
    bans |= set(s.banned_first) if position == 0 else set()
    for token in bans:
        z[token] = -math.inf
    if s.temperature == 0:
        return int(z.argmax())
    z = z / s.temperature
    values = z.tolist()
    order = sorted(range(len(z)), key=lambda t: -values[t])
    if s.min_p:
        probability = z.softmax(-1)
        z[probability < s.min_p * probability.max()] = -math.inf
    if s.top_k:
        floor = z[order[min(s.top_k, len(order)) - 1]]
        z[z < floor] = -math.inf
    if s.top_p < 1:
        probability, mass = z.softmax(-1), 0.0
        for rank, token in enumerate(order):
            if rank > 0 and mass >= s.top_p:
                z[token] = -math.inf
            mass += probability[token].item()
    scores = [
        z[t].item() + noise(s.key, position, t) if z[t] > -math.inf else -math.inf for t in range(len(z))
    ]
    return max(range(len(z)), key=lambda t: scores[t])


def generate(
    base: Any,
    pairs: Sequence[tuple[float, Any, Any]],
    base_ids: Sequence[int],
    pair_ids: Sequence[tuple[Sequence[int], Sequence[int]]],
    s: Settings,
) -> tuple[list[int], str, list[float]]:
    """Tokens, finish reason and top-two margins of base + alpha * sum w (expert - antiexpert)."""
    out: list[int] = []
    margins: list[float] = []
    while True:
        z = last_logits(base, [*base_ids, *out])
        delta = torch.zeros_like(z)
        for (weight, expert, antiexpert), (expert_ids, anti_ids) in zip(pairs, pair_ids, strict=True):
            delta += weight * (
                last_logits(expert, [*expert_ids, *out]) - last_logits(antiexpert, [*anti_ids, *out])
            )
        z = z + s.alpha(len(out)) * delta
        top = z.topk(2).values
        margins.append(float(top[0] - top[1]))
        out.append(pick(z, s, len(out)))
        if out[-1] in s.eos:
            return out, "eos", margins
        if s.stop is not None and s.stop(out):
            return out, "stop", margins
        if len(out) >= s.max_new:
            return out, "length", margins
