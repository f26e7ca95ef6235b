"""What the real trial's responses look like: right, in the form that was tuned, empty, or in a loop."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from proxytune.analysis import sweeps
from proxytune.comparison import gap
from proxytune.config import Role
from proxytune.intervals import mean_metric
from proxytune.records import JsonRow, Metric, Run
from proxytune.report import tables
from proxytune.results import find_runs, read_rows
from proxytune.run_files import write_atomically
from proxytune.tuning.trials.figures import write_figures

FIGURES, TABLE = "figures.json", "table.md"
TUNED_FORM: Mapping[str, Callable[[str], bool]] = {
    "gsm": lambda text: re.search(r"\n#### -?[\d,.]+\s*$", text) is not None,
    "triviaqa": lambda text: 0 < len(text.split()) <= 10 and "\n" not in text.strip(),
}
"""Task -> whether a response has the form of its training data: a last line `#### NUMBER`; one short line."""
COLUMNS = ("as", "alpha", "accuracy", "tuned form", "empty", "loops", "characters", "gap closed")


class RealScores(BaseModel):
    """What one role gave on one task, under one alpha."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    system: str
    """The folder of its system: the trial's part and task."""
    task: str
    role: Role
    alpha: str | None
    """Of the proxy."""
    metric: str
    n: int
    accuracy: Metric
    tuned_form: Metric
    empty: Metric
    loops: Metric
    characters: Metric
    gap_closed: float | None = None


@dataclass(frozen=True)
class ResponseShape:
    """How one response looks."""

    tuned_form: bool
    empty: bool
    loops: bool
    """It ends in one, as `sweep-alpha` counts them."""
    characters: int

    @classmethod
    def of(cls, task: str, row: JsonRow) -> ResponseShape:
        """From a stored row of one response."""
        [response] = row["responses"]
        text, cut = response["text"], response["finish_reason"] == "length"
        return cls(
            tuned_form=not cut and TUNED_FORM[task](text),
            empty=not text.strip(),
            loops=sweeps.ends_in_loop(text),
            characters=len(text),
        )


def scores_of(system: str, folder: Path, run: Run) -> RealScores:
    """The figures of a finished run."""
    assert run.score is not None
    shapes = [ResponseShape.of(run.spec.task, row) for row in read_rows(folder)]
    length = mean_metric([float(shape.characters) for shape in shapes])
    return RealScores(
        system=system,
        task=run.spec.task,
        role=run.spec.role,
        alpha=run.spec.alpha.text if run.spec.role == "proxy" else None,
        metric=run.headline,
        n=run.n,
        accuracy=run.score,
        tuned_form=mean_metric([float(shape.tuned_form) for shape in shapes]),
        empty=mean_metric([float(shape.empty) for shape in shapes]),
        loops=mean_metric([float(shape.loops) for shape in shapes]),
        characters=length.model_copy(update={"unit": "number"}),
    )


def collect(root: Path) -> list[RealScores]:
    """Of every finished run of the trial: by system, the roles first and then the alphas."""
    found: dict[str, list[tuple[Path, Run]]] = {}
    for folder, run in find_runs(root):
        found.setdefault(folder.relative_to(root).parts[0], []).append((folder, run))
    return [scores for system, runs in found.items() for scores in _of_system(system, runs)]


def _of_system(system: str, runs: Sequence[tuple[Path, Run]]) -> Iterator[RealScores]:
    roles = {run.spec.role: run for _, run in runs}
    ends = roles.get("base"), roles.get("tuned")
    for folder, run in sorted(runs, key=lambda one: _place(one[1])):
        closed = None
        if run.spec.role == "proxy" and ends[0] is not None and ends[1] is not None:
            closed = gap(ends[0], run, ends[1], run.headline)
        yield scores_of(system, folder, run).model_copy(update={"gap_closed": closed})


def _place(run: Run) -> tuple[int, float]:
    roles: tuple[Role, ...] = ("base", "antiexpert", "expert", "tuned", "proxy")
    return roles.index(run.spec.role), run.spec.alpha.end


def table(scores: Sequence[RealScores]) -> str:
    """In Markdown, one table for each system."""
    lines = list[str]()
    for system in dict.fromkeys(one.system for one in scores):
        own = [one for one in scores if one.system == system]
        lines += [f"`{system}`: {own[0].task}, {own[0].metric}, {own[0].n} items", ""]
        lines += [f"| {' | '.join(COLUMNS)} |", f"|{' --- |' * len(COLUMNS)}"]
        lines += [f"| {' | '.join(_cells(one))} |" for one in own]
        lines.append("")
    return "\n".join(lines)


def _cells(one: RealScores) -> Iterator[str]:
    yield one.role
    yield one.alpha or ""
    for share in (one.accuracy, one.tuned_form, one.empty, one.loops):
        yield tables.percent(share)
    yield f"{one.characters.value:.0f}"
    yield "" if one.gap_closed is None else f"{100 * one.gap_closed:.0f}%"


def write(root: Path) -> str:
    """figures.json and table.md of what is finished under `root`; -> the table."""
    scores = collect(root)
    write_figures(root / FIGURES, scores)
    write_atomically(root / TABLE, (found := table(scores)).encode())
    return found
