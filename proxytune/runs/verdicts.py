"""Run the code that a finished run's responses hold, where it was stored without verdicts."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from proxytune import results
from proxytune.errors import UserError
from proxytune.options import CodeOptions
from proxytune.records import JsonRow, Run
from proxytune.sandbox import Sandbox
from proxytune.tasks import Execution, Task, get_task


def read_finished(task_name: str, folder: Path) -> tuple[Run, list[JsonRow]]:
    """A finished run of the task and its rows, whole: UserError where the folder holds anything else."""
    run, rows = read_whole(folder)
    if run.spec.task != task_name:
        changed = (
            run.facts is not None and run.facts.file is not None and get_task(task_name).file is not None
        )
        more = ": its task file was another one, or has changed" if changed else ""
        raise UserError(f"'{folder}' holds a run of '{run.spec.task}', not of '{task_name}'{more}")
    get_task(task_name, run.spec.mode).require_columns(rows, f"'{folder / results.PREDICTIONS}'")
    return run, rows


def read_whole(folder: Path) -> tuple[Run, list[JsonRow]]:
    """A finished run and its rows, whatever its task: UserError where the folder holds anything else."""
    run = results.read_run(folder)
    if run.status != "done":
        raise UserError(f"the run in '{folder}' is not finished: continue it first, with the same command")
    rows = results.read_rows(folder)
    if len(rows) != run.n:
        path = folder / results.PREDICTIONS
        raise UserError(f"'{path}' has {len(rows)} whole rows and {results.RUN} lists {run.n}: it is damaged")
    return run, rows


def open_sandbox(task: Task, code: CodeOptions) -> Sandbox | None:
    """The sandbox for a task's code, tried out; None where running code was not allowed. UserError for a task
    that has no code."""
    if not code.allow_code_execution:
        return None
    if task.execute is None:
        raise UserError(f"task '{task.name}' runs no code: leave --allow-code-execution out")
    return Sandbox.open(code.sandbox, code.code_python or sys.executable)


def add_verdicts(folder: Path, items: Mapping[str, dict[str, Any]], sandbox: Sandbox) -> Run:
    """Run the code of the rows that have no verdict yet, store the verdicts, and return the run with its new
    metrics. `items` are the targets of the run's examples by id."""
    with results.holding(folder):
        return _add_verdicts(folder, items, sandbox)


def _add_verdicts(folder: Path, items: Mapping[str, dict[str, Any]], sandbox: Sandbox) -> Run:
    task = get_task(results.read_run(folder).spec.task)
    assert task.execute is not None, f"'{task.name}' has no code"
    run, rows = read_finished(task.name, folder)
    todo = [place for place, row in enumerate(rows) if lacks_verdict(task, row)]
    if not todo and run.headline != task.headline:
        return run
    executed = task.run_code([rows[place] for place in todo], Execution(sandbox, items))
    for place, row in zip(todo, executed, strict=True):
        rows[place] = with_columns(rows[place], row) | {"scores": task.scores(row)}
    metrics = task.metrics(rows)
    run = run.model_copy(update={"metrics": metrics, "headline": task.headline_of(metrics)})
    results.replace_rows(folder, rows, run)
    return run


def lacks_verdict(task: Task, row: JsonRow) -> bool:
    """Whether a row is scored by what a task's metric is called while nothing was run or judged."""
    return task.headline in task.scores(row)


def with_columns(row: JsonRow, added: JsonRow) -> JsonRow:
    """The row with further columns before its scores and responses."""
    tail: JsonRow = {name: row[name] for name in ("scores", "responses") if name in row}
    plain = {**row, **added}
    return {**{name: value for name, value in plain.items() if name not in tail}, **tail}
