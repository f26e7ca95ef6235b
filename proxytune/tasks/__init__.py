"""The tasks, by name, and what they share. To add one: a file, its line here, a test.

A task in a file of the user's own: own/."""

from __future__ import annotations

from proxytune.config import Mode
from proxytune.errors import UserError, did_you_mean
from proxytune.tasks import (
    alpaca_farm,
    data,
    ds1000,
    gsm,
    humaneval,
    realtimeqa,
    toxigen,
    triviaqa,
    truthfulqa,
    truthfulqa_mc,
)
from proxytune.tasks.rescore import score_file
from proxytune.tasks.task import Dataset, Execution, Task, read_source

__all__ = [
    "TASKS",
    "Dataset",
    "Execution",
    "Task",
    "data",
    "get_task",
    "read_source",
    "score_file",
]

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        alpaca_farm.TASK,
        gsm.TASK,
        toxigen.TASK,
        truthfulqa.TASK,
        truthfulqa_mc.TASK,
        humaneval.TASK,
        ds1000.TASK,
        triviaqa.TASK,
        realtimeqa.TASK,
    )
}


OWN: dict[str, Task] = {}
"""The tasks of the user's own that this process has read, by name."""


def get_task(name: str, mode: Mode = "generate") -> Task:
    """The task of that name in that mode, or the UserError with the nearest names. It reads no file: names
    come from stored runs as well."""
    known = {**TASKS, **OWN}
    if name not in known:
        raise did_you_mean("task", name, known)
    task = known[name]
    if mode == "generate":
        return task
    found: Task | None = getattr(task, mode)
    if found is None:
        able = ", ".join(other.name for other in TASKS.values() if getattr(other, mode))
        raise UserError(f"task '{name}' has no {mode} mode: {able} have one")
    return found
