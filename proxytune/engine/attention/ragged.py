"""Packed tokens of ragged rows over pages: what is made of the rows once per forward, for every layer of it,
and their attention written out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from proxytune.engine.kernels.paged_attention import gathered
from proxytune.engine.kernels.scores import ScoreRule
from proxytune.engine.kv.cache import integers, sent
from proxytune.engine.kv.pages import PAGE, PagedCache

Parts = Sequence[tuple[int, int, int, int]]
"""By row: the row, its first token among all, its tokens, and its length with them."""


@dataclass(frozen=True)
class Copied:
    """Ragged rows as torch takes them: in one piece, out of their pages."""

    slots: Tensor  # [K] where all tokens of all rows are in the pools
    query_ends: Tensor  # [R + 1] int32: new tokens, summed up
    key_ends: Tensor  # [R + 1] int32: all tokens
    most_new: int
    longest: int

    @classmethod
    def of(cls, tables: Sequence[Sequence[int]], parts: Parts, device: torch.device) -> Copied:
        """Rows with these pages."""
        counts, lengths = ([part[at] for part in parts] for at in (2, 3))
        places = [place(table, length) for table, length in zip(tables, lengths, strict=True)]
        slots = sent(torch.from_numpy(np.concatenate(places)), device)
        ends = (integers(list(accumulate(own, initial=0)), slots.device).int() for own in (counts, lengths))
        query_ends, key_ends = ends
        return cls(slots, query_ends, key_ends, max(counts), max(lengths))


@dataclass
class Ragged:
    """The rows of a packed forward, and what is made of them on first use: the same for every layer."""

    cache: PagedCache
    parts: Parts
    _tables: dict[torch.device, Tensor] = field(default_factory=dict)
    _tiles: dict[tuple[int, torch.device], Tensor] = field(default_factory=dict)
    _copies: dict[torch.device, Copied] = field(default_factory=dict)

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

    def copied(self, device: torch.device) -> Copied:
        """Where all that the rows have is in the pools, and how long they are."""
        if device not in self._copies:
            tables = [self.cache.tables[row] for row, *_ in self.parts]
            self._copies[device] = Copied.of(tables, self.parts, device)
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
