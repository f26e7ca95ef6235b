"""The rows of a batch as tensors of fixed size, and the way from the scheduler's rows to them.

Few buffers, so that a change is one copy each: what a step moves, what a request sets (integers and floats),
and the pages; what a row has generated is sent once and goes on by itself. A batch of fewer rows uses the
first of them, at the same addresses, so that every CUDA graph reads and writes the same state."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import prod
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from proxytune.engine.cuda.sampling import Sampler, SamplingNeeds
from proxytune.engine.kv.cache import sent
from proxytune.engine.kv.pages import PAGE, PagedCache
from proxytune.engine.request import Request, Row

BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128)
"""Rows that a batch is padded to; beyond the last, multiples of it."""
MOST_NEW = 16
"""Most tokens that a row is fed in one forward."""
ALWAYS = np.iinfo(np.int64).max
"""A ban that never ends."""
REALS = 5
"""Floats of a request: alpha at its start and end, temperature, top-p, min-p."""
HEADER = 5
"""Integers of a request before its offsets: alpha's length and kind, top-k, key, forced tokens."""


def bucket(rows: int) -> int:
    """The rows that a batch of `rows` is padded to."""
    return next((size for size in BUCKETS if size >= rows), -(-rows // BUCKETS[-1]) * BUCKETS[-1])


class Widths(NamedTuple):
    """How wide the state has to be for some requests: powers of two, so that few sizes come up."""

    pages: int = 1
    bans: int = 0
    eos: int = 0
    forced: int = 0

    @classmethod
    def of(cls, request: Request) -> Widths:
        """Wide enough for one of them."""
        longest = max(map(len, request.contexts.values())) + request.max_new_tokens + MOST_NEW
        found = -(-longest // PAGE), len(bans_of(request)), len(request.eos), len(request.forced)
        return cls(*(0 if width == 0 else 1 << (width - 1).bit_length() for width in found))

    def join(self, other: Widths) -> Widths:
        """Wide enough for what both are wide enough for."""
        return Widths(*map(max, self, other))


def bans_of(request: Request) -> dict[int, int]:
    """Ids that may not be generated, and from which position of the response on they may."""
    until = dict.fromkeys(request.eos, least) if (least := request.sampling.min_new_tokens) else {}
    until |= {token: max(1, until.get(token, 0)) for token in request.banned_first}
    return until | dict.fromkeys(request.banned, ALWAYS)


def sampling_needs(rows: Sequence[Row]) -> SamplingNeeds:
    """What the sampling settings of these rows need."""
    sampled = [s for row in rows if (s := row.request.sampling).temperature > 0]
    return SamplingNeeds(bool(sampled), any(s.cuts for s in sampled))


class DeviceBatch(NamedTuple):
    """The state of R rows, as views of the buffers."""

    position: Tensor  # [R] tokens of the response so far
    limit: Tensor  # [R] tokens that it may have; equal to position where the row is done or only padding
    history: Tensor  # [R, L + 1] the target model's ids: prompt and response so far; the last column is waste
    last: Mapping[str, Tensor]  # per model [R]: its id of the last token, which it has not seen
    offset: Mapping[str, Tensor]  # per model [R]: tokens that it had seen at position 0
    table: Mapping[str, Tensor]  # per model [R, P]
    alpha_start: Tensor  # [R] float64
    alpha_end: Tensor  # [R] float64
    alpha_length: Tensor  # [R]
    alpha_linear: Tensor  # [R] 1 where alpha goes in a line from start to end
    sampler: Sampler

    def known(self, target: str) -> Tensor:
        """How many ids of the history count: [R]."""
        return self.offset[target] + 1 + self.position

    def alpha(self, positions: Tensor) -> Tensor:
        """The schedules at positions [R, Q]: [R, Q] float64, as `AlphaSchedule.at` computes it."""
        start, end, length = (c[:, None] for c in (self.alpha_start, self.alpha_end, self.alpha_length))
        line = start + (end - start) * positions / length.clamp(min=1)
        first = torch.where(self.alpha_linear[:, None] > 0, line, start)
        return torch.where(positions >= length, end, first)


class DeviceState:
    """The buffers of up to `rows` rows. Row i is row i of every cache."""

    def __init__(
        self,
        caches: Mapping[str, PagedCache],
        target: str,
        rows: int,
        widths: Widths,
        size: int,
        device: torch.device,
    ) -> None:
        """`target` is the model whose ids the response has, `size` the tokens in its vocabulary."""
        self.caches, self.target, self.rows, self.widths = caches, target, rows, widths
        self.size, self.device = size, device
        whole = HEADER + len(caches) + widths.eos + 2 * widths.bans + widths.forced
        self._shapes = [
            (rows, 2 + len(caches)),
            (rows, whole),
            (rows, REALS),
            (len(caches), rows, widths.pages),
        ]
        self._buffer = torch.zeros(sum(map(prod, self._shapes)), dtype=torch.long, device=device)
        self._mirror = torch.zeros(self._buffer.shape, dtype=torch.long)
        """What the host last wrote; `moving` goes on without it."""
        self.moving, self.whole, self.real, self.tables = self._parts(self._buffer)
        self.history = torch.zeros(rows, widths.pages * PAGE + 1, dtype=torch.long, device=device)
        self._moving, self._whole, self._real, self._tables = (
            part.numpy() for part in self._parts(self._mirror)
        )
        self._present: list[Row] = []

    def _parts(self, buffer: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What a step moves, what requests set, and the pages, as they lie in a buffer."""
        flat = torch.split_with_sizes(buffer, [prod(shape) for shape in self._shapes])
        moving, whole, real, tables = (t.view(s) for t, s in zip(flat, self._shapes, strict=True))
        return moving, whole, real.view(torch.float64), tables

    def views(self, rows: int) -> DeviceBatch:
        """The first `rows` rows."""
        position, limit, *last = self.moving[:rows].unbind(1)
        alpha_start, alpha_end, temperature, top_p, min_p = self.real[:rows].unbind(1)
        w, models = self.widths, len(self.caches)
        header, offsets, eos, ban, ban_until, forced = torch.split_with_sizes(
            self.whole[:rows], [HEADER, models, w.eos, w.bans, w.bans, w.forced], 1
        )
        alpha_length, alpha_linear, top_k, key, forced_count = header.unbind(1)
        return DeviceBatch(
            position,
            limit,
            self.history[:rows],
            dict(zip(self.caches, last, strict=True)),
            dict(zip(self.caches, offsets.unbind(1), strict=True)),
            dict(zip(self.caches, self.tables[:, :rows].unbind(0), strict=True)),
            alpha_start,
            alpha_end,
            alpha_length,
            alpha_linear,
            Sampler(temperature, top_k, top_p, min_p, key, ban, ban_until, eos, forced, forced_count),
        )

    def fill(self, rows: Sequence[Row]) -> None:
        """Make these the rows, as the host knows them; the others become padding."""
        self._moving[:] = 0
        new = list[int]()
        for index, row in enumerate(rows):
            last = [row.ids[name][-1] for name in self.caches]
            self._moving[index] = [len(row.tokens), row.request.max_new_tokens, *last]
            if index >= len(self._present) or self._present[index] is not row:
                self._set(index, row.request)
                new.append(index)
        self._present = list(rows)
        self._write_tables()
        self._send(self._buffer, self._mirror)
        if new:
            self._send_history(new, [rows[index].ids[self.target] for index in new])

    def forget(self) -> None:
        """The rows went on without the device."""
        self._present.clear()

    def fill_tables(self) -> None:
        """Let every row have the pages that its caches have reserved for it."""
        self._write_tables()
        self._send(self.tables, self._parts(self._mirror)[3])

    def _write_tables(self) -> None:
        for model, cache in enumerate(self.caches.values()):
            self._tables[model] = cache.spare
            for index, pages in enumerate(cache.tables[: len(self._present)]):
                kept = pages[: self.widths.pages]
                self._tables[model, index, : len(kept)] = kept

    def _send_history(self, rows: Sequence[int], ids: Sequence[Sequence[int]]) -> None:
        """What rows have generated or were given so far, in one copy: each with its number before it."""
        block = np.zeros((len(rows), 1 + max(map(len, ids))), dtype=np.int64)
        for line, row, own in zip(block, rows, ids, strict=True):
            line[0], line[1 : 1 + len(own)] = row, own
        there = sent(torch.from_numpy(block), self.device)
        self.history[:, : block.shape[1] - 1].index_copy_(0, there[:, 0], there[:, 1:])

    def _send(self, target: Tensor, source: Tensor) -> None:
        """Copy to the device without waiting for it. Pinned memory is not given out again before its copy is
        done (torch's host allocator sees to that)."""
        pinned = source.pin_memory() if target.is_cuda else source
        target.copy_(pinned, non_blocking=True)

    def _set(self, index: int, request: Request) -> None:
        """The settings of one request."""
        alpha, bans, w, sampling = request.alpha, bans_of(request), self.widths, request.sampling
        offsets = [len(request.contexts[name]) - 1 for name in self.caches]
        self._real[index] = alpha.start, alpha.end, sampling.temperature, sampling.top_p, sampling.min_p
        self._whole[index] = [
            *(alpha.length, alpha.kind == "linear", sampling.top_k, request.key, len(request.forced)),
            *offsets,
            *_padded(request.eos, w.eos, -1),
            *_padded(bans, w.bans, self.size),
            *_padded(bans.values(), w.bans, 0),
            *_padded(request.forced, w.forced, 0),
        ]


def _padded(values: Iterable[int], width: int, padding: int) -> list[int]:
    found = list(values)
    return found + [padding] * (width - len(found))
