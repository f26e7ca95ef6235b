"""Curves over alpha: the paper's sweep (6.2), and late skip: what becomes of responses when the correction
ends after t tokens."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from proxytune.analysis.analysis import Analysis, Figures, Source, finished, mean, published, share
from proxytune.comparison import comparable, models_of, unlike
from proxytune.config import AlphaSchedule
from proxytune.errors import UserError
from proxytune.records import FAULT, Metric, Run
from proxytune.results import read_rows, read_run


class SweepPoint(Figures):
    """One alpha, or one schedule, of a sweep."""

    alpha: str
    """As `--alpha` takes it: `0.4`, `first:16`."""
    value: float | None
    """The number, where alpha is constant."""
    until: int | None
    """t of `first:t`; 0 for alpha 0; None where the correction does not end."""
    n: int
    score: Metric | None
    """The task's headline metric; None where nothing was judged or executed."""
    truth: Metric | None
    """Judged truth and informativeness, for TruthfulQA with judges."""
    info: Metric | None
    loops: Metric | None
    """Share of responses that end in a loop, with a Wilson interval. Responses that a fault broke off are
    left out; None where there are no others."""
    tokens: Metric | None
    """Mean length of a response in tokens, with a t interval; of the same responses."""
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
    """Of the first point; its alpha is without meaning here."""
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
    """A base whose opener was forced to be `forced`, on the same examples."""
    forced: str | None

    @property
    def table(self) -> Sequence[SweepPoint]:
        return self.points if self.control is None else (*self.points, self.control)


# Loops

REPEATS = 3
"""A loop is at least this many copies of the same words in a row, ..."""
LOOP_UNITS = 8
"""... which together are at least this many words or marks: "no no no" is no loop."""
_UNIT = re.compile(r"\w+|[^\w\s]")


def ends_in_loop(text: str) -> bool:
    """Whether a response ends in a loop: the same n-gram of words and punctuation marks, of any length n, at
    least `REPEATS` times in a row up to the end, and `LOOP_UNITS` words or marks altogether.

    A last copy that is cut off (a response that loops ends at the token limit) comes on top. A word that
    repeats inside itself ("hahaha") is one unit, and a response that gets out of its loop does not count.
    """
    units: list[str] = _UNIT.findall(text)
    for n in range(1, len(units) // REPEATS + 1):
        same = 0  # units at the end that equal the one n places before
        while same < len(units) - n and units[-1 - same] == units[-1 - same - n]:
            same += 1
        if same >= max((REPEATS - 1) * n, LOOP_UNITS - n):
            return True
    return False


# Sweeps

SWEEP = "sweep.json"
"""Marks a folder whose folders are the runs of one sweep."""
JUDGED = (("truth acc", "info acc"), ("GPT-true acc", "GPT-info acc"))


def find_sweeps(root: Path) -> list[Path]:
    """Every sweep folder under `root`."""
    return sorted(path.parent for path in root.rglob(SWEEP))


def sweep(folder: Path) -> Sweep:
    """The curve of a sweep; UserError where the folder holds no finished run of one."""
    runs = _runs(folder)
    points = [_point(path, run) for path, run in runs]
    first = runs[0][1]
    published_rows = published("alpha_sweep")["rows"] if first.spec.task == "truthfulqa" else []
    return Sweep(
        source=Source.of(folder, first),
        metric=first.headline,
        points=tuple(sorted(points, key=_order)),
        paper=tuple(
            PublishedPoint(alpha=row["alpha"], truth=row["GPT-true acc"], info=row["GPT-info acc"])
            for row in published_rows
        ),
    )


def skip(folder: Path, control: Path | None = None) -> Skip:
    """The runs of a sweep that end the correction: alpha 0, every `first:t`, and the alpha that never
    ends.

    `control` is a run of the base whose opener was forced, on the same examples. UserError where the sweep
    has no `first:t`, or several strengths of it.
    """
    runs = _runs(folder)
    strengths = {run.spec.alpha.start for _, run in runs if run.spec.alpha.kind == "first"}
    if len(strengths) != 1:
        raise UserError(
            f"'{folder}' has {'no schedule first:t' if not strengths else 'first:t of several strengths'}: "
            "sweep over --alphas 0,first:1,first:4,first:16,1"
        )
    [strength] = strengths

    def about_ending(run: Run) -> bool:
        alpha = run.spec.alpha
        return alpha.kind == "first" or (alpha.kind == "constant" and alpha.end in (0, strength))

    chosen = [(path, run) for path, run in runs if about_ending(run)]
    points = sorted((_point(path, run) for path, run in chosen), key=_by_length)
    beside = None if control is None else _control(control, chosen[0][1])
    return Skip(
        source=Source.of(folder, chosen[0][1]),
        metric=chosen[0][1].headline,
        points=tuple(points),
        control=None if control is None or beside is None else _point(control, beside),
        forced=None if beside is None else beside.spec.forced,
    )


def _runs(folder: Path) -> list[tuple[Path, Run]]:
    """The finished runs of a sweep folder, which must be of the same items."""
    found = [(path.parent, read_run(path.parent)) for path in sorted(folder.glob("*/run.json"))]
    done = [(path, run) for path, run in found if run.status == "done" and run.spec.role == "proxy"]
    if not done:
        raise UserError(
            f"no finished sweep in '{folder}': `proxytune sweep-alpha` makes one in .../proxy/sweep"
        )
    path, first = done[0]
    for other, run in done:
        if not comparable((first, run)) or models_of(first) != models_of(run):
            raise UserError(
                f"the runs in '{folder}' are not of one sweep: '{path.name}' and '{other.name}' differ "
                f"({unlike(first, run)})"
            )
    return done


def _control(path: Path, beside: Run) -> Run:
    """The control run; UserError where it is none of this sweep."""
    run = finished(path)
    if run.spec.role != "base" or run.spec.forced is None:
        raise UserError(f"the run in '{path}' is no control: it is not of the base with a forced opener")
    if not comparable((run, beside)) or models_of(run) != models_of(beside):
        raise UserError(f"the control in '{path}' is not like the sweep: they differ ({unlike(run, beside)})")
    return run


def _point(folder: Path, run: Run) -> SweepPoint:
    """One run as a point of a curve."""
    alpha = run.spec.alpha if run.spec.role == "proxy" else AlphaSchedule(start=0.0, end=0.0)
    sound = [row for row in read_rows(folder) if not row.get(FAULT)]
    responses = [response for row in sound for response in row["responses"]]
    truth, info = next((pair for pair in JUDGED if pair[0] in run.metrics), JUDGED[0])
    constant = alpha.kind == "constant"
    return SweepPoint(
        alpha=alpha.text,
        value=alpha.end if constant else None,
        until=0 if constant and alpha.end == 0 else alpha.length if alpha.kind == "first" else None,
        n=run.n,
        score=run.score,
        truth=run.figure(truth),
        info=run.figure(info),
        loops=share(sum(ends_in_loop(r["text"]) for r in responses), len(responses)) if responses else None,
        tokens=mean([response["tokens"] for response in responses]) if responses else None,
        folder=str(folder),
    )


def _order(point: SweepPoint) -> tuple[bool, float, str]:
    """Numbers by size, then schedules: `first:t` by t."""
    if point.value is not None:
        return False, point.value, ""
    return True, float(point.until or 0), point.alpha


def _by_length(point: SweepPoint) -> float:
    return float("inf") if point.until is None else point.until
