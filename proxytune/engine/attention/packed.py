"""Which tokens of a packed forward belong to which rows, and which rows attend in one call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from proxytune.engine.attention.ragged import Ragged
from proxytune.engine.kv.cache import KVCache, Placement, integers
from proxytune.engine.kv.pages import PagedCache


@dataclass
class Group:
    """Rows of the cache that attend in one call, each with `query` new tokens."""

    query: int
    rows: list[int]
    """Ascending; what lies between them is read along and forgotten."""
    starts: list[int]
    """Where the tokens of each row are in the packed order."""
    lengths: list[int]
    """Tokens of each row, the new ones included."""
    _indices: dict[torch.device, tuple[Tensor, Tensor]] = field(default_factory=dict)
    masks: dict[tuple[int | None, torch.dtype, torch.device], Tensor | None] = field(default_factory=dict)

    @property
    def first(self) -> int:
        """The first row of the block of the cache that is read."""
        return self.rows[0]

    @property
    def block(self) -> int:
        """How many rows are read."""
        return self.rows[-1] - self.rows[0] + 1

    @property
    def dense(self) -> bool:
        """Whether the rows follow on each other, and so do their tokens."""
        tokens = self.starts[-1] - self.starts[0]
        return self.block == len(self.rows) and tokens == (len(self.rows) - 1) * self.query

    def indices(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Of a group that is not dense: the rows within the block [R], and their tokens [R * query]."""
        if device not in self._indices:
            rows = integers([row - self.rows[0] for row in self.rows], device)
            tokens = integers([s + j for s in self.starts for j in range(self.query)], device)
            self._indices[device] = rows, tokens
        return self._indices[device]

    @property
    def longest(self) -> int:
        """Keys that the group's attention reads."""
        return max(self.lengths)

    @property
    def from_start(self) -> bool:
        """Whether nothing was cached before, so that plain causal attention is right (SDPA aligns it upper
        left)."""
        return all(length == self.query for length in self.lengths)

    def mask(self, window: int | None, like: Tensor) -> Tensor | None:
        """Additive mask [block, 1, query, longest] for a sliding window (None: full); None if nothing is
        hidden."""
        where = (window, like.dtype, like.device)
        if where not in self.masks:
            self.masks[where] = self._make_mask(window, like)
        return self.masks[where]

    def _make_mask(self, window: int | None, like: Tensor) -> Tensor | None:
        shortest, longest = min(self.lengths), self.longest
        if self.query == 1 and shortest == longest and (window is None or longest <= window):
            return None
        lengths = [longest] * self.block
        for row, length in zip(self.rows, self.lengths, strict=True):
            lengths[row - self.first] = length
        end = integers(lengths, like.device)[:, None, None]  # [R, 1, 1]
        at = end - self.query + torch.arange(self.query, device=like.device)[None, :, None]  # [R, q, 1]
        key = torch.arange(longest, device=like.device)[None, None, :]  # [1, 1, L]
        visible = key <= at
        if window is not None:
            visible &= at - key < window
        bias = torch.zeros(visible.shape, dtype=like.dtype, device=like.device)
        return bias.masked_fill(~visible, float("-inf"))[:, None]


MOST_TOKENS = 64
"""New tokens of a row up to which the CPU's kernel attends; a longer prefill is for large products."""
MAX_GROUPED = 16
"""Longest query for which rows share an attention call: decode and verification, not prefill."""


def grouped(segments: Sequence[tuple[int, int, int, int]]) -> list[Group]:
    """Segments (row, first token, tokens, length with them): rows with equally many new tokens share a call,
    as long as at least half of the rows that it reads are theirs."""
    groups: list[Group] = []
    open_groups: dict[int, Group] = {}
    for row, start, query, length in segments:
        last = open_groups.get(query)
        if last is not None and row - last.first + 1 <= 2 * (len(last.rows) + 1):
            last.rows.append(row)
            last.starts.append(start)
            last.lengths.append(length)
        else:
            groups.append(Group(query, [row], [start], [length]))
            if query <= MAX_GROUPED:
                open_groups[query] = groups[-1]
    return groups


@dataclass
class PackedPart:
    """One model's tokens within a packed forward, and the cache that they go to."""

    cache: KVCache
    at: Placement
    tokens: slice

    @cached_property
    def groups(self) -> list[Group]:
        """Everything, for attention by torch."""
        return grouped(self.at.parts)

    @cached_property
    def long_groups(self) -> list[Group]:
        """What the CPU's kernel leaves to torch."""
        return grouped([part for part in self.at.parts if part[2] > MOST_TOKENS])

    @cached_property
    def ragged(self) -> Ragged:
        """Everything, for attention over pages."""
        assert isinstance(self.cache, PagedCache)
        return Ragged(self.cache, self.at.parts)


@dataclass
class Packed:
    """The state of one packed forward: one part per model on these weights."""

    parts: Sequence[PackedPart]
