"""Where one run fails and another does not: the items, and McNemar's test."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from proxytune.analysis import Analysis, Figures, Source


class Disagreement(Figures):
    """An item that exactly one of two runs has right."""

    id: str
    right: Literal["first", "second"]
    """Which run has it right."""
    question: str
    first: str
    """The response of the first run, as it was generated."""
    second: str
    answer: str
    """What the row holds as its reference, "" where it holds none."""


class Failures(Analysis):
    """Two runs on the same items."""

    name: ClassVar[str] = "failures"
    first: Source
    second: Source
    metric: str
    n: int
    both_right: int
    both_wrong: int
    only_first: int
    only_second: int
    p: float
    """McNemar's exact test (two-sided binomial over the items that exactly one has right)."""
    items: tuple[Disagreement, ...]
    """First those that only the first run has right."""

    @property
    def table(self) -> Sequence[Disagreement]:
        return self.items
