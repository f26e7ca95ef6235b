"""Tables of finished runs: run.json -> text. Loads no model. The paper's tables are in paper_tables.py,
responses in examples.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from proxytune.comparison import Conditions, apart, comparable, conditions, details, gap, models_of
from proxytune.config import ROLES, Role
from proxytune.records import NO_SCORE, UNSCORED, Cost, Metric, Run, TaskFacts
from proxytune.report.escape import cell, in_markdown
from proxytune.results import find_runs
from proxytune.tasks.own import facts_of

COLUMNS = ("system", "as", "score [95%]", "gap closed", "memory", "ms / token", "n")


@dataclass(frozen=True)
class RoleRow:
    """One line of a table: a role of a system on a task."""

    system: str
    task: str
    role: Role
    n: int
    metric: str
    score: Metric | None
    """None where nothing was judged or executed, or every example failed."""
    gap_closed: float | None
    """For the proxy and for a base with a forced opener; None where the gap is not firm, or where base and
    tuned were not run under the same conditions."""
    conditions: Conditions
    apart: str
    """The conditions that tell its table from others of the task; "" where there is one only."""
    details: str
    """The settings that tell it from other rows of its system and role."""
    forced: str | None
    """The text that every response was made to begin with (a control)."""
    memory: int
    """Bytes of weights, and of KV cache at its fullest, of the models that the role needs; 0 if not
    recorded."""
    ms_per_token: float | None
    """Decoding time, without prefill, over generated tokens, all rows of the batch together; None for
    likelihoods."""
    facts: TaskFacts
    """Of its task."""
    ms_per_item: float | None = None
    """Time per example of a run by likelihood."""
    remark: str | None = None
    """What is shown beside the figures."""

    @property
    def label(self) -> str:
        """The role, whether its opener was forced, what tells it from others, and the remark."""
        label = self.role if self.forced is None else f"{self.role}, opener forced"
        label += f", {self.details}" if self.details else ""
        return label if self.remark is None else f"{label} ({self.remark})"

    @property
    def shown(self) -> str:
        """The score with its interval, or why there is none."""
        return scored(self.metric, self.score)

    @property
    def cells(self) -> tuple[str, ...]:
        """The line under `COLUMNS`."""
        gap = "n/a" if self.role == "proxy" else ""
        if self.gap_closed is not None:
            gap = f"{100 * self.gap_closed:.1f}%"
        cells = (self.system, self.label, self.shown, gap, size(self.memory))
        return (*cells, self.speed, self.examples)

    @property
    def examples(self) -> str:
        """How many examples the score is over, and of how many where that is not all."""
        return examples(self.score, self.n)

    @property
    def speed(self) -> str:
        """Time per token, or per item where likelihoods were taken."""
        if self.ms_per_item is not None:
            return f"{self.ms_per_item:.0f} / item"
        return "" if self.ms_per_token is None else f"{self.ms_per_token:.2f}"


def percent(metric: Metric) -> str:
    """A share in percent with its interval; a number as it is."""
    if metric.n == 0:
        return NO_SCORE["faulty"]
    if metric.unit == "number":
        return f"{metric.value:g}"
    scale = 1 if metric.unit == "percent" else 100
    value = f"{scale * metric.value:.1f}"
    if metric.low is None or metric.high is None:
        return value
    return f"{value} [{scale * metric.low:.1f}, {scale * metric.high:.1f}]"


def size(count: int) -> str:
    """Bytes in MB or GB (powers of ten)."""
    if not count:
        return ""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def scored(headline: str, score: Metric | None) -> str:
    """A score with its interval, or why there is none."""
    return NO_SCORE.get(headline, NO_SCORE["faulty"]) if score is None else percent(score)


def examples(score: Metric | None, n: int) -> str:
    """How many of a run's n examples a score is over, and of how many where that is not all."""
    over, of = (0, n) if score is None else score.over(n)
    return str(of) if over == of else f"{over} of {of}"


def figure(name: str, metric: Metric) -> str:
    """The figure of a metric in a list. A share of examples without a score is no figure among scores:
    `coverage` says how many these are."""
    return "" if name in UNSCORED else percent(metric)


