"""The body of `proxytune demo`: every role of the demo system on its tasks, a control, and a model of middle
size. Functions that the models write are run in the sandbox; where there is none, that task is left out."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from proxytune.cli.commands import judge as cli_judge
from proxytune.cli.commands.evaluate import console, print_json, tell_loading
from proxytune.config import Role, System, load_system, system_names
from proxytune.demo.world import ITEMS, OPENERS, TASKS
from proxytune.errors import UserError
from proxytune.models.loading import Models
from proxytune.records import Run
from proxytune.report.tables import COLUMNS, RoleRow, by_task, role_rows, summary
from proxytune.runs import evaluate as run
from proxytune.sandbox.sandbox import Sandbox
from proxytune.tasks import get_task

CONTROL = "base, opener forced"
MIDDLE = "tuned, middle size"


@dataclass(frozen=True)
class Extra:
    """A line beside the roles: the control, or the model of middle size."""

    label: str
    key: str
    """Its name in --json."""
    run: Run


def demo(*, limit: int | None, out: Path | None, json_only: bool) -> None:
    """Run everything and print the tables, or the JSON object."""
    sandbox, why_not = _open_sandbox()
    if out is not None:
        tables = _run_all(limit, out, sandbox)
    else:
        with tempfile.TemporaryDirectory(prefix="proxytune-demo-") as folder:
            tables = _run_all(limit, Path(folder), sandbox)
    if sandbox is None:
        print(f"note: humaneval is left out: {why_not}", file=sys.stderr, flush=True)
    rows = role_rows([one for runs, _ in tables.values() for one in runs])
    if json_only:
        print_json(_as_json(rows, {task: extras for task, (_, extras) in tables.items()}))
        return
    for task, own in by_task(rows).items():
        console().print(_table(own, tables[task][1]))
    print("gap closed = (proxy - base) / (tuned - base). Scores in %, with 95% intervals.")
    print(
        "Memory is weights and KV cache at its fullest; time is decoding time per token, all rows together."
    )
    if out is not None:
        print(f"stored in {out}")


def _open_sandbox() -> tuple[Sandbox | None, str]:
    """The sandbox that runs the functions of the demo's models, or why there is none."""
    try:
        return Sandbox.open(), ""
    except UserError as error:
        return None, str(error)


def _run_all(
    limit: int | None, root: Path, sandbox: Sandbox | None
) -> dict[str, tuple[list[Run], list[Extra]]]:
    """Task -> the runs of all roles, and the extra lines."""
    system = load_system("demo")
    middle = load_system("demo-mid") if "demo-mid" in system_names() else None
    models = Models(system, on_load=tell_loading)
    tables = dict[str, tuple[list[Run], list[Extra]]]()
    tasks = [task for task in TASKS if get_task(task).execute is None or sandbox is not None]

    def one(own: System, task: str, role: Role, loaded: Models, forced: str | None = None) -> Run:
        most = None if limit is None else min(limit, ITEMS[task])
        return _one(own, task, role, run.Options(limit=most, forced=forced), loaded, root, sandbox)

    for task in tasks:
        runs = [one(system, task, role, models) for role in run.ORDER if role in system.roles]
        extras = []
        if task in OPENERS:
            forced = one(system, task, "base", models, OPENERS[task])
            extras.append(Extra(CONTROL, "base_opener_forced", forced))
        tables[task] = (runs, extras)
    if middle is not None:
        middle_models = Models(middle, on_load=tell_loading)
        for task in tasks:
            found = one(middle, task, "tuned", middle_models)
            tables[task][1].append(Extra(MIDDLE, "tuned_mid", found))
    return tables


def _one(
    system: System,
    task: str,
    role: Role,
    options: run.Options,
    models: Models,
    root: Path,
    sandbox: Sandbox | None,
) -> Run:
    """One run in its folder under `root`, judged where the system names a judge."""
    job = run.plan(system, task, role, options)
    folder = job.folder(root)
    resources = run.Resources(sandbox=sandbox if job.task.execute is not None else None)
    made = run.run_job(job, folder, models, resources)
    asked = cli_judge.Request(judge=system.judges.get(task))
    judge = None if asked.judge is None else cli_judge.make(task, asked)
    return made if judge is None else cli_judge.after_eval(folder, judge, asked)


def _table(rows: list[RoleRow], extras: list[Extra]) -> Table:
    """The table of one task, with the extra lines after the roles that they belong to."""
    table = Table(title=f"{rows[0].task}: {rows[0].metric}, %", title_justify="left")
    for column in COLUMNS[1:]:
        table.add_column(column, justify="left" if column == "as" else "right", no_wrap=True)
    extra_lines = {extra.run.spec.role: extra for extra in extras}
    for row in rows:
        table.add_row(*row.cells[1:], style="bold" if row.role == "proxy" else None)
        if row.role in extra_lines:
            [beside] = role_rows([extra_lines[row.role].run])
            table.add_row(extra_lines[row.role].label, *beside.cells[2:], style="dim")
    return table


def _as_json(rows: list[RoleRow], extras: Mapping[str, list[Extra]]) -> dict[str, Any]:
    """The form of the design, with the extra lines, intervals, memory and time beside it."""
    content = summary(rows)
    for task, own in by_task(rows).items():
        entry = content["tasks"][task]
        entry["metric"] = own[0].metric
        for extra in extras[task]:
            entry[extra.key] = run.score_of(extra.run).value
        every = [*((row.role, row) for row in own), *((e.key, role_rows([e.run])[0]) for e in extras[task])]
        entry["rows"] = {
            name: {
                "score": row.score.model_dump(),
                "memory_bytes": row.memory,
                "ms_per_token": row.ms_per_token,
            }
            for name, row in every
        }
    return content
