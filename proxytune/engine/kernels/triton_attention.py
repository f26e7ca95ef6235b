"""Triton kernels of `paged_attention` and `ragged_attention`: split-KV attention over pages, for rows with
equally many new tokens, or for packed tokens of rows with any number.

Run so far in Triton's interpreter on CPU tensors, and compiled for sm_80 and sm_90 without being run there;
block sizes, warps, stages and the number of splits are therefore reasoned, not tuned. Importing this module
needs the package `triton`.

Softmax works in base 2. Within one program all query heads of a KV head and all new tokens form one tile, so
that keys and values are read once for them; of a row with many new tokens it is some of them."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from proxytune.engine.kernels.scores import ScoreRule

WIDE = 512
"""Programs to aim for: about four per multiprocessor of an H200. Fewer tiles than that are split along the
keys."""
MOST_SPLITS = 128


@triton.jit
def _tile(rows, unit, QUERY: tl.constexpr, RAGGED: tl.constexpr):
    """The row of the table, its first new token among all, how many these are, and the length with them."""
    if RAGGED:
        row, start = tl.load(rows + unit * 4), tl.load(rows + unit * 4 + 1)
        count, length = tl.load(rows + unit * 4 + 2), tl.load(rows + unit * 4 + 3)
    else:
        row, start, length = unit, unit * QUERY, tl.load(rows + unit)
        count = unit * 0 + QUERY
    return row, start, count.to(tl.int32), length.to(tl.int32)


@triton.jit
def _span(length, new, window, split, splits, BLOCK_N: tl.constexpr, WINDOWED: tl.constexpr):
    """First and last key of one split: whole blocks, the visible keys of the row shared out evenly."""
    start = length * 0
    if WINDOWED:
        start = tl.maximum(length - new - window + 1, 0)
    span = (length - start + splits - 1) // splits
    span = (span + BLOCK_N - 1) // BLOCK_N * BLOCK_N
    first = start + split * span
    return first, tl.minimum(first + span, length)


@triton.jit
def _visible(scores, n, at, last, window, softcap, WINDOWED: tl.constexpr, CAPPED: tl.constexpr):
    """Scores [M, N] in base 2, capped, and -inf where the tokens at positions `at` do not see keys `n`."""
    if CAPPED:  # tanh(x) = 1 - 2 / (exp(2x) + 1), right at both ends
        scores = softcap * (1.0 - 2.0 / (tl.exp(2.0 * scores / softcap) + 1.0))
    seen = (n < last)[None, :] & (n[None, :] <= at[:, None])
    if WINDOWED:
        seen = seen & (at[:, None] - n[None, :] < window)
    return tl.where(seen, scores * 1.4426950408889634, float("-inf"))


@triton.jit
def _load(at, mask, WIDEN: tl.constexpr):
    """A masked load, zero elsewhere; WIDEN makes it float32."""
    found = tl.load(at, mask=mask, other=0.0)
    if WIDEN:
        found = found.to(tl.float32)
    return found


@triton.jit
def _numbers(v, scores):
    """Values [N, DV] with zeros for those that are no numbers, which a weight of 0 would not hide; and NaN
    for the queries, of scores [M, N], that see one of them, 0 for the others: [M]."""
    whole = tl.min(tl.where(tl.abs(v.to(tl.float32)) < float("inf"), 1, 0), 1)  # [N]
    spoilt = (whole == 0)[None, :] & (scores > float("-inf"))
    return tl.where((whole == 1)[:, None], v, 0.0).to(v.dtype), tl.sum(tl.where(spoilt, float("nan"), 0.0), 1)


@triton.jit
def _store(
    acc, best, total, partial, maxima, sums, out, head, token, live, heads, split, splits,
    DV: tl.constexpr, DV_PAD: tl.constexpr, DIRECT: tl.constexpr,
):  # fmt: skip
    """Write a tile's result to `out` [T, H, DV], or its part of it to `partial` [T, H, S, DV]."""
    best = tl.where(total == total, best, 0.0)  # a split with a NaN counts, whatever its scores are
    dv = tl.arange(0, DV_PAD)
    wanted = live[:, None] & (dv < DV)[None, :]
    if DIRECT:
        result = acc / tl.where(total == 0.0, 1.0, total)[:, None]
        place = (token * heads + head)[:, None] * DV + dv[None, :]
        tl.store(out + place, result.to(out.dtype.element_ty), mask=wanted)
    else:
        unit = (token * heads + head) * splits + split
        tl.store(maxima + unit, best, mask=live)
        tl.store(sums + unit, total, mask=live)
        place = unit[:, None] * DV + dv[None, :]
        tl.store(partial + place, acc, mask=wanted & (best > float("-inf"))[:, None])


