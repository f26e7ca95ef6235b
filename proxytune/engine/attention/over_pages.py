"""Packed tokens of ragged rows over pages, in one call per layer: prompts, and tokens of rows that decode
where no graph does.

By torch's attention of ragged rows where many tokens are new beside what is there (`varlen`), since keys and
values have to be copied out of their pages for it; else by our own kernel, which reads pages as they lie.
Where neither is right, it is written out row by row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from proxytune.engine.attention import varlen
from proxytune.engine.kernels.paged_attention import gathered
from proxytune.engine.kernels.scores import ScoreRule
from proxytune.engine.kernels.trial import APART, farthest, trusted
from proxytune.engine.kv.cache import integers, sent
from proxytune.engine.kv.pages import PAGE, PagedCache

Parts = Sequence[tuple[int, int, int, int]]
"""By row: the row, its first token among all, its tokens, and its length with them."""


@dataclass
class Ragged:
    """The rows of a packed forward, and what is made of them on first use: the same for every layer."""

    cache: PagedCache
    parts: Parts
    _tables: dict[torch.device, Tensor] = field(default_factory=dict)
    _tiles: dict[tuple[int, torch.device], Tensor] = field(default_factory=dict)
    _copies: dict[torch.device, varlen.Rows] = field(default_factory=dict)

    @property
    def longest(self) -> int:
        """Most new tokens of a row."""
        return max(count for _, _, count, _ in self.parts)

    def table(self, device: torch.device) -> Tensor:
        """Page numbers [R, P], in the order of the parts."""
        if device not in self._tables:
            pages = -(-max(length for *_, length in self.parts) // PAGE)
            self._tables[device] = self.cache.table([row for row, *_ in self.parts], pages, device)
        return self._tables[device]

    def tiles(self, most: int, device: torch.device) -> Tensor:
        """Up to `most` tokens of one row each: [N, 4], the place in the table, first token, tokens, and the
        row's length with them."""
        if (most, device) not in self._tiles:
            self._tiles[most, device] = integers(tiles(self.parts, most), device)
        return self._tiles[most, device]

    def copied(self, device: torch.device) -> varlen.Rows:
        """Where all that the rows have is in the pools, and how long they are."""
        if device not in self._copies:
            places = [place(self.cache.tables[row], length) for row, _, _, length in self.parts]
            counts, lengths = ([part[at] for part in self.parts] for at in (2, 3))
            slots = sent(torch.from_numpy(np.concatenate(places)), device)
            self._copies[device] = varlen.Rows.of(slots, counts, lengths)
        return self._copies[device]


def tiles(parts: Parts, most: int) -> list[tuple[int, int, int, int]]:
    """Parts, with their number in place of the row, in pieces of at most `most` tokens."""
    return [
        (number, start + done, min(most, count - done), length - count + min(count, done + most))
        for number, (_, start, count, length) in enumerate(parts)
        for done in range(0, count, most)
    ]


def place(table: Sequence[int], length: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Where a row's tokens are in a pool seen as [pages * PAGE, H, D]: [length]."""
    pages = np.array(table[: -(-length // PAGE)], dtype=np.int64)
    return (pages[:, None] * PAGE + np.arange(PAGE)).reshape(-1)[:length]


def attend_pages(rows: Ragged, query: Tensor, pools: tuple[Tensor, Tensor], rule: ScoreRule) -> Tensor:
    """Queries [T, H, Dk] of a part, whose keys and values are stored -> [T, H, Dv]; for heads for which
    `paged_attention.supported` holds."""
    if varlen.takes(query, pools, rule) and varlen.pays(rows.parts):
        return varlen.attend(query, pools, rows.copied(query.device), rule)
    from proxytune.engine.kernels.triton_attention import launch_ragged, tile_tokens

    table, most = rows.table(query.device), tile_tokens(rows.longest, group_of(query, pools), query.dtype)
    if not _right(query, pools, rule, most):
        return written_out(query, pools, table, rows.parts, rule)
    return launch_ragged(query, *pools, table, rows.tiles(most, query.device), rule, most)


def group_of(query: Tensor, pools: tuple[Tensor, Tensor]) -> int:
    """Query heads that share a key head."""
    return query.shape[1] // pools[0].shape[2]


def written_out(
    query: Tensor, pools: tuple[Tensor, Tensor], table: Tensor, parts: Parts, rule: ScoreRule
) -> Tensor:
    """Row by row, by `gathered`."""
    out = query.new_empty(*query.shape[:2], pools[1].shape[-1])
    for number, (_, start, count, length) in enumerate(parts):
        mine = slice(start, start + count)
        ends = integers([length], query.device)
        seen = gathered(query[mine].transpose(0, 1)[None], *pools, table[number : number + 1], ends, rule)
        out[mine] = seen[0].transpose(0, 1)
    return out


def _right(query: Tensor, pools: tuple[Tensor, Tensor], rule: ScoreRule, most: int) -> bool:
    """Whether the kernel was found to be right for such heads, tiles and scores."""
    sizes = query.shape[1:], *(pool.shape[1:] for pool in pools)
    shape = sizes, query.dtype, rule.scaling, rule.window, rule.softcap, rule.sinks is not None, most

    def apart() -> float:
        from proxytune.engine.kernels.triton_attention import launch_ragged

        q, own, table, parts = tried(query, pools, most + 1)
        there = integers(tiles(parts, most), query.device)
        got = launch_ragged(q, *own, table, there, rule, most)
        return farthest(got, written_out(q, own, table, parts, rule))

    return trusted("ragged attention kernel", shape, query.device, apart, APART[query.dtype])


def tried(
    query: Tensor, pools: tuple[Tensor, Tensor], longest: int
) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor, Parts]:
    """Rows of such heads on which a way to attend is tried: one that begins, one that goes on, and a single
    token. -> queries, pools, the table and the rows."""
    device, counts, before = query.device, (longest, 3, 1), (0, PAGE + 5, 2 * PAGE)
    lengths = [count + there for count, there in zip(counts, before, strict=True)]
    starts = (0, longest, longest + 3)
    parts = list(zip(range(3), starts, counts, lengths, strict=True))
    pages = -(-max(lengths) // PAGE)
    draw = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=draw, device=device).to(query.dtype)

    keys, values = (normal(3 * pages, PAGE, *pool.shape[2:]) for pool in pools)
    table = torch.randperm(3 * pages, generator=draw, device=device).view(3, pages)
    return normal(sum(counts), *query.shape[1:]), (keys, values), table, parts
