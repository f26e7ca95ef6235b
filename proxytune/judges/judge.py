"""What a judge is: it takes stored rows and gives, for each, the columns that it adds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from transformers import AutoConfig

from proxytune.errors import UserError
from proxytune.models import resolve
from proxytune.records import JsonRow

OnProgress = Callable[[int, int], None]
"""Hears of (rows judged, rows to judge)."""


@dataclass(frozen=True)
class Estimate:
    """What judging would take, roughly."""

    calls: int
    cached: int
    prompt_tokens: int
    completion_tokens: int
    usd: float | None
    """None where no price is known."""
    seconds: float
    spent: float = 0.0
    """US dollars that earlier sessions spent on the same."""

    def __str__(self) -> str:
        cost = "cost unknown (give --price IN,OUT)" if self.usd is None else f"about {self.usd:.2f} USD"
        return (
            f"{self.calls} judgements to pay for ({self.cached} are cached or need none): about "
            f"{self.prompt_tokens} tokens, {cost}, {self.seconds / 60:.1f} minutes"
        )


class Judge(Protocol):
    """Adds columns to stored rows."""

    @property
    def name(self) -> str:
        """What run.json stores about who judged."""
        ...

    def check(self) -> None:
        """Raise the UserError that judging would end with, before anything expensive is done."""
        ...

    def estimate(self, rows: Sequence[JsonRow]) -> Estimate | None:
        """What judging these rows would cost; None where nothing is paid."""
        ...

    def forecast(self, count: int, characters: float) -> Estimate | None:
        """What judging would cost before there are responses: so many rows, whose texts have this many
        characters together on average; None where nothing is paid."""
        ...

    def judge(self, rows: Sequence[JsonRow], on_progress: OnProgress | None = None) -> list[JsonRow]:
        """The columns to add to each row."""
        ...


def judge_config(model: str) -> Any:
    """The configuration of a judge's model, which shows that it is there; UserError with what to do."""
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
