"""The KV cache of one model behind one small interface: ragged rows, rewind, prompt KV shared between
samples.

Two layouts. `SlotCache` (CPU): every row owns a contiguous slot and the rows stay compact, so that attention
reads a view; when a row outgrows its slot the pool is laid out anew with fewer, longer slots. `PagedCache`
(CUDA): rows are lists of pages, and rows that share a prompt share its full pages.

A row is an index 0..n-1. Lengths count committed tokens; what lies beyond a row's length is stale but finite
(pools start as zeros), is masked by attention and overwritten later, so a rewind only moves a length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

SLOT_GRANULE = 64  # slots grow in multiples of this many tokens
PAGE = 16  # tokens per page


@dataclass(frozen=True)
class LayerShape:
    """What one attention layer stores per token; key and value sizes can differ (DeepSeek)."""

    heads: int
    key: int
    value: int

    @property
    def numbers(self) -> int:
        """Elements per token."""
        return self.heads * (self.key + self.value)


@dataclass(frozen=True)
class CacheSpec:
    """The shape of a cache: one LayerShape per attention layer, the pool's size in tokens, dtype and
    device."""

    layers: tuple[LayerShape, ...]
    tokens: int
    dtype: torch.dtype
    devices: tuple[torch.device, ...]  # per layer, since a device map can spread the model

    @property
    def bytes_per_token(self) -> int:
        """Bytes of KV for one token over all layers."""
        return sum(layer.numbers for layer in self.layers) * self.dtype.itemsize


@dataclass
class Placement:
    """Where the tokens of one packed forward go, and what is made of that on first use."""

    positions: Tensor  # [T]
    parts: tuple[tuple[int, int, int, int], ...]
    """For every part: its row, its first token, its tokens, and the row's length with them."""
    flat: dict[object, Tensor] = field(default_factory=dict)
    """Indices into flattened pools."""

    @classmethod
    def of(
        cls, rows: Sequence[int], starts: Sequence[int], counts: Sequence[int], device: torch.device
    ) -> Placement:
        """Token j of part i goes to row rows[i], position starts[i] + j."""
        ends = [start + count for start, count in zip(starts, counts, strict=True)]
        at = [p for start, end in zip(starts, ends, strict=True) for p in range(start, end)]
        parts = zip(rows, accumulate(counts, initial=0), counts, ends, strict=False)  # one sum more
        return cls(integers(at).to(device), tuple(parts))

    @cached_property
    def segments(self) -> Tensor:
        """The parts as [4, S] on the CPU."""
        return integers(self.parts).reshape(-1, 4).T.contiguous()

    @cached_property
    def rows(self) -> Tensor:
        """[T] the row of every token."""
        return self.segments[0].repeat_interleave(self.segments[2]).to(self.positions.device)


class Rows(Protocol):
    """Ragged rows of one model: what the engine does to KV, whichever way it is kept."""

    lengths: list[int]
    rewinds: bool
    """Whether a rewind costs nothing, so that drafts can be taken back."""

    @property
    def capacity(self) -> int:
        """Most tokens that one row alone can have."""
        ...

    def fits(self, lengths: Sequence[int]) -> bool:
        """Whether rows of these lengths can be held at the same time."""
        ...

    def reserve(self, lengths: Sequence[int]) -> None:
        """Make room for the present rows to reach these lengths."""
        ...

    def admit(self, source: int | None = None, length: int = 0) -> None:
        """A new last row: empty, or beginning with the first `length` tokens of row `source`."""
        ...

    def rewind(self, row: int, length: int) -> None:
        """Forget what lies beyond `length`."""
        ...

    def swap(self, one: int, other: int) -> None:
        """Exchange two rows."""
        ...

    def drop(self, row: int) -> None:
        """Free a row; the last row takes its place."""
        ...

    @property
    def peak_bytes(self) -> int:
        """The most memory that rows have held so far."""
        ...


class KVCache(Rows, Protocol):
    """Rows whose keys and values are ours to write and read."""

    def commit(self, row: int, count: int) -> None:
        """Row `row` has `count` more tokens (their KV was written by the forward that just ran)."""
        ...

    def write(self, layer: int, key: Tensor, value: Tensor, at: Placement) -> None:
        """Store key [H, T, Dk] and value [H, T, Dv] of one packed forward."""
        ...

    def read(self, layer: int, first: int, count: int, length: int) -> tuple[Tensor, Tensor]:
        """Keys [count, H, length, Dk] and values of rows first..first+count-1."""
        ...


