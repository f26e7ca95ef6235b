"""Packed tokens of ragged rows over pages, in one call per layer: prompts, and tokens of rows that decode
where no graph does.

By torch's attention of ragged rows where many tokens are new beside what is there (`varlen`), since keys and
values have to be copied out of their pages for it; else by our own kernel, which reads pages as they lie.
Where neither is right, it is written out row by row."""

from __future__ import annotations

from torch import Tensor

from proxytune.engine.attention import varlen
from proxytune.engine.attention.ragged import Ragged, tiles, tried, written_out
from proxytune.engine.kernels.scores import ScoreRule
from proxytune.engine.kernels.trial import APART, farthest, trusted
from proxytune.engine.kv.cache import integers


def attend_pages(rows: Ragged, query: Tensor, pools: tuple[Tensor, Tensor], rule: ScoreRule) -> Tensor:
    """Queries [T, H, Dk] of a part, whose keys and values are stored -> [T, H, Dv]; for heads for which
    `paged_attention.supported` holds."""
    if varlen.takes(query, pools, rule) and varlen.pays(rows.parts):
        return varlen.attend(query, pools, rows.copied(query.device), rule)
    from proxytune.engine.kernels.triton_attention import launch_ragged, tile_tokens

    table, group = rows.table(query.device), query.shape[1] // pools[0].shape[2]
    most = tile_tokens(rows.longest, group, query.dtype)
    if not _right(query, pools, rule, most):
        return written_out(query, pools, table, rows.parts, rule)
    return launch_ragged(query, *pools, table, rows.tiles(most, query.device), rule, most)


def _right(query: Tensor, pools: tuple[Tensor, Tensor], rule: ScoreRule, most: int) -> bool:
    """Whether the kernel was found to be right for such heads, tiles and scores."""
    sizes = query.shape[1:], *(pool.shape[1:] for pool in pools)
    shape = sizes, query.dtype, rule.scaling, rule.window, rule.softcap, rule.sinks is not None, most

    def apart() -> float:
        from proxytune.engine.kernels.triton_attention import launch_ragged

        q, own, table, parts = tried(query, pools, most + 1)
        there = integers(tiles(parts, most), query.device)
        got = launch_ragged(q, *own, table, there, rule, most)
        return farthest(got, written_out(q, own, table, parts, rule))

    return trusted("ragged attention kernel", shape, query.device, apart, APART[query.dtype])
