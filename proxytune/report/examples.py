"""Some responses of every role to the same examples, for the terminal and as Markdown. Loads no model.

Responses are text that nobody checked: control characters and markup are shown, never obeyed. Hateful text
(ToxiGen) is hidden unless it is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table
from rich.text import Text

from proxytune.comparison import Conditions, conditions, models_of
from proxytune.config import ROLES
from proxytune.records import JsonRow, Run
from proxytune.report.escape import in_markdown
from proxytune.report.tables import markdown
from proxytune.results import read_rows
from proxytune.tasks.own import facts_of
from proxytune.terminal import visible

HIDDEN = "[hateful text, hidden: --show-hateful shows it]"
LONGEST = 400
"""Characters of a text that are shown."""


@dataclass(frozen=True)
class RoleResponse:
    """The response of one role to an example."""

    who: str
    scores: str
    text: str


@dataclass(frozen=True)
class Shown:
    """One example with the responses of all roles of a system."""

    title: str
    asked: str
    responses: tuple[RoleResponse, ...]


def examples(found: Sequence[tuple[Path, Run]], count: int, *, show_hateful: bool) -> list[Shown]:
    """The first `count` examples of every system and task with the response of each role. Runs whose rows
    are not stored beside their run.json are left out."""
    groups: dict[tuple[str, Conditions], list[tuple[Run, list[JsonRow]]]] = {}
    for folder, run in sorted(found, key=lambda pair: ROLES.index(pair[1].spec.role)):
        rows = read_rows(folder)[:count]
        if rows and run.spec.mode == "generate":
            groups.setdefault((models_of(run), conditions(run)), []).append((run, rows))
    return [
        _shown(place, members, show_hateful)
        for members in groups.values()
        for place in range(min(len(rows) for _, rows in members))
    ]


def _shown(place: int, members: Sequence[tuple[Run, list[JsonRow]]], show_hateful: bool) -> Shown:
    """The example at a place of the runs' rows (they are in the order of the data)."""
    run, rows = members[0]
    facts = facts_of(run)
    hide = facts.hateful and not show_hateful
    responses = []
    for own, its_rows in members:
        row, forced = its_rows[place], "" if own.spec.forced is None else ", opener forced"
        scores = ", ".join(f"{name} {value:g}" for name, value in row.get("scores", {}).items())
        text = row["responses"][0]["text"] if row.get("responses") else ""
        responses.append(RoleResponse(own.spec.role + forced, scores, HIDDEN if hide else plain(text)))
    asked = HIDDEN if hide else plain(str(rows[place].get(facts.asked, "")))
    title = f"{run.spec.system.name}, {run.spec.task}, example {rows[place]['id']}"
    return Shown(title, asked, tuple(responses))


def plain(text: str) -> str:
    """A text in one line of readable length, with its control characters written out."""
    line = " / ".join(part.strip() for part in text.split("\n") if part.strip())
    line = visible(line)
    return line if len(line) <= LONGEST else line[:LONGEST] + " ..."


def rich_example(shown: Shown) -> Table:
    """An example for the terminal."""
    table = Table(title=Text(f"{shown.title}: {shown.asked}"), title_justify="left", show_lines=True)
    for column in ("as", "scores", "response"):
        table.add_column(column, overflow="fold")
    for one in shown.responses:
        table.add_row(Text(one.who), Text(one.scores), Text(one.text))
    return table


def markdown_example(shown: Shown) -> str:
    """An example as Markdown; the texts' own markup is shown as it is."""
    rows = [[in_markdown(one.who), in_markdown(one.scores), in_markdown(one.text)] for one in shown.responses]
    title, asked = in_markdown(shown.title), in_markdown(shown.asked)
    return f"**{title}**: {asked}\n\n{markdown(('as', 'scores', 'response'), rows)}"
