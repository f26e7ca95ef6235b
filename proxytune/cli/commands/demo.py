"""`proxytune demo`: every role of the demo system on its tasks, a control, and a model of middle
size. Functions that the models write are run in the sandbox. Where there is none, that task is left out."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from proxytune.cli import console
from proxytune.cli.options import Json
from proxytune.config import ROLES, Role, System, load_system, system_names
from proxytune.errors import UserError
from proxytune.options import DecodeOptions, JudgeOptions, RunOptions
from proxytune.records import Run

if TYPE_CHECKING:
    from proxytune.models import Models
    from proxytune.report import tables
    from proxytune.sandbox import Sandbox

CONTROL = "base, opener forced"
MIDDLE = "tuned, middle size"


@dataclass(frozen=True)
class Extra:
    """A line beside the roles: the control, or the model of middle size."""

    label: str
    key: str
    """Its name in --json."""
    run: Run


def demo(
    limit: Annotated[
        int | None,
        typer.Option(help="Questions per task, at most. Default: 500, of toxigen 200, of humaneval 40."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Keep the runs in this folder of results.")] = None,
    json: Json = False,
) -> None:
    """The main job on the embedded demo system: how much of the gap to the directly tuned model the proxy
    closes.

    Functions that the models write are run in a sandbox; without one, humaneval is left out. Writes nothing
    unless --out is given.

    Example: proxytune demo --limit 50
    """
    sandbox, why_not = _open_sandbox()
    if out is not None:
        found = _run_all(limit, out, sandbox)
    else:
        with tempfile.TemporaryDirectory(prefix="proxytune-demo-") as folder:
            found = _run_all(limit, Path(folder), sandbox)
    if sandbox is None:
        console.say(f"note: humaneval is left out: {why_not}")

    from proxytune.report import tables

    rows = tables.role_rows([one for runs, _ in found.values() for one in runs])
    beside = {task: extras for task, (_, extras) in found.items()}
    if json:
        console.print_json(_as_json(rows, beside))
        return
    for own in tables.alike(rows):
        console.show_table(_table(own, _like(own, beside)))
    console.show("gap closed = (proxy - base) / (tuned - base). Scores in %, with 95% intervals.")
    console.show(
        "Memory is weights and KV cache at its fullest; time is decoding time per token, all rows together."
    )
    if out is not None:
        console.show(f"stored in {out}")


def _open_sandbox() -> tuple[Sandbox | None, str]:
    """The sandbox that runs the functions of the demo's models, or why there is none."""
    from proxytune.sandbox import Sandbox

    try:
        return Sandbox.open(), ""
    except UserError as error:
        return None, str(error)


@dataclass(frozen=True)
class DemoRuns:
    """Where the runs of the demo go, and what they share."""

    limit: int | None
    root: Path
    sandbox: Sandbox | None

    def run(self, models: Models, task: str, role: Role, forced: str | None = None) -> Run:
        """One run in its folder under the root, judged where the system names a judge."""
        from proxytune.demo import world
        from proxytune.runs import evaluation, judging, session
        from proxytune.runs.decoders import decoder_here

        system, items = models.system, world.ITEMS[task]
        most = None if self.limit is None else min(self.limit, items)
        job = evaluation.plan(system, task, role, RunOptions(limit=most, forced=forced))
        folder = job.folder(self.root)
        sandbox = self.sandbox if job.task.execute is not None else None
        made = session.run_job(job, folder, decoder_here(models), DecodeOptions(), sandbox)
        named = system.judges.get(task)
        if named is None:
            return made
        who = judging.judging_of(system, job.task, JudgeOptions(judge=named), "generate", console.dialogue())
        return made if who is None else who(folder)


def _run_all(
    limit: int | None, root: Path, sandbox: Sandbox | None
) -> dict[str, tuple[list[Run], list[Extra]]]:
    """Task -> the runs of all roles, and the extra lines."""
    from proxytune.demo import world
    from proxytune.tasks import get_task

    system, runs = load_system("demo"), DemoRuns(limit, root, sandbox)
    models = console.models_of(system)
    found = dict[str, tuple[list[Run], list[Extra]]]()
    for task in (t for t in world.TASKS if get_task(t).execute is None or sandbox is not None):
        own = [runs.run(models, task, role) for role in ROLES if role in system.roles]
        extras = []
        if task in world.OPENERS:
            forced = runs.run(models, task, "base", world.OPENERS[task])
            extras.append(Extra(CONTROL, "base_opener_forced", forced))
        found[task] = (own, extras)
    middle: System | None = load_system("demo-mid") if "demo-mid" in system_names() else None
    if middle is not None:
        middle_models = console.models_of(middle)
        for task, (_, extras) in found.items():
            extras.append(Extra(MIDDLE, "tuned_mid", runs.run(middle_models, task, "tuned")))
    return found


def _like(rows: list[tables.RoleRow], extras: Mapping[str, list[Extra]]) -> list[Extra]:
    """The extra lines that may stand beside these rows."""
    from proxytune.comparison import conditions

    return [extra for extra in extras[rows[0].task] if conditions(extra.run) == rows[0].conditions]


def _table(rows: list[tables.RoleRow], extras: list[Extra]) -> Table:
    """The table of one task, with the extra lines after the roles that they belong to."""
    from proxytune.report import tables

    table = Table(title=f"{tables.title(rows)}, %", title_justify="left")
    for column in tables.COLUMNS[1:]:
        table.add_column(column, justify="left" if column == "as" else "right", no_wrap=True)
    extra_lines = {extra.run.spec.role: extra for extra in extras}
    for row in rows:
        table.add_row(*row.cells[1:], style="bold" if row.role == "proxy" else None)
        if row.role in extra_lines:
            [beside] = tables.role_rows([extra_lines[row.role].run])
            table.add_row(extra_lines[row.role].label, *beside.cells[2:], style="dim")
    return table


def _as_json(rows: list[tables.RoleRow], extras: Mapping[str, list[Extra]]) -> dict[str, Any]:
    """The form of the design, with the extra lines, intervals, memory and time beside it."""
    from proxytune.report import tables

    content = tables.summary(rows)
    for task, own in tables.main_tables(rows).items():
        entry, beside = content["tasks"][task], _like(own, extras)
        entry["metric"] = own[0].metric
        for extra in beside:
            entry[extra.key] = None if extra.run.score is None else extra.run.score.value
        every = [
            *((row.role, row) for row in own),
            *((e.key, tables.role_rows([e.run])[0]) for e in beside),
        ]
        entry["rows"] = {
            name: {
                "score": None if row.score is None else row.score.model_dump(mode="json"),
                "memory_bytes": row.memory,
                "ms_per_token": row.ms_per_token,
            }
            for name, row in every
        }
    return content
