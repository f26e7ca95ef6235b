"""What is known of the task of a stored run. Nothing here runs code: a folder of results may be anybody's."""

from __future__ import annotations

from proxytune.config import RunSpec
from proxytune.records import Run, TaskFacts
from proxytune.tasks import OWN, TASKS, Task


def facts_of(run: Run) -> TaskFacts:
    """What reports need of a run's task: the task's own word where this process knows it, and else what was
    stored with the run."""
    task = _known(run.spec)
    return task.facts if task is not None else run.facts or TaskFacts()


def _known(spec: RunSpec) -> Task | None:
    """The task of that name in that mode, if this process has it."""
    task = TASKS.get(spec.task) or OWN.get(spec.task)
    return task if task is None or spec.mode == "generate" else task.likelihood
