"""The attention of a decoding step whose lengths and page numbers stay on the device.

The counterpart of `attention.Packed` for steps that a CUDA graph captures: shapes are fixed, everything that
changes from step to step is a tensor, and nothing is read by the host. Every row has the same number of new
tokens; those that do not count go to a page that belongs to nobody."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from proxytune.engine.fused import Rotation, place, rotate_and_place
from proxytune.engine.kernels.paged_attention import paged_attention
from proxytune.engine.kernels.scores import ScoreRule
from proxytune.engine.kv.pages import PAGE, PagedCache


@dataclass
class DevicePart:
    """One model's tokens within a forward: R rows with Q new tokens each, in a row."""

    cache: PagedCache
    table: Tensor  # [R, P] page numbers, padded with the cache's spare page
    lengths: Tensor  # [R] tokens of each row, the new ones included; 0 where a row is idle
    slots: Tensor  # [R * Q] where the new tokens' keys and values go in a pool seen as [pages * PAGE, H, D]
    tokens: slice
    """Where they are among the tokens of the forward."""


@dataclass
class DevicePacked:
    """The state of one forward: one part per model on these weights."""

    parts: Sequence[DevicePart]

    def attend(
        self,
        layer: int,
        query: Tensor,  # [1, H, T, Dk]
        key: Tensor,  # [1, Hkv, T, Dk]
        value: Tensor,  # [1, Hkv, T, Dv]
        rule: ScoreRule,
        rotation: Rotation | None = None,
    ) -> Tensor:
        """Store the new keys and values, rotated here if there is a rotation, and let the queries see them
        and what came before: -> [1, T, H, Dv]."""
        results = []
        for part in self.parts:
            pools = part.cache.pools(layer)
            mine, fresh, content = (
                t[0, :, part.tokens].transpose(0, 1) for t in (query, key, value)
            )  # [T, H, D]
            if rotation is None:
                place(fresh, content, pools, part.slots)
            else:
                mine = rotate_and_place(mine, fresh, content, rotation.of(part.tokens), pools, part.slots)
            rows = part.lengths.shape[0]
            q = mine.reshape(rows, -1, *mine.shape[1:]).transpose(1, 2)  # [R, H, Q, D]
            result = paged_attention(q, *pools, part.table, part.lengths, rule)
            results.append(result.transpose(1, 2).flatten(0, 1))  # [R * Q, H, Dv]
        return (results[0] if len(results) == 1 else torch.cat(results))[None]


def slots_of(table: Tensor, positions: Tensor, real: Tensor, spare: int) -> Tensor:
    """Where tokens go: table [R, P], positions [R, Q] and which of them count [R, Q] -> [R * Q].

    The others go to the first slot of page `spare`; several may, and whose value stays there is all one."""
    page = table.gather(1, positions // PAGE)
    slots = page * PAGE + positions % PAGE
    return slots.masked_fill(~real, spare * PAGE).flatten()
