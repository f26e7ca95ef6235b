"""The paper's tables with our figures beside its own, and results/README.md. Loads no model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from proxytune.config import ROLES
from proxytune.paper import published, recipes
from proxytune.records import NO_SCORE, Run
from proxytune.report.escape import in_markdown
from proxytune.report.tables import alike, markdown, markdown_table, percent, role_rows
from proxytune.report.tables import title as table_title

ROUNDING = 0.0501
"""Percentage points by which a printed figure may lie beside the stored one it was rounded from."""


def all_lines(
    recipe: recipes.Recipe, paper: Mapping[str, Any], runs: Mapping[recipes.Key, Run]
) -> list[recipes.Line]:
    """The paper's lines, then those of the other systems that have runs of the recipe's tasks."""
    lines = recipes.published_lines(recipe, paper)
    theirs = {key[0] for line in lines for key in line.keys}
    tasks = {column.task for column in recipe.columns}
    others = dict.fromkeys(name for name, task, _ in runs if name not in theirs and task in tasks)
    own = [line for name in others for line in recipes.own_lines(recipe, paper, name, ROLES)]
    return lines + [line for line in own if any(key in runs for key in line.keys)]


def side_by_side(
    recipe: recipes.Recipe, paper: Mapping[str, Any], runs: Mapping[recipes.Key, Run]
) -> tuple[list[str], list[list[str]]]:
    """Column titles and cells of a table of the paper: the stored figure, the printed one where it differs,
    and ours with its interval on a line of its own."""
    columns = paper["tables"][recipe.table]["columns"]
    rows = []
    for line in all_lines(recipe, paper, runs):
        cells = []
        for i, column in enumerate(columns):
            parts = [] if line.published is None else [_published(paper, column, line.published, i)]
            ours = _ours(recipe, line, i, runs)
            cells.append("\n".join(parts + ([] if ours is None else [ours])))
        rows.append([line.size, line.role, *cells])
    return ["size", "as", *(column["name"] for column in columns)], rows


def _published(paper: Mapping[str, Any], column: Mapping[str, Any], row: Mapping[str, Any], i: int) -> str:
    """A published cell."""
    printed, stored = row["printed"][i], published.stored_percent(paper, column, row["runs"][i])
    if stored is None:
        return f"({printed})"
    return f"{stored:.2f}" + ("" if abs(stored - printed) < ROUNDING else f" ({printed} printed)")


def _ours(recipe: recipes.Recipe, line: recipes.Line, i: int, runs: Mapping[recipes.Key, Run]) -> str | None:
    """Our figure for a cell with its n, the metric's name where it is not the paper's, and the settings that
    are not; None without a run."""
    run, column = runs.get(line.keys[i]), recipe.columns[i]
    if run is None:
        return None
    name = recipes.shown_metric(column, run)
    notes = [*recipes.unlike_the_paper(run), *([] if run.spec.remark is None else [run.spec.remark])]
    if name is None:
        why = NO_SCORE.get(run.headline, f"no {column.metrics[0]}")
        return ", ".join([f"ours: {why}", f"n = {run.n}", *notes])
    over, of = run.metrics[name].over(run.n)
    n = f"n = {over}" + ("" if over == of else f" of {of}")
    notes = ([] if name == column.metrics[0] else [name]) + notes
    return ", ".join([f"ours {percent(run.metrics[name])}", n, *notes])


def gaps(recipe: recipes.Recipe, paper: Mapping[str, Any], runs: Mapping[recipes.Key, Run]) -> str:
    """One line on the gap closed: the paper's, and ours for every system that has the runs; "" if the table
    has none."""
    sides, lines = [], all_lines(recipe, paper, runs)
    if "gap_closed" in paper["tables"][recipe.table]:
        sizes = ", ".join(
            f"{100 * published.paper_gap_closed(paper, recipe.table, size):.2f}% ({size})"
            for size in recipe.systems
        )
        sides.append(f"paper {sizes}")
    for size in dict.fromkeys(line.size for line in lines):
        own = recipes.our_gap_closed(recipe, [line for line in lines if line.size == size], runs)
        if own is not None:
            sides.append(f"ours {100 * own[0]:.2f}% ({size}, {own[1]} of {len(recipe.columns)} columns)")
    return f"Gap closed, mean over the columns, not capped: {'; '.join(sides)}." if sides else ""


def compared(
    paper: Mapping[str, Any], runs: Mapping[recipes.Key, Run], *, asked: bool
) -> list[recipes.Recipe]:
    """The recipes of which there is a run, of the paper's systems or, where the tables were asked for, of
    any."""
    found = [recipes.load_recipe(name) for name in recipes.recipe_names()]
    lines = {r.name: all_lines(r, paper, runs) if asked else recipes.published_lines(r, paper) for r in found}
    return [r for r in found if any(key in runs for line in lines[r.name] for key in line.keys)]


def title(recipe: recipes.Recipe) -> str:
    """What a table is called."""
    return f"Table {recipe.table} of the paper: {recipe.title} (%)"


def rich_side_by_side(
    recipe: recipes.Recipe, paper: Mapping[str, Any], runs: Mapping[recipes.Key, Run]
) -> Table:
    """The table for the terminal."""
    columns, rows = side_by_side(recipe, paper, runs)
    table = Table(title=title(recipe), title_justify="left", show_lines=True)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i < 2 else "right")
    for row in rows:
        table.add_row(*row, style="bold" if row[1] == "proxy" else None)
    return table


def markdown_side_by_side(
    recipe: recipes.Recipe, paper: Mapping[str, Any], runs: Mapping[recipes.Key, Run]
) -> str:
    """The table as Markdown."""
    columns, rows = side_by_side(recipe, paper, runs)
    lines = [["<br>".join(map(in_markdown, cell.split("\n"))) for cell in row] for row in rows]
    return markdown(columns, lines)


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
    for rows in alike(role_rows(demo)):
        parts += [f"### {in_markdown(table_title(rows))}\n", markdown_table(rows)]
    if not demo:
        parts.append("No runs yet.\n")
    parts.append(PUBLISHED)
    for recipe in map(recipes.load_recipe, recipes.recipe_names()):
        parts += [f"### Table {recipe.table}: {recipe.title}\n", markdown_side_by_side(recipe, paper, {})]
        if line := gaps(recipe, paper, {}):
            parts.append(f"{line}\n")
    parts += [
        "### Where paper and repository disagree\n",
        "".join(f"- {line}\n" for line in paper["disagreements"]),
    ]
    return "\n".join(parts)
