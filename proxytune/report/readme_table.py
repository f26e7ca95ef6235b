"""The one small table of the README: three tasks of the demo system, one line each."""

from __future__ import annotations

from collections.abc import Sequence

from proxytune.config import Role
from proxytune.records import Run
from proxytune.report.escape import in_markdown
from proxytune.report.tables import by_task, markdown, percent, role_rows

TASKS = ("gsm", "truthfulqa", "humaneval")
SHOWN: tuple[Role, ...] = ("base", "expert", "proxy", "tuned")


def readme_table(runs: Sequence[Run]) -> str:
    """The scores of the demo's roles with their intervals, and n, as Markdown.

    A task is left out unless all four roles were run on the same examples: a line never mixes figures.
    """
    plain = [run for run in runs if run.spec.system.name == "demo" and not run.spec.forced]
    lines = []
    for task, rows in by_task(role_rows(plain)).items():
        scores = {row.role: row for row in rows if row.remark is None}
        data = {run.spec.data_sha256 for run in plain if run.spec.task == task and run.spec.role in SHOWN}
        same = len({(row.n, row.metric) for row in scores.values()}) == 1 and len(data) == 1
        if task in TASKS and same and all(role in scores for role in SHOWN):
            first = scores["proxy"]
            cells = (percent(scores[role].score) for role in SHOWN)
            lines.append((f"{task} ({in_markdown(first.metric)}, %)", *cells, str(first.n)))
    order = {task: place for place, task in enumerate(TASKS)}
    lines.sort(key=lambda line: order[line[0].partition(" ")[0]])
    return markdown(("task", *SHOWN, "n"), lines)
