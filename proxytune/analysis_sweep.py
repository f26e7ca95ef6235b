"""Curves over alpha: the paper's sweep (6.2), and late skip: what becomes of responses when the correction
ends after t tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from proxytune.analysis import Analysis, Figures, Source
from proxytune.records import Metric


class SweepPoint(Figures):
    """One alpha, or one schedule, of a sweep."""

    alpha: str
    """As `--alpha` takes it: `0.4`, `first:16`."""
    value: float | None
    """The number, where alpha is constant."""
    until: int | None
    """t of `first:t`; 0 for alpha 0; None where the correction does not end."""
    n: int
    score: Metric
    """The task's headline metric."""
    truth: Metric | None
    """Judged truth and informativeness, for TruthfulQA with judges."""
    info: Metric | None
    loops: Metric
    """Share of responses that end in a loop, with a Wilson interval."""
    tokens: Metric
    """Mean length of a response in tokens, with a t interval."""
    folder: str


class PublishedPoint(Figures):
    """One of the paper's ten points (13B, TruthfulQA)."""

    alpha: float
    truth: float
    info: float


class Sweep(Analysis):
    """All finished runs of a sweep folder, by alpha; schedules after the numbers."""

    name: ClassVar[str] = "sweep"
    source: Source
    """Of the first point; its alpha says nothing."""
    metric: str
    points: tuple[SweepPoint, ...]
    paper: tuple[PublishedPoint, ...]
    """For TruthfulQA, else empty."""

    @property
    def table(self) -> Sequence[SweepPoint]:
        return self.points


class Skip(Analysis):
    """Accuracy, repetition and length against t, the tokens that are corrected."""

    name: ClassVar[str] = "skip"
    source: Source
    metric: str
    points: tuple[SweepPoint, ...]
    """By t, `until` None (the correction never ends) last."""
    control: SweepPoint | None
    """A base whose opener was forced (`forced` says with what) on the same examples."""
    forced: str | None

    @property
    def table(self) -> Sequence[SweepPoint]:
        return self.points if self.control is None else (*self.points, self.control)
