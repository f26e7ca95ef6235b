"""Triton kernels that draw tokens: temperature, min-p, top-k, top-p, noise and the choice, in three launches.

Nothing is sorted. What min-p, top-k and top-p leave is every logit above some floor and, of the tokens whose
logit is just that floor, those up to some id. So a cut is two numbers per row, and the floor is found by
bisection over the bits of a float: counting for top-k, adding up probabilities for top-p. Most often it lies
among the few tokens that are near the largest, and then only these are looked at.

Probabilities are rounded to float32 and added up in float64, as `logits.warp` does it on a CPU. Run so far in
Triton's interpreter on CPU tensors, and compiled for sm_80 and sm_90 without being run there. Importing this
module needs the package `triton`."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

Settings = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""`sampling.DrawSettings`: temperature, top-p, min-p, top-k and key, [R] each."""

NEAR = 12.0
"""How far below the largest logit, divided by the temperature, the floor is looked for first."""


class DrawBlocks(NamedTuple):
    """How the work of one call is cut."""

    scanned: int = 4096
    """Tokens that one row's program looks at in one go."""
    few: int = 4096
    """Most tokens near the largest that are looked at apart from all."""
    drawn: int = 1024
    """Tokens among which one program draws."""
    warps: int = 16
    """Of a program that looks for a floor."""


BLOCKS = DrawBlocks()


@triton.jit
def _scaled(source, at, size, temperature):
    """Logits divided by the temperature, -inf beyond the last."""
    return tl.div_rn(tl.load(source + at, mask=at < size, other=float("-inf")), temperature)


@triton.jit
def _largest(source, size, temperature, BLOCK: tl.constexpr):
    """The largest of them."""
    highest = tl.full((BLOCK,), float("-inf"), tl.float32)
    for first in range(0, size, BLOCK):
        highest = tl.maximum(highest, _scaled(source, first + tl.arange(0, BLOCK), size, temperature))
    return tl.max(highest, 0)


@triton.jit
def _bits(value):
    """float32 -> an integer, in the order of the numbers."""
    bits = value.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)


@triton.jit
def _number(bits):
    """`_bits` undone."""
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _kth(source, size, temperature, k, low, high, BLOCK: tl.constexpr):
    """The k-th largest number between two, of which at least k are not below `low`; and what all from there
    on weigh: exp(logit - high)."""
    lowest, highest = _bits(low), _bits(high)
    while lowest < highest:
        middle = (lowest + highest + 1) >> 1
        number = tl.where(middle < 0, middle ^ 0x7FFFFFFF, middle).to(tl.int32).to(tl.float32, bitcast=True)
        count = tl.zeros((BLOCK,), tl.int32)
        for first in range(0, size, BLOCK):
            at = first + tl.arange(0, BLOCK)
            x = tl.div_rn(tl.load(source + at, mask=at < size, other=float("-inf")), temperature)
            count += (x >= number).to(tl.int32)
        if tl.sum(count, 0) >= k:
            lowest = middle
        else:
            highest = middle - 1
    floor = _number(lowest)
    weights = tl.zeros((BLOCK,), tl.float64)
    for first in range(0, size, BLOCK):
        x = _scaled(source, first + tl.arange(0, BLOCK), size, temperature)
        weights += tl.where(x >= floor, tl.exp(x - high), 0.0).to(tl.float64)
    return floor, tl.sum(weights, 0)


@triton.jit
def _nucleus(source, size, temperature, best, weight, p, low, BLOCK: tl.constexpr):
    """The smallest number from `low` on before which there is less than p of the probability; how many tokens
    have it, and how many of these are left."""
    lowest, highest = _bits(low), _bits(best)
    above, tied = weight.to(tl.float64) * 0.0, lowest.to(tl.int32) * 0
    floor, mass, done = best, weight * 0.0, False
    while not done:  # the last time at the floor itself
        done = lowest >= highest
        middle = (lowest + highest) >> 1
        floor = tl.where(middle < 0, middle ^ 0x7FFFFFFF, middle).to(tl.int32).to(tl.float32, bitcast=True)
        masses, count = tl.zeros((BLOCK,), tl.float64), tl.zeros((BLOCK,), tl.int32)
        for first in range(0, size, BLOCK):
            at = first + tl.arange(0, BLOCK)
            x = tl.div_rn(tl.load(source + at, mask=at < size, other=float("-inf")), temperature)
            mass_of = tl.div_rn(tl.exp(x - best), weight)
            masses += tl.where(x > floor, mass_of, 0.0).to(tl.float64)
            count += (x == floor).to(tl.int32)
        above, tied = tl.sum(masses, 0), tl.sum(count, 0)
        mass = tl.div_rn(tl.exp(floor - best), weight)
        # as a running sum has it that is rounded to float32
        if (above + mass.to(tl.float64)).to(tl.float32) - mass < p:
            highest = middle
        else:
            lowest = middle + 1
    kept, most = tied * 0 + 1, tl.maximum(tied, 1)
    while kept < most:
        middle = (kept + most + 1) >> 1
        if (above + middle.to(tl.float64) * mass.to(tl.float64)).to(tl.float32) - mass < p:
            kept = middle
        else:
            most = middle - 1
    return floor, tied, kept


