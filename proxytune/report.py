"""Tables of finished runs, and the published figures beside them: run.json and paper.json -> text. Loads no
model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from proxytune.config import ROLES, Role, shipped
from proxytune.records import Cost, Metric, Run
from proxytune.results import find_runs
from proxytune.scoring import gap_closed

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
    """Decoding time over generated tokens, all rows of the batch together."""

    @property
    def label(self) -> str:
        """The role, and whether its opener was forced."""
        return self.role if self.forced is None else f"{self.role}, opener forced"

    @property
    def cells(self) -> tuple[str, ...]:
        """The line under `COLUMNS`."""
        gap = "n/a" if self.role == "proxy" else ""
        if self.gap_closed is not None:
            gap = f"{100 * self.gap_closed:.1f}%"
        pace = "" if self.ms_per_token is None else f"{self.ms_per_token:.2f}"
        return (self.system, self.label, percent(self.score), gap, size(self.memory), pace, str(self.n))


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


# Rows


def main_runs(root: Path) -> tuple[list[Run], int]:
    """The finished runs that a table is about, and how many others there are.

    Per system and task these are the runs with default settings (`root/<system>/<task>/<as>`) and the
    controls on the same examples; where no run has default settings, all of them.
    """
    found = find_runs(root)
    usual = [run for folder, run in found if len(folder.relative_to(root).parts) == 3 and not run.spec.forced]
    data = {(run.spec.system.name, run.spec.task): run.spec.data_sha256 for run in usual}

    def shown(run: Run) -> bool:
        own = data.get((run.spec.system.name, run.spec.task))
        return own is None or run in usual or bool(run.spec.forced and run.spec.data_sha256 == own)

    main = [run for _, run in found if shown(run)]
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
    cost = run.cost
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
        ms_per_token=1000 * cost.seconds / cost.generated_tokens if cost.generated_tokens else None,
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
    """A Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"


def markdown_table(rows: Sequence[RoleRow]) -> str:
    """The rows of one task as Markdown."""
    first = 0 if len({row.system for row in rows}) > 1 else 1
    return markdown(COLUMNS[first:], [row.cells[first:] for row in rows])


# The paper


def read_paper() -> Mapping[str, Any]:
    """results/paper.json: the published figures."""
    content: Mapping[str, Any] = json.loads(shipped("results/paper.json").read_text(encoding="utf-8"))
    return content


def stored_percent(paper: Mapping[str, Any], column: Mapping[str, Any], run: str | None) -> float | None:
    """The stored metric behind a cell of a published table, in percent; None where nothing was stored."""
    if run is None:
        return None
    return float(paper["stored"][column["task"]]["runs"][run][column["metric"]] * column["scale"])


def paper_gap_closed(paper: Mapping[str, Any], table: str, model_size: str) -> float:
    """The mean share of the gap closed over a table's columns, from the stored metrics (the paper's
    headline)."""
    content = paper["tables"][table]
    rows = {row["role"]: row for row in content["rows"] if row["size"] == model_size}
    shares = []
    for i, column in enumerate(content["columns"]):
        cells = (stored_percent(paper, column, rows[role]["runs"][i]) for role in ("base", "proxy", "tuned"))
        base, proxy, tuned = (cell for cell in cells if cell is not None)
        shares.append((proxy - base) / (tuned - base))
    return sum(shares) / len(shares)


def paper_table(paper: Mapping[str, Any], table: str) -> str:
    """A published table as Markdown: the stored figure, and the printed one in brackets where they differ."""
    content = paper["tables"][table]
    rows = []
    for row in content["rows"]:
        cells = []
        for column, printed, run in zip(content["columns"], row["printed"], row["runs"], strict=True):
            stored = stored_percent(paper, column, run)
            if stored is None:
                cells.append(f"({printed})")
            else:
                same = abs(stored - printed) < 0.0501
                cells.append(f"{stored:.2f}" if same else f"{stored:.2f} ({printed} printed)")
        rows.append([row["size"], row["role"], *cells])
    return markdown(["size", "as", *(column["name"] for column in content["columns"])], rows)


INTRODUCTION = """# Results

Generated from the run.json files in this folder and from paper.json; do not edit.

## The demo system

Miniature models, trained from nothing by this repository (`make demo-models`) on a generated world. They show
that the machinery works and what its parts do, not how large models behave. Scores in percent with 95%
bootstrap intervals over examples. Memory is weights plus the KV cache at its fullest; time is decoding time
per generated token, all rows of a batch together.
"""
PUBLISHED = """## The paper

In percent. Figures are those of the stored metrics.json files; `(x printed)` follows where the paper's table
has another figure, and a figure in brackets alone was printed but not stored.
"""


def results_readme(paper: Mapping[str, Any], runs: Sequence[Run]) -> str:
    """The text of results/README.md: the runs of models that ship with proxytune, and the paper's tables."""
    demo = [run for run in runs if (run.spec.system.base.model or "").startswith("demo://")]
    parts = [INTRODUCTION]
    for task, rows in by_task(role_rows(demo)).items():
        parts += [f"### {task}: {rows[0].metric}\n", markdown_table(rows)]
    if not demo:
        parts.append("No runs yet.\n")
    parts.append(PUBLISHED)
    for table in ("2", "3", "4", "5"):
        parts += [f"### Table {table}: {paper['tables'][table]['title']}\n", paper_table(paper, table)]
        if table == "2":
            gaps = ", ".join(f"{100 * paper_gap_closed(paper, '2', s):.2f}% ({s})" for s in ("13B", "70B"))
            parts.append(f"Gap closed, mean over the five columns, not capped: {gaps}.\n")
    parts += [
        "### Where paper and repository disagree\n",
        "".join(f"- {line}\n" for line in paper["disagreements"]),
    ]
    return "\n".join(parts)