@triton.jit
def attend_kernel(
    query, keys, values, table, rows, sinks, partial, maxima, sums, out,
    q_row, q_head, q_token, k_page, k_slot, k_head, v_page, v_slot, v_head, table_row,
    heads, pages, splits, window, scaling, softcap,
    GROUP: tl.constexpr, QUERY: tl.constexpr, PAGE: tl.constexpr,
    DK: tl.constexpr, DK_PAD: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr,
    SINKS: tl.constexpr, DIRECT: tl.constexpr, RAGGED: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """One tile of queries against one split of its row's keys: the result itself (DIRECT), or its
    unnormalised part with the largest score and the sum of weights. Every row has QUERY new tokens, and
    `rows` are their lengths; RAGGED, `rows` are tiles of up to QUERY tokens of some row."""
    TILES: tl.constexpr = (GROUP * QUERY + BLOCK_M - 1) // BLOCK_M
    split, kv_head = tl.program_id(2), tl.program_id(0) // TILES
    m = (tl.program_id(0) % TILES) * BLOCK_M + tl.arange(0, BLOCK_M)  # head of the group * QUERY + new token
    head, token = kv_head * GROUP + m // QUERY, m % QUERY
    dk, dv = tl.arange(0, DK_PAD), tl.arange(0, DV_PAD)
    row, start, count, length = _tile(rows, tl.program_id(1).to(tl.int64), QUERY, RAGGED)
    q_from = query + (start * q_token if RAGGED else row * q_row)
    live = (m < GROUP * QUERY) & (token < count)
    length = tl.minimum(length, pages * PAGE)
    at = length - count + token  # position of each new token
    first, last = _span(length, count, window, split, splits, BLOCK_N, WINDOWED)
    last = tl.minimum(last, tl.max(tl.where(live, at, -1), 0) + 1)  # no token of the tile sees further
    q_at = q_from + head[:, None] * q_head + token[:, None] * q_token + dk[None, :]
    q = _load(q_at, live[:, None] & (dk < DK)[None, :], WIDEN)  # [M, DK]
    best = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, DV_PAD), tl.float32)
    if SINKS:  # a sink is one more score without a value; the first split counts it
        sink = tl.load(sinks + head, mask=live, other=0.0).to(tl.float32) * 1.4426950408889634
        best = tl.where(split == 0, sink, best)
        total = tl.where(split == 0, 1.0, total)

    for n_first in range(first, last, BLOCK_N):
        n = n_first + tl.arange(0, BLOCK_N)
        inside = n < last  # what lies beyond is never read, so it may be anything
        page = tl.load(table + row * table_row + n // PAGE, mask=inside, other=0).to(tl.int64)
        k_at = keys + (page * k_page + n % PAGE * k_slot)[None, :] + kv_head * k_head + dk[:, None]
        k = _load(k_at, inside[None, :] & (dk < DK)[:, None], WIDEN)  # [DK, N]
        scores = tl.dot(q, k, input_precision="ieee") * scaling  # [M, N]
        scores = _visible(scores, n, at, last, window, softcap, WINDOWED, CAPPED)
        higher = tl.maximum(best, tl.max(scores, 1))
        anchor = tl.where(higher == float("-inf"), 0.0, higher)  # nothing visible yet
        fade = tl.exp2(best - anchor)
        weights = tl.exp2(scores - anchor[:, None])
        total = total * fade + tl.sum(weights, 1)
        v_at = values + (page * v_page + n % PAGE * v_slot)[:, None] + kv_head * v_head + dv[None, :]
        v = _load(v_at, inside[:, None] & (dv < DV)[None, :], WIDEN)  # [N, DV]
        v, spoilt = _numbers(v, scores)
        total += spoilt
        weights = weights.to(values.dtype.element_ty).to(v.dtype)
        acc = tl.dot(weights, v, acc * fade[:, None], input_precision="ieee")
        best = higher

    _store(
        acc, best, total, partial, maxima, sums, out, head, start + token, live, heads, split, splits,
        DV, DV_PAD, DIRECT,
    )  # fmt: skip


@triton.jit
def combine_kernel(
    partial, maxima, sums, out, splits,
    DV: tl.constexpr, DV_PAD: tl.constexpr, SPLITS_PAD: tl.constexpr,
):  # fmt: skip
    """Add up the splits of one new token of one head."""
    unit = tl.program_id(0).to(tl.int64)
    split, dv = tl.arange(0, SPLITS_PAD), tl.arange(0, DV_PAD)
    best = tl.load(maxima + unit * splits + split, mask=split < splits, other=float("-inf"))
    total = tl.load(sums + unit * splits + split, mask=split < splits, other=0.0)
    filled = best > float("-inf")  # an empty split left its part of `partial` unwritten
    highest = tl.max(best, 0)
    weight = tl.exp2(best - tl.where(highest == float("-inf"), 0.0, highest))
    parts = tl.load(
        partial + (unit * splits + split)[:, None] * DV + dv[None, :],
        mask=filled[:, None] & (dv < DV)[None, :],
        other=0.0,
    )
    total = tl.sum(total * weight, 0)
    result = tl.sum(parts * weight[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    tl.store(out + unit * DV + dv, result.to(out.dtype.element_ty), mask=dv < DV)


def blocks(query: int, group: int, size: int, dtype: torch.dtype) -> tuple[int, int, int, int]:
    """BLOCK_M, BLOCK_N, warps and stages for tiles of query * group rows and heads of `size` (padded)."""
    if dtype == torch.float32:  # no tensor cores: larger tiles would not fit the registers
        return 16, 16, 4, 2
    rows = min(64, max(16, triton.next_power_of_2(query * group)))
    return (rows, 32, 8 if rows == 64 else 4, 2) if size > 128 else (rows, 64, 4, 3)


def default_splits(tiles: int, tokens: int, block: int) -> int:
    """Splits for that many tiles and a table of that many tokens: enough programs, none below one block."""
    return max(1, min(-(-WIDE // tiles), -(-tokens // block), MOST_SPLITS))


def tile_tokens(longest: int, group: int, dtype: torch.dtype) -> int:
    """Tokens of a ragged tile, a power of two so that few kernels are compiled: what fills one with the query
    heads of a KV head."""
    most = 16 if dtype == torch.float32 else 64
    return min(int(triton.next_power_of_2(longest)), max(1, most // int(triton.next_power_of_2(group))))


class QueryCut(NamedTuple):
    """How the queries of one call lie, and how its work is cut."""

    new: int
    """New tokens of every row, or at most of a tile."""
    ragged: bool
    steps: tuple[int, int, int]
    """From row to row, head to head and token to token of the queries."""
    splits: int | None


def launch(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    table: Tensor,
    lengths: Tensor,
    rule: ScoreRule,
    splits: int | None,
) -> Tensor:
    """The kernels on inputs for which `paged_attention.supported` holds; shapes are described there."""
    rows, heads, new, _ = query.shape
    row, head, token, _ = query.stride()
    out = torch.empty(rows, new, heads, values.shape[-1], dtype=query.dtype, device=query.device)
    cut = QueryCut(new, False, (row, head, token), splits)
    _launch(query, keys, values, table, lengths, out, rule, cut)
    return out.transpose(1, 2)


def launch_ragged(
    query: Tensor,  # [T, H, Dk]
    keys: Tensor,  # [pages, PAGE, Hkv, Dk]
    values: Tensor,  # [pages, PAGE, Hkv, Dv]
    table: Tensor,  # [R, P]
    tiles: Tensor,  # [N, 4]: a row of the table, its first token among all, how many, its length with them
    rule: ScoreRule,
    most: int,
    splits: int | None = None,
) -> Tensor:
    """The kernels on packed tokens, all of which are in tiles of at most `most` -> [T, H, Dv]."""
    tokens, heads, _ = query.shape
    out = torch.empty(tokens, heads, values.shape[-1], dtype=query.dtype, device=query.device)
    cut = QueryCut(most, True, (0, query.stride(1), query.stride(0)), splits)
    _launch(query, keys, values, table, tiles, out, rule, cut)
    return out


def _launch(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    table: Tensor,
    rows: Tensor,  # [R] lengths, or [N, 4] tiles
    out: Tensor,  # [.., H, Dv]
    rule: ScoreRule,
    cut: QueryCut,
) -> None:
    window, softcap, sinks = rule.window, rule.softcap, rule.sinks
    dk, page, kv_heads, dv = query.shape[-1], keys.shape[1], keys.shape[2], values.shape[-1]
    heads, units = out.shape[-2], out.numel() // dv
    group = heads // kv_heads
    dk_pad, dv_pad = (max(16, triton.next_power_of_2(size)) for size in (dk, dv))
    block_m, block_n, warps, stages = blocks(cut.new, group, max(dk_pad, dv_pad), query.dtype)
    parts = kv_heads * triton.cdiv(group * cut.new, block_m)
    splits = cut.splits or default_splits(len(rows) * parts, table.shape[1] * page, block_n)
    direct = splits == 1
    partial = torch.empty(0 if direct else units * splits, dv, dtype=torch.float32, device=query.device)
    maxima, sums = torch.empty(2, len(partial), dtype=torch.float32, device=query.device)
    with torch.cuda.device_of(query):  # type: ignore[no-untyped-call]
        attend_kernel[(parts, len(rows), splits)](
            query, keys, values, table, rows, rows if sinks is None else sinks, partial, maxima, sums, out,
            *cut.steps, *keys.stride()[:3], *values.stride()[:3], table.stride(0),
            heads, table.shape[1], splits, window or 0, rule.scale(dk), softcap or 0.0,
            GROUP=group, QUERY=cut.new, PAGE=page, DK=dk, DK_PAD=dk_pad, DV=dv, DV_PAD=dv_pad,
            BLOCK_M=block_m, BLOCK_N=block_n, WINDOWED=window is not None, CAPPED=softcap is not None,
            SINKS=sinks is not None, DIRECT=direct, RAGGED=cut.ragged,
            # the interpreter multiplies the bits of bfloat16 (triton-lang/triton#11584)
            WIDEN=triton.knobs.runtime.interpret and query.dtype == torch.bfloat16,
            num_warps=warps, num_stages=stages,
        )  # fmt: skip
        if not direct:
            combine_kernel[(units,)](
                partial, maxima, sums, out, splits,
                DV=dv, DV_PAD=dv_pad, SPLITS_PAD=triton.next_power_of_2(splits), num_warps=4,
            )  # fmt: skip