def coverage(name: str, metric: Metric, n: int) -> str:
    """How many of a run's n examples a metric is over, where it is not all: `over 2 of 3`. For a share of
    examples without a score, how many these are: `1 of 3`."""
    if name in UNSCORED:
        return f"{round(metric.value * (metric.n or n))} of {metric.n or n}"
    over, of = metric.over(n)
    return "" if over == of else f"over {over} of {of}"


# Rows


def main_runs(root: Path) -> tuple[list[tuple[Path, Run]], int]:
    """The finished runs that a table is about with their folders, and how many others there are.

    Per system and task these are the runs with default settings (`root/<system>/<task>/<as>`) and the
    controls under the same conditions; where no run has default settings, all of them.
    """
    found = find_runs(root)
    usual = [run for folder, run in found if len(folder.relative_to(root).parts) == 3 and not run.spec.forced]
    known: dict[tuple[str, str], list[Run]] = {}
    for run in usual:
        known.setdefault((run.spec.system.name, run.spec.task), []).append(run)

    def shown(run: Run) -> bool:
        own = known.get((run.spec.system.name, run.spec.task))
        control = run.spec.forced is not None
        return own is None or run in own or (control and any(comparable((run, other)) for other in own))

    main = [(folder, run) for folder, run in found if shown(run)]
    return main, len(found) - len(main)


def role_rows(runs: Sequence[Run]) -> list[RoleRow]:
    """Runs as table lines: by task, by conditions, by system, the roles in the order base, antiexpert,
    expert, proxy, tuned. A run that another repeats, figures and all, has no line of its own."""
    tasks = list(dict.fromkeys(run.spec.task for run in runs))
    systems = list(dict.fromkeys(run.spec.system.name for run in runs))
    tables: dict[Conditions, list[Run]] = {}
    for run in sorted(runs, key=lambda run: tasks.index(run.spec.task)):
        tables.setdefault(conditions(run), []).append(run)
    rows = list[RoleRow]()
    for task in tasks:
        own = [table for table in tables.values() if table[0].spec.task == task]
        for table, told in zip(own, apart([table[0] for table in own]), strict=True):
            rows += _table_rows(table, told, systems)
    return rows


def _table_rows(table: Sequence[Run], told: str, systems: Sequence[str]) -> list[RoleRow]:
    """The lines of the runs under the same conditions."""
    rows: dict[tuple[str, str, str], RoleRow] = {}
    for system in systems:
        own = [run for run in table if run.spec.system.name == system]
        own.sort(key=lambda run: (ROLES.index(run.spec.role), run.spec.forced is not None))
        for run, its in zip(own, details(own), strict=True):
            row = _row(run, own, told, its)
            rows.setdefault((row.system, row.label, row.shown), row)
    return list(rows.values())


def _row(run: Run, beside: Sequence[Run], told: str, own: str) -> RoleRow:
    """The line of one run; `beside` are its system's runs under the same conditions."""
    cost, generated = run.cost, run.cost.generated_tokens and run.spec.mode == "generate"
    return RoleRow(
        system=run.spec.system.name,
        task=run.spec.task,
        role=run.spec.role,
        n=run.n,
        metric=run.headline,
        score=run.score,
        gap_closed=_gap(run, beside) if run.spec.role == "proxy" or run.spec.forced else None,
        conditions=conditions(run),
        apart=told,
        details=own,
        forced=run.spec.forced,
        memory=_memory(cost, run.spec.role),
        ms_per_token=1000 * cost.decode_seconds / cost.generated_tokens if generated else None,
        ms_per_item=1000 * cost.seconds / run.n if run.spec.mode != "generate" and run.n else None,
        remark=run.spec.remark,
        facts=facts_of(run),
    )


def _gap(steered: Run, beside: Sequence[Run]) -> float | None:
    """The gap that a run closed, from the base and tuned runs of its system under the same conditions. None
    where there are several of one role that do not agree."""
    ends = [run for run in beside if run.spec.role in ("base", "tuned") and not run.spec.forced]
    own = [run for run in ends if models_of(run) == models_of(steered)]
    bases, tuned = ([run for run in own if run.spec.role == role] for role in ("base", "tuned"))
    found = {gap(base, steered, top, steered.headline) for base in bases for top in tuned}
    return found.pop() if len(found) == 1 else None