@triton.jit
def _nth(source, size, temperature, floor, wanted, BLOCK: tl.constexpr):
    """The id of the wanted-th token whose logit is the floor."""
    seen, last = wanted * 0, wanted * 0
    for first in range(0, size, BLOCK):
        at = first + tl.arange(0, BLOCK)
        x = tl.div_rn(tl.load(source + at, mask=at < size, other=float("-inf")), temperature)
        tied = (x == floor).to(tl.int32)
        rank = seen + tl.cumsum(tied, 0)
        last = tl.maximum(last, tl.max(tl.where((tied > 0) & (rank <= wanted), at, 0), 0))
        seen += tl.sum(tied, 0)
    return last


@triton.jit
def cut_kernel(
    logits, temperatures, top_ks, top_ps, min_ps, near, floors, lasts,
    row_step, real_step, whole_step, size, queries,
    BLOCK: tl.constexpr, FEW: tl.constexpr, NEAR: tl.constexpr,
):  # fmt: skip
    """What min-p, top-k and top-p leave of a row: all above a floor, and at it the ids up to a last one."""
    unit = tl.program_id(0).to(tl.int64)
    row = unit // queries
    temperature = tl.load(temperatures + row * real_step).to(tl.float32)
    k, wanted = tl.load(top_ks + row * whole_step), tl.load(top_ps + row * real_step)
    min_p, p = tl.load(min_ps + row * real_step), wanted.to(tl.float32)
    tl.store(floors + unit, float("-inf"))
    tl.store(lasts + unit, size)
    if (temperature <= 0.0) | ((k <= 0) & (wanted >= 1.0) & (min_p <= 0.0)):
        return
    source, there = logits + unit * row_step, near + unit * FEW
    best = _largest(source, size, temperature, BLOCK)
    if (tl.abs(best) < float("inf")) == 0:
        return  # these are no probabilities
    least = tl.log(tl.where(min_p > 0.0, min_p, 1.0)).to(tl.float32)
    floor = tl.where(min_p > 0.0, best + least, float("-inf"))

    # the tokens near the largest, and what they weigh beside all
    low = tl.maximum(floor, best - NEAR)
    count = k.to(tl.int32) * 0
    all_weights, near_weights = tl.zeros((BLOCK,), tl.float64), tl.zeros((BLOCK,), tl.float64)
    for first in range(0, size, BLOCK):
        at = first + tl.arange(0, BLOCK)
        x = _scaled(source, at, size, temperature)
        weights = tl.exp(x - best).to(tl.float64)
        close = ((x >= low) & (at < size)).to(tl.int32)
        all_weights += tl.where(x >= floor, weights, 0.0)
        near_weights += tl.where(close > 0, weights, 0.0)
        place = count + tl.cumsum(close, 0) - 1
        tl.store(there + place, x, mask=(close > 0) & (place < FEW))
        count += tl.sum(close, 0)
    tl.debug_barrier()  # what some threads of the program wrote, others read
    whole, here = tl.sum(all_weights, 0), tl.sum(near_weights, 0)

    # where the floor is not among them, it is looked for among all
    apart = tl.where(k > 0, count >= tl.minimum(k, size), (wanted >= 1.0) | (here >= whole * wanted * 1.0001))
    many, divisor = size, temperature
    if (count <= FEW) & apart:
        source, many, divisor = there, count, temperature / temperature
    else:
        low = tl.maximum(floor, -3.4028234663852886e38)
    if k > 0:
        finite = k.to(tl.int32) * 0
        for first in range(0, many, BLOCK):
            x = _scaled(source, first + tl.arange(0, BLOCK), many, divisor)
            finite += tl.sum((x >= low).to(tl.int32), 0)
        if finite >= k:
            floor, whole = _kth(source, many, divisor, k, low, best, BLOCK)
    if wanted < 1.0:
        start = tl.maximum(floor, low)
        floor, tied, kept = _nucleus(source, many, divisor, best, whole.to(tl.float32), p, start, BLOCK)
        if kept < tied:
            row_of = logits + unit * row_step
            tl.store(lasts + unit, _nth(row_of, size, temperature, floor, kept, BLOCK))
    tl.store(floors + unit, floor)


