"""What a judge is: it takes stored rows and gives, for each, the columns that it adds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from transformers import AutoConfig

from proxytune.errors import UserError
from proxytune.models import resolve

Row = dict[str, Any]
OnProgress = Callable[[int, int], None]
"""Hears of (rows judged, rows to judge)."""


class Judge(Protocol):
    """Adds columns to stored rows."""

    @property
    def name(self) -> str:
        """What run.json says about who judged."""
        ...

    def check(self) -> None:
        """Raise the UserError that judging would end with, before anything expensive is done."""
        ...

    def judge(self, rows: Sequence[Row], on_progress: OnProgress | None = None) -> list[Row]:
        """The columns to add to each row."""
        ...


def judge_config(model: str) -> Any:
    try:
        return AutoConfig.from_pretrained(resolve(model))
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot load the judge '{model}': {in_one_line(error).rstrip('.')}. Name one with --judge "
            "(folder or hub id), or keep the generations for later with --judge none"
        ) from None


def in_one_line(error: BaseException) -> str:
    """An exception in one line of readable length."""
    return " ".join(str(error).split())[:300]
