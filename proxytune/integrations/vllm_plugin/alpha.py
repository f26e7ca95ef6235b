"""Alpha of every token of a batch: a schedule per request, and where its response begins.

Nothing of vLLM here. A request says its alpha in vLLM's `vllm_xargs`: `alpha`, as `--alpha` takes it, and
`alpha_from`, the tokens before the response where these are not the whole prompt (a text that is scored)."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from proxytune.config import AlphaSchedule, parse_alpha
from proxytune.errors import UserError

ALPHA, FROM = "alpha", "alpha_from"
COLUMNS = 5
Row = tuple[float, float, float, float, float]
"""Alpha at the beginning and at the end, over how many tokens, whether it moves between, and the tokens
before the response."""


def row_of(schedule: AlphaSchedule, before: int) -> Row:
    """The row of a request whose response begins after so many tokens."""
    return (
        schedule.start,
        schedule.end,
        float(schedule.length),
        float(schedule.kind == "linear"),
        float(before),
    )


def asked_of(
    extra: Mapping[str, Any] | None, *, allow_negative: bool
) -> tuple[AlphaSchedule | None, int | None]:
    """What `vllm_xargs` ask for; UserError for what is no alpha."""
    given = extra or {}
    schedule, before = given.get(ALPHA), given.get(FROM)
    if before is not None and (isinstance(before, bool) or not isinstance(before, int) or before < 0):
        raise UserError(f"{FROM} {before!r} is no number of tokens")
    if schedule is None:
        return None, before
    return parse_alpha(schedule).check(allow_negative=allow_negative), before


def alphas_of(rows: Tensor, positions: Tensor) -> Tensor:
    """Alpha [T] by which the logits after each token are combined, of the rows [T, 5] of the tokens and their
    positions [T] in the sequence. The token at position p decides the one at p + 1."""
    start, end, length, moves, before = rows.double().unbind(-1)
    place = (positions + 1 - before).clamp(min=0)
    moving = start + (end - start) * place / length.clamp(min=1)
    first = torch.where(moves > 0, moving, start)
    return torch.where(place < length, first, end).float()


def packed(alphas: Tensor, dtype: torch.dtype) -> Tensor:
    """The bits of alpha [T] as columns [T, 1 or 2] of a dtype: hidden states carry it without rounding."""
    return alphas.view(dtype).view(len(alphas), columns(dtype))


def unpacked(bits: Tensor) -> Tensor:
    """Alpha [T] of its columns."""
    return bits.contiguous().view(torch.float32).view(-1)


def columns(dtype: torch.dtype) -> int:
    """Columns that a float32 takes."""
    return struct.calcsize("f") // dtype.itemsize
