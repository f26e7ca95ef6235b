"""`proxytune runs`: what a folder of results holds, and what is unfinished."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from proxytune.cli import console
from proxytune.cli.options import Json

if TYPE_CHECKING:
    from proxytune.report.listing import ListedRun


def runs(
    results: Annotated[Path, typer.Argument(metavar="RESULTS", help="A folder of results.")] = Path(
        "results"
    ),
    json: Json = False,
) -> None:
    """The runs in a folder of results: what is finished, what is not, and the command that goes on with it.

    Example: proxytune runs results
    """
    from proxytune.report import listing

    found = listing.listing(results)
    if json:
        console.print_json({"runs": [_as_json(one) for one in found]})
        return
    console.print_table(("run", "status", "examples", "score"), [_line(one) for one in found])
    for one in found:
        if one.status == "unfinished":
            console.show(f"to go on with {one.folder}: {one.command}")
        if one.status == "unreadable":
            console.show(f"not read: {one.problem}")


def _line(one: ListedRun) -> tuple[str, ...]:
    """A run as a line of the table."""
    from proxytune.report import tables

    limit = None if one.run is None or one.status == "finished" else one.run.spec.limit
    examples = f"{one.done} of {limit}" if limit else str(one.done)
    shown = "" if one.run is None or one.status != "finished" else tables.scored(one.run.headline, one.score)
    metric = f"{one.run.headline} " if one.run is not None and one.score is not None else ""
    return str(one.folder), one.status, "" if one.run is None else examples, f"{metric}{shown}"


def _as_json(one: ListedRun) -> dict[str, object]:
    """A run as JSON."""
    spec = None if one.run is None else one.run.spec
    return {
        "folder": str(one.folder),
        "status": one.status,
        "system": spec and spec.system.name,
        "task": spec and spec.task,
        "as": spec and spec.role,
        "alpha": spec and spec.alpha.text,
        "examples": one.done,
        "metric": one.run and one.run.headline,
        "score": one.score and one.score.model_dump(mode="json"),
        "command": one.command or None,
        "problem": one.problem or None,
    }
