"""`proxytune tasks`: what the tasks are, what their data look like, and whether each can run here now."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from proxytune.cli import console
from proxytune.cli.options import Json
from proxytune.errors import UserError

if TYPE_CHECKING:
    from proxytune.tasks import Task


@dataclass(frozen=True)
class Readiness:
    """What a task lacks here now; None where nothing is lacking."""

    data: str | None
    judge: str | None
    sandbox: str | None
    libraries: str | None
    demo: bool
    """Whether the demo system has items of its own for it."""

    @property
    def missing(self) -> list[str]:
        """All that is lacking."""
        return [text for text in (self.data, self.judge, self.sandbox, self.libraries) if text is not None]

    def __str__(self) -> str:
        if not self.missing:
            return "yes"
        demo = "on the demo system; else " if self.demo else ""
        return f"{demo}no: {'; '.join(self.missing)}"


def tasks(
    task: Annotated[
        str | None,
        typer.Argument(metavar="TASK", help="This one alone: its name, or a Python file of your own."),
    ] = None,
    json: Json = False,
) -> None:
    """The tasks: what they measure, where their data comes from and what its rows hold, and whether each can
    run here now.

    Example: proxytune tasks gsm
    """
    from proxytune.tasks import TASKS
    from proxytune.tasks.own import read_task

    found = list(TASKS.values()) if task is None else [read_task(task)]
    if json:
        console.print_json({"tasks": {one.name: _as_json(one) for one in found}})
        return
    rows = [
        (
            one.name,
            one.summary,
            "" if one.items is None else f"{one.items:,}",
            ", ".join(_metrics(one)),
            (one.judge or "").replace(",", ", "),
            f"{one.data} ({one.licence})" if one.licence else one.data,
            str(readiness(one)),
        )
        for one in found
    ]
    columns = ("task", "what it measures", "items", "metrics", "judge", "data (licence)", "runs here now")
    console.print_table(columns, rows)
    console.show()
    forms = [(one.name, form, fields) for one in found for form, fields in formats(one).items()]
    if task is None:
        shown = [(name, form, ", ".join(fields)) for name, form, fields in forms]
        console.print_table(("task", "rows of", "fields (what they hold: proxytune tasks TASK)"), shown)
        return
    held = [(form, name, holds) for _, form, fields in forms for name, holds in fields.items()]
    console.print_table(("rows of", "field", "what it holds"), held)


def formats(task: Task) -> dict[str, Mapping[str, str]]:
    """The forms in which the task's rows can be read, in both modes, and their fields."""
    found = dict(task.formats) or {"--data FILE": dict.fromkeys(task.columns, "a text")}
    own = (
        {} if task.likelihood is None or task.likelihood.formats == task.formats else task.likelihood.formats
    )
    return found | {f"{form}, --mode likelihood": fields for form, fields in own.items()}


def _as_json(task: Task) -> dict[str, object]:
    """A task as JSON."""
    ready = readiness(task)
    return {
        "summary": task.summary,
        "items": task.items,
        "data": task.data,
        "licence": task.licence,
        "hub": None if task.hub is None else task.hub.id,
        "headline": task.headline,
        "judged_headlines": list(task.judged_headlines),
        "metrics": list(task.metric_names),
        "judge": task.judge,
        "missing_judge": ready.judge,
        "runs_here": not ready.missing,
        "runs_on_demo": ready.demo,
        "missing": ready.missing,
        "formats": formats(task),
        "shots": task.shot is not None,
        "modes": ["generate", *(mode for mode in ("likelihood", "choices") if getattr(task, mode))],
        "sampling": task.sampling.model_dump(mode="json"),
    }


def _metrics(task: Task) -> tuple[str, ...]:
    """The metrics of a task; the judge's, or the tests', where it has none without them."""
    return task.metric_names or task.judged_headlines


def readiness(task: Task) -> Readiness:
    """What a task lacks here now."""
    from proxytune.demo import world

    absent = [name for name in task.libraries if importlib.util.find_spec(name) is None]
    return Readiness(
        data=missing_data(task),
        judge=missing_judge(task),
        sandbox=None if task.execute is None else missing_sandbox(),
        libraries=f"some problems need {', '.join(absent)}" if absent else None,
        demo=task.name in world.TASKS,
    )


def missing_data(task: Task) -> str | None:
    """Why the task's data cannot be had here now; None if it can."""
    from proxytune import hub

    if task.hub is None:
        return "not on the hub: --data FILE"
    if hub.stored(task.hub.id, "dataset") or hub.reachable():
        return None
    return "the hub does not answer: --data FILE"


def missing_judge(task: Task) -> str | None:
    """What the default judge of a task lacks here now; None if nothing."""
    if task.judge is None or task.judge_kind is None:
        return None
    from proxytune.judges import JUDGES

    return JUDGES[task.judge_kind].missing(task.judge)


def missing_sandbox() -> str | None:
    """Why no sandbox starts here; None if one does."""
    from proxytune.sandbox import Sandbox

    try:
        Sandbox.open("auto")
    except UserError as error:
        return f"no sandbox: {error}"
    return None
