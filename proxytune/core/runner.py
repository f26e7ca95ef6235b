"""One model behind two operations: run a packed forward over ragged rows, and move those rows about.

`ModelRunner` feeds several rows in one forward through our attention and cache. `ReferenceRunner` feeds one
row at a time through the model's own cache: slow, exact, and right for every causal language model, so it
serves the families that do not go through our attention."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from proxytune.core.attention import Group, Packed
from proxytune.core.cache import KVCache, Placement, Rows
from proxytune.core.logits import widen

Forward = Callable[..., Any]
"""A causal language model's forward: keyword arguments as in Hugging Face, an object with `.logits`."""


class Segment(NamedTuple):
    """New tokens of one row; they continue at the row's length."""

    row: int
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Alignment:
    """How one model's vocabulary maps to the base's, by token identity."""

    size: int
    """Size V of the base's vocabulary without padding rows."""
    columns: Tensor | None = None
    """[V] this model's id of every base token (0 where it has none); None where the ids agree."""
    shared: Tensor | None = None
    """[V] bool: tokens that this model knows; None means all."""
    spelled: tuple[tuple[int, ...], ...] | None = None
    """For every base token the ids that say the same here: one where shared, its text's encoding
    elsewhere."""

    def align(self, logits: Tensor) -> Tensor:
        """[K, V of this model] -> [K, V of the base]."""
        if self.columns is None:
            return logits[:, : self.size]
        return logits[:, self.columns.to(logits.device)]

    @cached_property
    def longest(self) -> int:
        """Most ids that one base token takes here."""
        return 1 if self.spelled is None else max(map(len, self.spelled))

    def spelt_by(self, token: int) -> list[int]:
        """The base tokens that are fed as this one id."""
        if self.columns is None or self.shared is None:
            return [token]
        found: list[int] = ((self.columns == token) & self.shared).nonzero().flatten().tolist()
        return found

    def spell(self, token: int) -> tuple[int, ...]:
        """The ids to feed this model after base token `token`."""
        return (token,) if self.spelled is None else self.spelled[token]


class Runner(Protocol):
    """What the engine needs of a model."""

    alignment: Alignment
    window: int
    """Most tokens that the model takes."""

    @property
    def rows(self) -> Rows:
        """The ragged rows, to admit, rewind, swap and drop."""
        ...

    def forward(self, segments: Sequence[Segment], keep: Sequence[int]) -> Tensor:
        """Feed the segments (distinct rows, ascending) -> logits [len(keep), V] of the base's vocabulary.

        `keep` are ascending indices into the tokens of all segments in a row: after which of them logits are
        wanted."""
        ...


class ModelRunner:
    """A model whose attention is ours: all rows in one forward."""

    def __init__(
        self,
        model: Forward,
        cache: KVCache,
        alignment: Alignment,
        window: int,
        device: torch.device,
        embed: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """`embed` turns ids [1, T] into embeddings where a soft prompt adds virtual tokens to the
        vocabulary."""
        self.model, self.cache, self.alignment, self.window = model, cache, alignment, window
        self.device, self.embed = device, embed

    @property
    def rows(self) -> Rows:
        return self.cache

    @torch.inference_mode()
    def forward(self, segments: Sequence[Segment], keep: Sequence[int]) -> Tensor:
        lengths = self.cache.lengths
        starts = [lengths[s.row] for s in segments]
        counts = [len(s.ids) for s in segments]
        at = Placement.of([s.row for s in segments], starts, counts, self.device)
        ids = torch.tensor([[i for s in segments for i in s.ids]], device=self.device)  # [1, T]
        tokens = {"input_ids": ids} if self.embed is None else {"inputs_embeds": self.embed(ids)}
        out = self.model(
            **tokens,
            position_ids=at.positions[None],
            use_cache=False,
            logits_to_keep=torch.tensor(keep, dtype=torch.long, device=self.device),
            packed=Packed(self.cache, at, group(segments, starts)),
        )
        for segment in segments:
            self.cache.commit(segment.row, len(segment.ids))
        return self.alignment.align(widen(out.logits[0]))


MAX_GROUPED = 16
"""Longest query for which rows share an attention call: decode and verification, not prefill."""


def group(segments: Sequence[Segment], starts: Sequence[int]) -> list[Group]:
    """Neighbouring rows with equally many new tokens become one group: one attention call."""
    groups: list[Group] = []
    at = 0
    for segment, start in zip(segments, starts, strict=True):
        query, last = len(segment.ids), groups[-1] if groups else None
        if last is not None and query == last.query <= MAX_GROUPED and last.first + last.count == segment.row:
            last.count += 1
            last.lengths = (*last.lengths, start + query)
        else:
            groups.append(Group(segment.row, 1, query, at, (start + query,)))
        at += query
    return groups


class ReferenceRows:
    """Rows of a ReferenceRunner: ids fed so far, and the model's own cache of each row."""

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

    @property
    def peak_bytes(self) -> int:
        """Unknown: the model's own cache is opaque to us."""
        return 0


class ReferenceRunner:
    """A model with its own cache, one row per forward; or with none, every forward from the start of the
    row."""

    def __init__(
        self,
        model: Forward,
        alignment: Alignment,
        window: int,
        device: torch.device,
        tokens: int,
        *,
        cached: bool,
    ) -> None:
        self.model, self.alignment, self.window, self.device = model, alignment, window, device
        self.cached = cached
        self._rows = ReferenceRows(tokens)

    @property
    def rows(self) -> Rows:
        return self._rows

    @torch.inference_mode()
    def forward(self, segments: Sequence[Segment], keep: Sequence[int]) -> Tensor:
        kept, start = [], 0
        for segment in segments:
            end = start + len(segment.ids)
            kept.append(self._feed(segment, [at - start for at in keep if start <= at < end]))
            start = end
        return torch.cat(kept)

    def _feed(self, segment: Segment, keep: Sequence[int]) -> Tensor:
        """Append the segment to its row; logits [len(keep), V] after these of its tokens."""
        rows, row = self._rows, segment.row
        known = (
            rows.ids[row] if rows.caches[row] is None else []
        )  # no cache, or lost by a rewind: feed it again
        ids = torch.tensor([[*known, *segment.ids]], device=self.device)
        rows.ids[row] = [*rows.ids[row], *segment.ids]
        rows.lengths[row] += len(segment.ids)
        if not self.cached:
            if not keep:
                return torch.empty(0, self.alignment.size, device=self.device)
            logits = self.model(input_ids=ids, use_cache=False).logits
        else:
            out = self.model(input_ids=ids, past_key_values=rows.caches[row], use_cache=True)
            rows.caches[row], logits = out.past_key_values, out.logits
        first = logits.shape[1] - len(segment.ids)
        return self.alignment.align(widen(logits[0, [first + at for at in keep]]))
