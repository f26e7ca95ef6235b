"""Rows of a model whose cache is not ours."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any


class ReferenceRows:
    """Ids fed so far, and the model's own cache of each row, where it has one."""

    rewinds = False

    def __init__(self, tokens: int) -> None:
        self.lengths: list[int] = []
        self.ids: list[list[int]] = []
        self.caches: list[Any] = []
        self.capacity = tokens

    def fits(self, lengths: Sequence[int]) -> bool:
        return sum(lengths) <= self.capacity

    def reserve(self, lengths: Sequence[int]) -> None:
        """Nothing to lay out: every row's cache grows by itself."""

    def admit(self, source: int | None = None, length: int = 0) -> None:
        self.ids.append([])
        self.caches.append(None)
        self.lengths.append(0)
        if source is not None:
            self.ids[-1] = self.ids[source][:length]
            if length == len(self.ids[source]):
                self.caches[-1] = copy.deepcopy(self.caches[source])
            self.lengths[-1] = length

    def rewind(self, row: int, length: int) -> None:
        """State-space caches cannot go back, so the row is computed anew when it is fed next."""
        if length != self.lengths[row]:
            self.ids[row] = self.ids[row][:length]
            self.caches[row] = None
            self.lengths[row] = length

    def swap(self, one: int, other: int) -> None:
        columns: tuple[list[Any], ...] = (self.lengths, self.ids, self.caches)
        for rows in columns:
            rows[one], rows[other] = rows[other], rows[one]

    def drop(self, row: int) -> None:
        self.swap(row, len(self.lengths) - 1)
        columns: tuple[list[Any], ...] = (self.lengths, self.ids, self.caches)
        for rows in columns:
            rows.pop()

    def clear(self) -> None:
        for rows in (self.lengths, self.ids, self.caches):
            rows.clear()

    @property
    def peak_bytes(self) -> int:
        """Unknown: the model's own cache is opaque to us."""
        return 0
