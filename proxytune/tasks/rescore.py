"""Scores stored predictions again, from their texts: ours, and the paper's published ones."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from proxytune.errors import UserError
from proxytune.records import Metric
from proxytune.results import require_intact
from proxytune.tasks.data import read_file, unique_rows
from proxytune.tasks.task import Execution, Task, in_public_form


class ScoreReport(BaseModel):
    """What re-scoring a file of predictions gave."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    task: str
    file: str
    n: int
    """Rows scored."""
    dropped_duplicates: int = 0
    """Rows left out because an equal row with the same id came before."""
    renumbered_ids: int = 0
    """Rows that share their id with a different row; they are scored as `id#2`, `id#3`, ..."""
    metrics: dict[str, Metric]
    headline: str
    execution: dict[str, int | str] | None = None
    """Where code was run: the backend, and the counts of `Execution`."""


def stored_in(task: Task, folder: Path) -> Path:
    """The file of stored predictions in a folder, plain or packed; UserError where there is none."""
    names = [name + end for name in task.files for end in ("", ".gz")]
    found = next((folder / name for name in names if (folder / name).is_file()), None)
    if found is None:
        raise UserError(
            f"'{folder}' has no stored predictions of '{task.name}': no {', '.join(task.files)} (or .gz)"
        )
    return found


def score_file(task: Task, path: Path, execution: Execution | None = None) -> ScoreReport:
    """Score the rows of a predictions file, ours or the paper's, plain or gzip, from their texts alone. For
    a folder (a run's, or one of the paper's results) it is the file in it.

    Rows of `--mode likelihood` are known by their log-probabilities. Code is run anew where an `execution` is
    given; otherwise stored verdicts count.
    """
    path = stored_in(task, path) if path.is_dir() else path
    require_intact(path)
    table = read_file(path)
    if task.likelihood is not None and "logprobs" in table.rows[0]:
        task = task.likelihood
    table = in_public_form(task, table)
    table = (table if task.gather is None else task.gather(table)).require(task.scored)
    named = "id" if "id" in table.rows[0] else task.identity or "id"
    for index, row in enumerate(table.rows):
        try:
            task.scores(row)
        except UserError as error:
            raise UserError(f"{table.where(index)}: {error}") from None
    kept, dropped, renumbered = unique_rows(table.rows, named)
    rows = list(kept.values())
    if execution is not None and task.execute is not None:
        rows = task.run_code(rows, execution)
    metrics = task.metrics(rows)
    return ScoreReport(
        task=task.name,
        file=str(path),
        n=len(kept),
        dropped_duplicates=dropped,
        renumbered_ids=renumbered,
        metrics=metrics,
        headline=task.headline_of(metrics),
        execution=None if execution is None else execution.report(),
    )
