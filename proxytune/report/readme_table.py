"""The one small table of the README: three tasks of the demo system, one line each."""

from __future__ import annotations

from collections.abc import Sequence

from proxytune.config import Role
from proxytune.records import Run
from proxytune.report.escape import in_markdown
from proxytune.report.tables import alike, markdown, role_rows

TASKS = ("gsm", "truthfulqa", "humaneval")
SHOWN: tuple[Role, ...] = ("base", "expert", "proxy", "tuned")


def readme_table(runs: Sequence[Run]) -> str:
    """The scores of the demo's roles with their intervals, and n, as Markdown.

    A task is left out unless all four roles were run under the same conditions: a line never mixes figures.
    """
    plain = [run for run in runs if run.spec.system.name == "demo" and not run.spec.forced]
    lines = []
    for rows in alike(role_rows(plain)):
        scores = {row.role: row for row in rows if row.remark is None and not row.details}
        if rows[0].task not in TASKS or any(role not in scores for role in SHOWN):
            continue
        four = [scores[role] for role in SHOWN]
        over = list(dict.fromkeys(row.examples for row in four))
        if len(over) == 1:
            cells = (row.shown for row in four)
            lines.append((f"{rows[0].task} ({in_markdown(rows[0].metric)}, %)", *cells, over[0]))
    order = {task: place for place, task in enumerate(TASKS)}
    lines.sort(key=lambda line: order[line[0].partition(" ")[0]])
    return markdown(("task", *SHOWN, "n"), lines)
