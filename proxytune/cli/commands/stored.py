"""`proxytune runs` and `proxytune export`: stored runs, listed, and in the files of other tools."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from proxytune.cli import console
from proxytune.cli.options import Json

if TYPE_CHECKING:
    from proxytune.analysis import listing


def export(
    format_: Annotated[
        str, typer.Argument(metavar="FORMAT", help="alpaca_eval, csv, every_eval_ever or inspect.")
    ],
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a finished run.")],
    out: Annotated[Path | None, typer.Option(help="The folder to write to. Default: the run's.")] = None,
    json: Json = False,
) -> None:
    """Write a run in the files of another tool. alpaca_eval: the two files of outputs that it judges. csv: a
    line per example, with its scores. every_eval_ever: a record of that schema and its samples. inspect: a
    log for `inspect view` (needs the extra inspect).

    Example: proxytune export csv results/demo/gsm/proxy
    """
    from proxytune import exports

    written = [str(path) for path in exports.export(format_, run, out)]
    if json:
        console.print_json({"written": written})
        return
    console.show(f"wrote {' and '.join(written)}")
    for line in exports.FORMATS[format_].then(written):
        console.show(line)


def runs(
    results: Annotated[Path, typer.Argument(metavar="RESULTS", help="A folder of results.")] = Path(
        "results"
    ),
    json: Json = False,
) -> None:
    """The runs in a folder of results: what is finished, what is not, and the command that goes on with it.

    Example: proxytune runs results
    """
    from proxytune.analysis import listing

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


def _line(one: listing.ListedRun) -> tuple[str, ...]:
    """A run as a line of the table."""
    from proxytune.report import tables

    limit = None if one.run is None or one.status == "finished" else one.run.spec.limit
    examples = f"{one.done} of {limit}" if limit else str(one.done)
    shown = "" if one.run is None or one.status != "finished" else tables.scored(one.run.headline, one.score)
    metric = f"{one.run.headline} " if one.run is not None and one.score is not None else ""
    return str(one.folder), one.status, "" if one.run is None else examples, f"{metric}{shown}"


def _as_json(one: listing.ListedRun) -> dict[str, object]:
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