def round_up(value: int, granule: int) -> int:
    """The smallest multiple of `granule` that is at least `value`."""
    return -(-value // granule) * granule


def integers(values: Sequence[object]) -> Tensor:
    """Numbers, or tuples of so many, as int64 on the CPU: two to three times as fast as torch.tensor is with
    the few hundred that a step needs."""
    return torch.from_numpy(np.array(values, dtype=np.int64))


def zeros(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros that cost memory only where they are used: numpy's come untouched from the operating system,
    torch's are written."""
    if device.type != "cpu":
        return torch.zeros(count, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(count * dtype.itemsize, dtype=np.uint8)).view(dtype)


class SlotCache:
    """Contiguous slots [slots, H, length, D] per layer; slots * length never exceeds the pool."""

    rewinds = True

    def __init__(self, spec: CacheSpec) -> None:
        self.spec = spec
        self.lengths: list[int] = []
        self.slots = 0
        self.slot_length = 0
        self._peak_tokens = 0
        self._pools = [
            (
                zeros(spec.tokens * layer.heads * layer.key, spec.dtype, device),
                zeros(spec.tokens * layer.heads * layer.value, spec.dtype, device),
            )
            for layer, device in zip(spec.layers, spec.devices, strict=True)
        ]
        self._views: list[tuple[Tensor, Tensor]] = []

    @property
    def capacity(self) -> int:
        return self.spec.tokens

    def fits(self, lengths: Sequence[int]) -> bool:
        return len(lengths) * max(lengths, default=0) <= self.spec.tokens

    def reserve(self, lengths: Sequence[int]) -> None:
        rows, longest = len(lengths), max(lengths, default=0)
        if rows > self.slots or longest > self.slot_length:
            # room to double, so that a growing row moves its neighbours a few times only
            length = max(self.slot_length, round_up(2 * longest, SLOT_GRANULE))
            length = max(longest, min(length, self.spec.tokens // rows))
            self._lay_out(self.spec.tokens // length, length)
        self._peak_tokens = max(self._peak_tokens, rows * longest)

    def _lay_out(self, slots: int, length: int) -> None:
        rows, kept = len(self.lengths), max(self.lengths, default=0)
        views = []
        for index, (layer, (keys, values)) in enumerate(zip(self.spec.layers, self._pools, strict=True)):
            shape = (slots, layer.heads, length)
            size = slots * layer.heads * length
            view = (
                keys[: size * layer.key].view(*shape, layer.key),
                values[: size * layer.value].view(*shape, layer.value),
            )
            if kept:
                for old, new in zip(self._views[index], view, strict=True):
                    content = old[:rows, :, :kept].clone()  # both are views of one pool
                    new[:rows, :, :kept] = content
            views.append(view)
        self._views, self.slots, self.slot_length = views, slots, length

    def admit(self, source: int | None = None, length: int = 0) -> None:
        self.reserve([*self.lengths, max(1, length)])
        self.lengths.append(length)
        if source is not None:
            for view in self._tensors():
                view[len(self.lengths) - 1, :, :length] = view[source, :, :length]

    def rewind(self, row: int, length: int) -> None:
        self.lengths[row] = length

    def swap(self, one: int, other: int) -> None:
        kept = max(self.lengths[one], self.lengths[other])
        for view in self._tensors():
            content = view[one, :, :kept].clone()
            view[one, :, :kept] = view[other, :, :kept]
            view[other, :, :kept] = content
        self.lengths[one], self.lengths[other] = self.lengths[other], self.lengths[one]

    def drop(self, row: int) -> None:
        last = len(self.lengths) - 1
        if row != last:
            kept = self.lengths[last]
            for view in self._tensors():
                view[row, :, :kept] = view[last, :, :kept]
            self.lengths[row] = kept
        self.lengths.pop()

    def commit(self, row: int, count: int) -> None:
        self.lengths[row] += count

    def pools(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of all slots: [slots, H, length, Dk] and [.., Dv], contiguous."""
        return self._views[layer]

    def _tensors(self) -> list[Tensor]:
        return [tensor for view in self._views for tensor in view]

    def write(self, layer: int, key: Tensor, value: Tensor, at: Placement) -> None:
        heads = key.shape[0]
        index = at.flat.get((heads, key.device))
        if index is None:
            head = torch.arange(heads, device=at.rows.device)[:, None]  # [H, 1]
            index = ((at.rows * heads + head) * self.slot_length + at.positions).flatten().to(key.device)
            at.flat[heads, key.device] = index
        for view, new in zip(self._views[layer], (key, value), strict=True):
            size = new.shape[-1]
            view.view(-1, size).index_copy_(0, index, new.reshape(-1, size).to(view.dtype))

    def read(self, layer: int, first: int, count: int, length: int) -> tuple[Tensor, Tensor]:
        keys, values = self._views[layer]
        return keys[first : first + count, :, :length], values[first : first + count, :, :length]

    @property
    def peak_bytes(self) -> int:
        return self._peak_tokens * self.spec.bytes_per_token


class PagedCache:
    """Pages of PAGE tokens, [pages, PAGE, H, D] per layer, and a list of pages per row.

    Full pages of a shared prompt have one owner count per row; only a page that a row may still write is its
    own. One page more, the last, belongs to nobody: a padded batch writes there (`spare`)."""

    rewinds = True

    def __init__(self, spec: CacheSpec) -> None:
        self.spec = spec
        self.lengths: list[int] = []
        self.pages = spec.tokens // PAGE
        self.tables: list[list[int]] = []
        self._free = list(range(self.pages - 1, -1, -1))
        self._owners = [0] * self.pages
        self._peak_pages = 0
        self._tables_on: dict[object, Tensor] = {}
        self._pools = [
            (
                torch.zeros(self.pages + 1, PAGE, layer.heads, layer.key, dtype=spec.dtype, device=device),
                torch.zeros(self.pages + 1, PAGE, layer.heads, layer.value, dtype=spec.dtype, device=device),
            )
            for layer, device in zip(spec.layers, spec.devices, strict=True)
        ]

    @property
    def capacity(self) -> int:
        return self.pages * PAGE

    @property
    def spare(self) -> int:
        """The page that belongs to nobody."""
        return self.pages

    def pools(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of all pages: [pages + 1, PAGE, H, Dk] and [.., Dv]."""
        return self._pools[layer]

    def fits(self, lengths: Sequence[int]) -> bool:
        held = [len(table) for table in self.tables] + [0] * (len(lengths) - len(self.tables))
        need = sum(round_up(length, PAGE) // PAGE - have for length, have in zip(lengths, held, strict=True))
        return need <= len(self._free)  # what rows hold beyond these lengths is given back first

    def reserve(self, lengths: Sequence[int]) -> None:
        for row, length in enumerate(lengths):
            self._release(row, round_up(length, PAGE) // PAGE)
        for table, length in zip(self.tables, lengths, strict=True):
            while len(table) * PAGE < length:
                page = self._free.pop()
                self._owners[page] = 1
                table.append(page)
                self._tables_on.clear()
        self._peak_pages = max(self._peak_pages, self.pages - len(self._free))

    def admit(self, source: int | None = None, length: int = 0) -> None:
        self.lengths.append(length)
        self.tables.append([])
        self._tables_on.clear()
        if source is None:
            return
        whole, rest = divmod(length, PAGE)
        for page in self.tables[source][:whole]:
            self._owners[page] += 1
            self.tables[-1].append(page)
        if rest:  # the page in which both rows go on writing
            self.reserve(self.lengths)  # what rows hold beyond their lengths is given back first
            page = self.tables[-1][whole]
            for pool in (tensor for pools in self._pools for tensor in pools):
                pool[page, :rest] = pool[self.tables[source][whole], :rest]

    def rewind(self, row: int, length: int) -> None:
        """The pages stay with the row until room is next reserved: a step may go on writing into them."""
        self.lengths[row] = length
        page, rest = divmod(length, PAGE)
        # the row will write behind `length`, and other rows may read what is there
        assert not rest or self._owners[self.tables[row][page]] == 1, "rewound into a shared page"

    def _release(self, row: int, keep: int) -> None:
        table = self.tables[row]
        if len(table) <= keep:
            return
        for page in table[keep:]:
            self._owners[page] -= 1
            if self._owners[page] == 0:
                self._free.append(page)
        del table[keep:]
        self._tables_on.clear()

    def swap(self, one: int, other: int) -> None:
        tables, lengths = self.tables, self.lengths
        tables[one], tables[other] = tables[other], tables[one]
        lengths[one], lengths[other] = lengths[other], lengths[one]
        self._tables_on.clear()

    def drop(self, row: int) -> None:
        self.swap(row, len(self.lengths) - 1)
        self._release(len(self.tables) - 1, 0)
        self.tables.pop()
        self.lengths.pop()

    def commit(self, row: int, count: int) -> None:
        self.lengths[row] += count

    def _table(self, first: int, count: int, pages: int, device: torch.device) -> Tensor:
        """Page numbers of some rows, [count, pages], padded with page 0 (masked by attention)."""
        where = (first, count, pages, device)
        table = self._tables_on.get(where)
        if table is None:
            padded = [(t + [0] * pages)[:pages] for t in self.tables[first : first + count]]
            table = self._tables_on[where] = torch.tensor(padded, dtype=torch.long, device=device)
        return table

    def write(self, layer: int, key: Tensor, value: Tensor, at: Placement) -> None:
        index = at.flat.get(key.device)
        if index is None:
            longest = max(len(table) for table in self.tables)
            table = self._table(0, len(self.tables), longest, at.rows.device)
            page = table[at.rows, at.positions // PAGE]
            index = at.flat[key.device] = (page * PAGE + at.positions % PAGE).to(key.device)
        for pool, new in zip(self._pools[layer], (key, value), strict=True):
            pool.flatten(0, 1).index_copy_(0, index, new.transpose(0, 1).to(pool.dtype))

    def read(self, layer: int, first: int, count: int, length: int) -> tuple[Tensor, Tensor]:
        keys, values = self._pools[layer]
        table = self._table(first, count, round_up(length, PAGE) // PAGE, keys.device)
        return tuple(pool[table].flatten(1, 2)[:, :length].transpose(1, 2) for pool in (keys, values))  # type: ignore[return-value]

    @property
    def peak_bytes(self) -> int:
        return self._peak_pages * PAGE * self.spec.bytes_per_token
