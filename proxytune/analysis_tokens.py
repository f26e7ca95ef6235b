"""By token: which tokens the proxy promotes and in which phrases (paper 6.1, Table 6), and whether it changes
the reasoning or the arithmetic of equations (paper 6.1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from proxytune.analysis import Analysis, Figures, Source
from proxytune.records import Metric


class NgramRow(Figures):
    """A token and the phrase in which it mostly stands."""

    token: str
    """Without the space before it."""
    n: int | None
    """How often it was generated; None where the word was given and no trace counted it."""
    shift: Metric | None
    """Mean of p_proxy - p_base over these, with a t interval."""
    gram: str | None
    """The most common 4-gram of words that holds it (punctuation comes on top); None where it is no word."""
    count: int
    """How often the gram occurs."""
    occurrences: int
    """How often the word occurs in the responses' text."""


class Ngrams(Analysis):
    """Tokens by mean shift, the most promoted first."""

    name: ClassVar[str] = "ngrams"
    source: Source | None
    """None for a file of predictions without a run."""
    min_count: int
    rows: tuple[NgramRow, ...]

    @property
    def table(self) -> Sequence[NgramRow]:
        return self.rows


class Side(Figures):
    """The tokens on one side of the equations."""

    tokens: int
    mean: float
    """Of p_proxy - p_base."""


class EquationRow(Figures):
    """Left against right under one rule."""

    rule: str
    """paper, corrected; or published for the paper's own figures."""
    left: Side
    right: Side
    t: float | None
    """Welch's statistic; None where a side has fewer than two tokens or none varies."""
    df: float | None
    p: float | None


class Equations(Analysis):
    """Mean shift left and right of `=` in the responses of a traced run of a proxy."""

    name: ClassVar[str] = "equations"
    source: Source
    responses_with: int
    """Responses in which the corrected rule finds an equation."""
    rows: tuple[EquationRow, ...]
    """paper, corrected, published."""

    @property
    def table(self) -> Sequence[EquationRow]:
        return self.rows
