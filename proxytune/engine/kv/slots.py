"""The KV cache as contiguous slots, for the CPU: every row owns a slot and the rows stay compact, so that
attention reads a view. When a row outgrows its slot the pool is laid out anew with fewer, longer slots."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from proxytune.engine.kv.cache import CacheSpec, Placement, round_up, zeros

SLOT_GRANULE = 64  # slots grow in multiples of this many tokens


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

    def clear(self) -> None:
        self.lengths.clear()

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