def _memory(cost: Cost, role: Role) -> int:
    """Bytes of the models that a role needs: its own, or all but the tuned one for the proxy."""
    needed = [
        memory
        for name, memory in cost.memory.items()
        if (name != "tuned" if role == "proxy" else name.startswith(role))
    ]
    return sum(memory.weights + memory.kv_peak for memory in needed)


def summary(rows: Sequence[RoleRow]) -> dict[str, dict[str, dict[str, Any]]]:
    """The figures of one system as `proxytune demo --json` prints them."""
    tasks: dict[str, dict[str, Any]] = {}
    for row in (row for own in main_tables(rows).values() for row in own):
        entry = tasks.setdefault(row.task, {"n": row.n})
        name = row.role if row.forced is None else f"{row.role}_forced"
        entry[name] = None if row.score is None else row.score.value
        if row.role == "proxy":
            entry["gap_closed"] = row.gap_closed
    return {"tasks": tasks}


# Tables


def alike(rows: Sequence[RoleRow]) -> list[list[RoleRow]]:
    """The rows of each table: of one task, under the same conditions."""
    found: dict[Conditions, list[RoleRow]] = {}
    for row in rows:
        found.setdefault(row.conditions, []).append(row)
    return list(found.values())


def main_tables(rows: Sequence[RoleRow]) -> dict[str, list[RoleRow]]:
    """Of each task the rows under the conditions that most of its rows share."""
    found: dict[str, list[RoleRow]] = {}
    for own in alike(rows):
        if len(own) > len(found.get(own[0].task, ())):
            found[own[0].task] = own
    return found


def title(rows: Sequence[RoleRow]) -> str:
    """What the table of these rows is called."""
    task, metric, told = rows[0].task, rows[0].metric, rows[0].apart
    return f"{task}: {NO_SCORE.get(metric, metric)}" + (f" ({told})" if told else "")


def rich_table(rows: Sequence[RoleRow]) -> Table:
    """The rows of one task for the terminal. The system is shown only where there are several."""
    first = 0 if len({row.system for row in rows}) > 1 else 1
    scored = any(row.score is not None for row in rows)
    table = Table(title=title(rows) + (", %" if scored else ""), title_justify="left")
    for column in COLUMNS[first:]:
        table.add_column(column, justify="left" if column in ("system", "as") else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row.cells[first:], style="bold" if row.role == "proxy" else None)
    return table


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table. Its cells are Markdown; no text in them can end a cell or a line."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(map(cell, cells)) + " |" for cells in lines) + "\n"


def markdown_table(rows: Sequence[RoleRow]) -> str:
    """The rows of one task as Markdown."""
    first = 0 if len({row.system for row in rows}) > 1 else 1
    named = [(in_markdown(row.system), in_markdown(row.label), *row.cells[2:]) for row in rows]
    return markdown(COLUMNS[first:], [cells[first:] for cells in named])


README_TASKS = ("gsm", "truthfulqa", "humaneval")
README_ROLES: tuple[Role, ...] = ("base", "expert", "proxy", "tuned")


def readme_table(runs: Sequence[Run]) -> str:
    """The one small table of the README, three tasks in a line each: the scores of the demo's roles with
    their intervals, and n, as Markdown.

    A task is left out unless all four roles were run under the same conditions: a line never mixes figures.
    """
    plain = [run for run in runs if run.spec.system.name == "demo" and not run.spec.forced]
    lines = []
    for rows in alike(role_rows(plain)):
        scores = {row.role: row for row in rows if row.remark is None and not row.details}
        if rows[0].task not in README_TASKS or any(role not in scores for role in README_ROLES):
            continue
        four = [scores[role] for role in README_ROLES]
        over = list(dict.fromkeys(row.examples for row in four))
        if len(over) == 1:
            cells = (row.shown for row in four)
            lines.append((f"{rows[0].task} ({in_markdown(rows[0].metric)}, %)", *cells, over[0]))
    order = {task: place for place, task in enumerate(README_TASKS)}
    lines.sort(key=lambda line: order[line[0].partition(" ")[0]])
    return markdown(("task", *README_ROLES, "n"), lines)
