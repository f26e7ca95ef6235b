"""Packed tokens of ragged rows over pages, as the paged kernel takes them: no page is copied, and key heads
are not repeated. Rows with about as many new tokens attend in one call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from proxytune.engine.kernels.paged_attention import paged_attention
from proxytune.engine.kernels.scores import ScoreRule
from proxytune.engine.kv.cache import integers
from proxytune.engine.kv.pages import PAGE, PagedCache


@dataclass
class PagedGroup:
    """Rows with at most `query` new tokens each, a power of two, so that few kernels are compiled. Those with
    fewer begin with tokens that nobody asked for."""

    query: int
    parts: list[tuple[int, int, int, int]] = field(default_factory=list)
    """Row, first token, tokens, and the row's length with them."""
    _made: dict[torch.device, tuple[Tensor, Tensor, Tensor, Tensor]] = field(default_factory=dict)

    def on(self, device: torch.device, cache: PagedCache) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Which token each query is [R * query], where among them the new tokens are [N], the rows' pages
        [R, P] and their lengths [R]."""
        if device not in self._made:
            query, kept, first = list[int](), list[int](), 0
            for _, start, count, _ in self.parts:
                query += [start] * (self.query - count) + list(range(start, start + count))
                first += self.query
                kept += range(first - count, first)
            lengths = [length for *_, length in self.parts]
            table = cache.table([row for row, *_ in self.parts], -(-max(lengths) // PAGE), device)
            numbers = (integers(own, device) for own in (query, kept, lengths))
            at, places, ends = numbers
            self._made[device] = at, places, table, ends
        return self._made[device]


def paged_groups(segments: Sequence[tuple[int, int, int, int]], most: int) -> list[PagedGroup]:
    """Segments (row, first token, tokens, length with them) of up to `most` tokens, by powers of two."""
    groups: dict[int, PagedGroup] = {}
    for segment in segments:
        if segment[2] <= most:
            size = 1 << (segment[2] - 1).bit_length()
            groups.setdefault(size, PagedGroup(size)).parts.append(segment)
    return list(groups.values())


def attend_pages(
    group: PagedGroup, query: Tensor, cache: PagedCache, layer: int, out: Tensor, rule: ScoreRule
) -> None:
    """Queries [H, T, Dk] of a part, whose keys and values are stored -> the group's tokens of `out`
    [T, H, Dv]."""
    at, places, table, lengths = group.on(query.device, cache)
    rows, heads = len(group.parts), query.shape[0]
    q = query[:, at].view(heads, rows, group.query, -1).transpose(0, 1)  # [R, H, Q, Dk]
    seen = paged_attention(q, *cache.pools(layer), table, lengths, rule).transpose(1, 2).flatten(0, 1)
    out[at[places]] = seen[places]
