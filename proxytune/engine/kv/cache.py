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
        return cls(integers(at, device), tuple(parts))

    @cached_property
    def segments(self) -> Tensor:
        """The parts as [4, S] on the CPU."""
        return integers(self.parts).reshape(-1, 4).T.contiguous()

    @cached_property
    def rows(self) -> Tensor:
        """[T] the row of every token."""
        return sent(self.segments[0].repeat_interleave(self.segments[2]), self.positions.device)


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
        """Whether rows of these lengths fit at the same time."""
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

    def clear(self) -> None:
        """Free every row, also where an interruption left them half moved."""
        ...

    @property
    def peak_bytes(self) -> int:
        """The most memory that rows have taken so far."""
        ...


class KVCache(Rows, Protocol):
    """Rows whose keys and values are ours to write and read."""

    spec: CacheSpec

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


CPU = torch.device("cpu")


def integers(values: Sequence[object], device: torch.device = CPU) -> Tensor:
    """Numbers, or tuples of so many, as int64: two to three times as fast as torch.tensor is with the few
    hundred that a step needs."""
    return sent(torch.from_numpy(np.array(values, dtype=np.int64)), device)


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on a device. Nobody waits, as would be for memory that is not pinned: until all
    that was launched before is done. torch does not give pinned memory out again before its copy is done."""
    pinned = tensor.pin_memory() if device.type == "cuda" else tensor
    return pinned.to(device, non_blocking=True)


def zeros(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros that cost memory only where they are used: numpy's come untouched from the operating system,
    torch's are written."""
    if device.type != "cpu":
        return torch.zeros(count, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(count * dtype.itemsize, dtype=np.uint8)).view(dtype)
