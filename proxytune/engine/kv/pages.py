"""The KV cache in pages, for CUDA: rows are lists of pages; rows that share a prompt share its full pages."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from proxytune.engine.fused import place
from proxytune.engine.kv.cache import CacheSpec, Placement, integers, round_up

PAGE = 16  # tokens per page


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
        self._tables_on: dict[object, Tensor] = {}
        self.clear()
        self._peak_pages = 0
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
        counts = [len(table) for table in self.tables] + [0] * (len(lengths) - len(self.tables))
        need = sum(
            round_up(length, PAGE) // PAGE - have for length, have in zip(lengths, counts, strict=True)
        )
        return need <= len(self.free_pages)  # what rows hold beyond these lengths is given back first

    def reserve(self, lengths: Sequence[int]) -> None:
        for row, length in enumerate(lengths):
            self._release(row, round_up(length, PAGE) // PAGE)
        for table, length in zip(self.tables, lengths, strict=True):
            while len(table) * PAGE < length:
                page = self.free_pages.pop()
                self.owners[page] = 1
                table.append(page)
                self._tables_on.clear()
        self._peak_pages = max(self._peak_pages, self.pages - len(self.free_pages))

    def admit(self, source: int | None = None, length: int = 0) -> None:
        self.lengths.append(length)
        self.tables.append([])
        self._tables_on.clear()
        if source is None:
            return
        whole, rest = divmod(length, PAGE)
        for page in self.tables[source][:whole]:
            self.owners[page] += 1
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
        # the row will write after `length`, and other rows may read what is there
        assert not rest or self.owners[self.tables[row][page]] == 1, "rewound into a shared page"

    def _release(self, row: int, keep: int) -> None:
        table = self.tables[row]
        if len(table) <= keep:
            return
        for page in table[keep:]:
            self.owners[page] -= 1
            if self.owners[page] == 0:
                self.free_pages.append(page)
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

    def clear(self) -> None:
        self.lengths.clear()
        self.tables.clear()
        self._tables_on.clear()
        self.free_pages = list(range(self.pages - 1, -1, -1))
        self.owners = [0] * self.pages

    def commit(self, row: int, count: int) -> None:
        self.lengths[row] += count

    def table(self, rows: Sequence[int], pages: int, device: torch.device) -> Tensor:
        """Page numbers of some rows, [rows, pages], padded with page 0 (masked by attention)."""
        where = (tuple(rows), pages, device)
        table = self._tables_on.get(where)
        if table is None:
            padded = [(self.tables[row] + [0] * pages)[:pages] for row in rows]
            table = self._tables_on[where] = integers(padded, device)
        return table

    def slots(self, at: Placement, device: torch.device) -> Tensor:
        """Where tokens go in a pool seen as [pages * PAGE, H, D]: [T]."""
        index = at.flat.get(device)
        if index is None:
            longest = max(len(table) for table in self.tables)
            table = self.table(range(len(self.tables)), longest, at.rows.device)
            page = table[at.rows, at.positions // PAGE]
            index = at.flat[device] = (page * PAGE + at.positions % PAGE).to(device)
        return index

    def write(self, layer: int, key: Tensor, value: Tensor, at: Placement) -> None:
        place(key.transpose(0, 1), value.transpose(0, 1), self._pools[layer], self.slots(at, key.device))

    def read(self, layer: int, first: int, count: int, length: int) -> tuple[Tensor, Tensor]:
        keys, values = self._pools[layer]
        table = self.table(range(first, first + count), round_up(length, PAGE) // PAGE, keys.device)
        return tuple(pool[table].flatten(1, 2)[:, :length].transpose(1, 2) for pool in (keys, values))  # type: ignore[return-value]

    @property
    def peak_bytes(self) -> int:
        return self._peak_pages * PAGE * self.spec.bytes_per_token