@triton.jit
def draw_kernel(
    logits, temperatures, keys, positions, floors, lasts, bests, tokens,
    row_step, real_step, whole_step, size, queries,
    BLOCK: tl.constexpr, CUT: tl.constexpr,
):  # fmt: skip
    """The best of one part of the vocabulary: the largest logit, or the largest with its noise."""
    unit, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = unit // queries
    at = part * BLOCK + tl.arange(0, BLOCK)
    temperature = tl.load(temperatures + row * real_step).to(tl.float32)
    sampled = temperature > 0.0
    x = _scaled(logits + unit * row_step, at, size, tl.where(sampled, temperature, 1.0))
    if CUT:
        floor = tl.load(floors + unit)
        x = tl.where((x > floor) | ((x == floor) & (at <= tl.load(lasts + unit))), x, float("-inf"))
    score = x.to(tl.float64)
    if sampled & (tl.max(x, 0) > float("-inf")):
        position = tl.load(positions + unit).to(tl.int32)
        a, b, c, d = tl.philox(tl.load(keys + row * whole_step), at // 4, position, 0, 0)
        word = tl.where(at % 4 < 2, tl.where(at % 4 == 0, a, b), tl.where(at % 4 == 2, c, d))
        score += -tl.log(-tl.log((word.to(tl.float64) + 0.5) / 4294967296.0))
    best = tl.max(score, 0)
    token = tl.min(tl.where((score == best) & (at < size), at, size), 0)
    place = unit * tl.num_programs(1) + part
    tl.store(bests + place, best)
    tl.store(tokens + place, tl.where(token < size, token, part * BLOCK))  # none is best where all are NaN


@triton.jit
def settle_kernel(bests, tokens, out, parts, PARTS: tl.constexpr):
    """The best part of one row; the first of several."""
    unit = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, PARTS)
    found = tl.load(bests + unit * parts + part, mask=part < parts, other=float("-inf"))
    first = tl.min(tl.where((found == tl.max(found, 0)) & (part < parts), part, parts), 0)
    tl.store(out + unit, tl.load(tokens + unit * parts + tl.minimum(first, parts - 1)).to(tl.int64))


def left(
    logits: Tensor,  # [R * Q, V] in float32
    settings: Settings,
    queries: int,
    blocks: DrawBlocks = BLOCKS,
) -> tuple[Tensor, Tensor]:
    """What min-p, top-k and top-p leave of every row: logits above a floor [R * Q], once they are divided by
    the temperature; and of the tokens at it those up to a last id [R * Q]."""
    count, size = logits.shape
    device = logits.device
    near = torch.empty(count, blocks.few, dtype=torch.float32, device=device)
    floors = torch.empty(count, dtype=torch.float32, device=device)
    lasts = torch.empty(count, dtype=torch.int32, device=device)
    temperature, top_p, min_p, top_k, key = settings
    with torch.cuda.device_of(logits):  # type: ignore[no-untyped-call]
        cut_kernel[(count,)](
            logits, temperature, top_k, top_p, min_p, near, floors, lasts,
            logits.stride(0), temperature.stride(0), key.stride(0), size, queries,
            BLOCK=blocks.scanned, FEW=blocks.few, NEAR=NEAR, num_warps=blocks.warps,
        )  # fmt: skip
    return floors, lasts


def draw(
    logits: Tensor,  # [R, Q, V] in float32
    positions: Tensor,  # [R, Q] of the response
    settings: Settings,
    *,
    cuts: bool,
    blocks: DrawBlocks = BLOCKS,
) -> Tensor:
    """Tokens [R, Q]; `cuts`: some row has min-p, top-k or top-p."""
    rows, queries, size = logits.shape
    flat = logits.reshape(rows * queries, size)
    flat = flat if flat.stride(1) == 1 else flat.contiguous()
    device, count, parts = logits.device, rows * queries, triton.cdiv(size, blocks.drawn)
    floors, lasts = left(flat, settings, queries, blocks) if cuts else (positions, positions)
    bests = torch.empty(count, parts, dtype=torch.float64, device=device)
    tokens = torch.empty(count, parts, dtype=torch.int32, device=device)
    out = torch.empty(rows, queries, dtype=torch.int64, device=device)
    temperature, *_, key = settings
    with torch.cuda.device_of(logits):  # type: ignore[no-untyped-call]
        draw_kernel[(count, parts)](
            flat, temperature, key, positions.contiguous(), floors, lasts, bests, tokens,
            flat.stride(0), temperature.stride(0), key.stride(0), size, queries,
            BLOCK=blocks.drawn, CUT=cuts, num_warps=4,
        )  # fmt: skip
        settle_kernel[(count,)](
            bests, tokens, out, parts, PARTS=triton.next_power_of_2(parts), num_warps=1
        )  # fmt: skip
    return out
