"""What a judge is: it takes stored rows and gives, for each, the columns that it adds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from proxytune.errors import UserError
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


@contextmanager
def of_a_judge() -> Iterator[None]:
    """Errors about a model as those about a judge, with what to do."""
    try:
        yield
    except UserError as error:
        raise UserError(
            f"the judge cannot be used: {str(error).rstrip('.')}. Name one with --judge (folder or hub id), "
            "or keep the generations for later with --judge none"
        ) from None
