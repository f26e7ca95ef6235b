"""`proxytune export`: a finished run in the files of another tool."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from proxytune.cli import console
from proxytune.cli.options import Json


def export(
    format_: Annotated[str, typer.Argument(metavar="FORMAT", help="alpaca_eval.")],
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a finished run.")],
    out: Annotated[Path | None, typer.Option(help="The folder to write to. Default: the run's.")] = None,
    json: Json = False,
) -> None:
    """Write a run in the files of another tool: alpaca_eval's model_outputs.json and reference_outputs.json.

    Example: proxytune export alpaca_eval results/llama2-13b/alpaca_farm/proxy
    """
    from proxytune.runs import export as exports

    written = [str(path) for path in exports.export(format_, run, out)]
    if json:
        console.print_json({"written": written})
        return
    console.show(f"wrote {' and '.join(written)}")
    for line in exports.FORMATS[format_].then(written):
        console.show(line)
