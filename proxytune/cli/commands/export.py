"""`proxytune export`: a finished run in the files of another tool."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from proxytune.cli import console
from proxytune.cli.options import Json


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
