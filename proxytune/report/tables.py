"""Tables of finished runs: run.json -> text. Loads no model. The paper's tables are in paper_tables.py,
responses in examples.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from proxytune.config import ROLES, Role
from proxytune.intervals import gap_closed
from proxytune.records import UNSCORED, Cost, Metric, Run
from proxytune.report.escape import cell, in_markdown
from proxytune.results import find_runs

COLUMNS = ("system", "as", "score [95%]", "gap closed", "memory", "ms / token", "n")


@dataclass(frozen=True)
class RoleRow:
    """One line of a table: a role of a system on a task."""

    system: str
    task: str
    role: Role
    n: int
    metric: str
    score: Metric
    gap_closed: float | None
    """For the proxy and for a base with a forced opener; None where the gap is not firm."""
    forced: str | None
    """The text that every response was made to begin with (a control)."""
    memory: int
    """Bytes of weights, and of KV cache at its fullest, of the models that the role needs; 0 if not
    recorded."""
    ms_per_token: float | None
    """Decoding time, without prefill, over generated tokens, all rows of the batch together; None for
    likelihoods."""
    ms_per_item: float | None = None
    """Time per example of a run by likelihood."""
    remark: str | None = None
    """What is shown beside the figures."""

    @property
    def label(self) -> str:
        """The role, whether its opener was forced, and the remark."""
        label = self.role if self.forced is None else f"{self.role}, opener forced"
        return label if self.remark is None else f"{label} ({self.remark})"

    @property
    def cells(self) -> tuple[str, ...]:
        """The line under `COLUMNS`."""
        gap = "n/a" if self.role == "proxy" else ""
        if self.gap_closed is not None:
            gap = f"{100 * self.gap_closed:.1f}%"
        cells = (self.system, self.label, percent(self.score), gap, size(self.memory))
        return (*cells, self.speed, self.examples)

    @property
    def examples(self) -> str:
        """How many examples the score is over, and of how many where that is not all."""
        over = self.n if self.score.n is None or self.metric in UNSCORED else self.score.n
        return str(self.n) if over == self.n else f"{over} of {self.n}"

    @property
    def speed(self) -> str:
        """Time per token, or per item where likelihoods were taken."""
        if self.ms_per_item is not None:
            return f"{self.ms_per_item:.0f} / item"
        return "" if self.ms_per_token is None else f"{self.ms_per_token:.2f}"


def percent(metric: Metric) -> str:
    """A share in percent with its interval; a number as it is."""
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


def coverage(name: str, metric: Metric, n: int) -> str:
    """How many of a run's n examples a metric is over, where it is not all: `over 2 of 3`. For a share of
    examples without a score, how many these are: `1 of 3`."""
    if name in UNSCORED:
        return f"{round(metric.value * n)} of {n}"
    return "" if metric.n in (None, n) else f"over {metric.n} of {n}"


# Rows


def main_runs(root: Path) -> tuple[list[tuple[Path, Run]], int]:
    """The finished runs that a table is about with their folders, and how many others there are.

    Per system and task these are the runs with default settings (`root/<system>/<task>/<as>`) and the
    controls on the same examples; where no run has default settings, all of them.
    """
    found = find_runs(root)
    usual = [run for folder, run in found if len(folder.relative_to(root).parts) == 3 and not run.spec.forced]
    data = {(run.spec.system.name, run.spec.task): run.spec.data_sha256 for run in usual}

    def shown(run: Run) -> bool:
        own = data.get((run.spec.system.name, run.spec.task))
        return own is None or run in usual or bool(run.spec.forced and run.spec.data_sha256 == own)

    main = [(folder, run) for folder, run in found if shown(run)]
    return main, len(found) - len(main)


def role_rows(runs: Sequence[Run]) -> list[RoleRow]:
    """Runs as table lines: by task, by system, the roles in the order base, antiexpert, expert, proxy,
    tuned."""
    tasks = list(dict.fromkeys(run.spec.task for run in runs))
    systems = list(dict.fromkeys(run.spec.system.name for run in runs))

    def place(run: Run) -> tuple[int, int, int, bool]:
        spec = run.spec
        return (
            tasks.index(spec.task),
            systems.index(spec.system.name),
            ROLES.index(spec.role),
            bool(spec.forced),
        )

    return [_row(run, runs) for run in sorted(runs, key=place)]


def _row(run: Run, runs: Sequence[Run]) -> RoleRow:
    """The line of one run."""
    cost, generated = run.cost, run.cost.generated_tokens and run.spec.mode == "generate"
    return RoleRow(
        system=run.spec.system.name,
        task=run.spec.task,
        role=run.spec.role,
        n=run.n,
        metric=run.headline,
        score=run.metrics[run.headline],
        gap_closed=_gap(run, runs) if run.spec.role == "proxy" or run.spec.forced else None,
        forced=run.spec.forced,
        memory=_memory(cost, run.spec.role),
        ms_per_token=1000 * cost.decode_seconds / cost.generated_tokens if generated else None,
        ms_per_item=1000 * cost.seconds / run.n if run.spec.mode == "likelihood" and run.n else None,
        remark=run.spec.remark,
    )


def _gap(steered: Run, runs: Sequence[Run]) -> float | None:
    """The gap that a run closed, from the base and tuned runs of its system on the same examples."""

    def what(run: Run) -> tuple[str, str, str, str]:
        return run.spec.system.name, run.spec.task, run.spec.data_sha256, run.headline

    plain = [run for run in runs if what(run) == what(steered) and not run.spec.forced]
    scores = {run.spec.role: run.metrics[run.headline] for run in plain}
    if "base" not in scores or "tuned" not in scores:
        return None
    return gap_closed(scores["base"], steered.metrics[steered.headline], scores["tuned"])


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
    for row in rows:
        entry = tasks.setdefault(row.task, {"n": row.n})
        entry[row.role if row.forced is None else f"{row.role}_forced"] = row.score.value
        if row.role == "proxy":
            entry["gap_closed"] = row.gap_closed
    return {"tasks": tasks}


# Tables


def by_task(rows: Sequence[RoleRow]) -> dict[str, list[RoleRow]]:
    """The rows of each task."""
    tasks: dict[str, list[RoleRow]] = {}
    for row in rows:
        tasks.setdefault(row.task, []).append(row)
    return tasks


def rich_table(rows: Sequence[RoleRow]) -> Table:
    """The rows of one task for the terminal. The system is shown only where there are several."""
    task, metric = rows[0].task, rows[0].metric
    first = 0 if len({row.system for row in rows}) > 1 else 1
    table = Table(title=f"{task}: {metric}, %", title_justify="left")
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
