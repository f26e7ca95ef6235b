"""How users say how far to speculate: auto, off, or a draft length."""

from __future__ import annotations

from typing import Literal

from proxytune.engine import Speculation
from proxytune.errors import UserError

LONGEST_DRAFT = 15
"""Drafts and the token before them are one query of the attention, of at most 16 tokens."""

Speculate = Literal["auto", "off"] | int
"""How to speculate: by measurement, not at all, or with drafts of this length."""


def speculation(speculate: Speculate | str, drafter: str | None = None) -> Speculation:
    """The settings of a draft length as users give it; UserError for anything else."""
    if speculate == "auto":
        return Speculation(drafter=drafter)
    length = 0 if speculate == "off" else speculate
    try:
        k = int(length)
    except ValueError:
        k = -1
    if not 0 <= k <= LONGEST_DRAFT:
        raise UserError(
            f"speculate = {speculate!r}: give 'auto', 'off' or a length from 0 to {LONGEST_DRAFT}"
        )
    return Speculation(k=k, drafter=drafter)
