"""The tasks, by name. To add one: a file, its line here, a test."""

from __future__ import annotations

from proxytune.errors import did_you_mean
from proxytune.tasks import gsm, truthfulqa, truthfulqa_mc
from proxytune.tasks.base import Dataset, ScoreReport, Task, read_source, score_file

__all__ = ["TASKS", "Dataset", "ScoreReport", "Task", "get_task", "read_source", "score_file"]

TASKS: dict[str, Task] = {task.name: task for task in (gsm.TASK, truthfulqa.TASK, truthfulqa_mc.TASK)}


def get_task(name: str) -> Task:
    """The task of that name, or the UserError with the nearest names."""
    if name not in TASKS:
        raise did_you_mean("task", name, TASKS)
    return TASKS[name]
