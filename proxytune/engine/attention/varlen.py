"""torch's attention of ragged rows (`torch.nn.attention.varlen`), for prompts in 16 bits on CUDA.

Without pages: with them it leaves rows unwritten where it splits keys (pytorch/pytorch#194167). So what rows
have is copied out of its pages, layer by layer, which is little beside the products of many new tokens. As
with our kernels, it is tried before it is used; which versions of torch take grouped queries differs too."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from proxytune.engine.attention.ragged import Copied, Parts, tried, written_out
from proxytune.engine.kernels.scores import ScoreRule
from proxytune.engine.kernels.trial import APART, farthest, trusted

DTYPES = (torch.bfloat16, torch.float16)
WIDEST = 256
"""Largest head."""
WORTH_COPYING = 16
"""Tokens that may be copied for every new one. Reasoned, not measured: our kernel reads a row's keys once for
every 64 queries, or for fewer where heads share them."""
TRIED = 40
"""New tokens of a row on which it is tried."""


def pays(parts: Parts) -> bool:
    """Whether so much is new that the copy of what is there is little beside it."""
    new, there = (sum(part[at] for part in parts) for at in (2, 3))
    return new * WORTH_COPYING >= there


def takes(query: Tensor, pools: tuple[Tensor, Tensor], rule: ScoreRule) -> bool:
    """Whether it attends for such queries [T, H, D] over such pools, and was found to be right."""
    keys, values = pools
    heads, size, kv_heads = *query.shape[1:], keys.shape[2]
    alike = query.dtype == keys.dtype == values.dtype and query.dtype in DTYPES
    fits = size == keys.shape[3] == values.shape[3] and size % 8 == 0 and size <= WIDEST
    if not (alike and fits and rule.plain and heads % kv_heads == 0 and there(query)):
        return False
    if heads != kv_heads and not grouped():
        return False
    shape = heads, kv_heads, size, query.dtype, rule.scaling, rule.window

    def apart() -> float:
        q, own, table, parts = tried(query, pools, TRIED)
        rows = Copied.of(table.tolist(), parts, query.device)
        return farthest(attend(q, own, rows, rule), written_out(q, own, table, parts, rule))

    return trusted("attention of ragged rows in torch", shape, query.device, apart, APART[query.dtype])


def attend(query: Tensor, pools: tuple[Tensor, Tensor], rows: Copied, rule: ScoreRule) -> Tensor:
    """Queries [T, H, D] of the last tokens of rows -> [T, H, D]."""
    keys, values = (pool.flatten(0, 1).index_select(0, rows.slots) for pool in pools)
    attention = function()
    assert attention is not None
    named: dict[str, Any] = {"scale": rule.scaling, "window_size": (-1, 0)}
    if rule.window is not None:
        named["window_size"] = (rule.window - 1, 0)
    if query.shape[1] != keys.shape[1]:
        named["enable_gqa"] = True
    longest = rows.most_new, rows.longest
    out: Tensor = attention(query, keys, values, rows.query_ends, rows.key_ends, *longest, **named)
    return out


@cache
def function() -> Callable[..., Any] | None:
    """torch's, if this version has it with a scale and a window."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    known = inspect.signature(varlen_attn).parameters
    return varlen_attn if {"scale", "window_size"} <= known.keys() else None


@cache
def grouped() -> bool:
    """Whether it takes fewer key heads than query heads."""
    found = function()
    return found is not None and "enable_gqa" in inspect.signature(found).parameters


def there(query: Tensor) -> bool:
    """Whether there is such a function for this device."""
    return query.is_cuda and function() is not None
