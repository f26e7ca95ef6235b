"""Attention by torch: rows that attend in one call see what causality and the window let them see."""

from __future__ import annotations

import pytest
import torch

from proxytune.engine.attention.attention import FEW_QUERIES, _explicit, _fused
from proxytune.engine.attention.packed import Group
from proxytune.engine.kernels.scores import ScoreRule


@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("before", [0, 5], ids=["from the start", "after others"])
@pytest.mark.parametrize("window", [None, 1, 3, FEW_QUERIES])
def test_every_length_around_a_window(window: int | None, before: int, kv_heads: int) -> None:
    """Which way is taken depends on the lengths: all of them are the definition, row by row."""
    torch.manual_seed(0)
    for query in range(1, FEW_QUERIES + 4):
        length = before + query
        q = torch.randn(1, 2, query, 4, dtype=torch.float64)
        keys, values = torch.randn(2, 1, kv_heads, length, 4, dtype=torch.float64)
        rule, group = ScoreRule(None, window, None, None), Group(query, [0], [0], [length])
        fused, explicit = (way(q, keys, values, group, rule) for way in (_fused, _explicit))
        for number in range(query):
            end = before + number + 1
            seen = slice(0 if window is None else max(0, end - window), end)
            for head in range(2):
                k, v = (part[0, head % kv_heads, seen] for part in (keys, values))
                want = (k @ q[0, head, number] / 2).softmax(0) @ v
                torch.testing.assert_close(fused[0, head, number], want)
                torch.testing.assert_close(explicit[0, head, number], want)
