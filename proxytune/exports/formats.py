"""FORMATS: what runs can be written as. To add one: a file with its Format, its line here, a test."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from proxytune.errors import UserError, did_you_mean
from proxytune.exports import alpaca_eval, every_eval_ever, inspect_log, table
from proxytune.exports.format import Format
from proxytune.run_files import disk_errors_in_one_line, write_atomically

FORMATS: Mapping[str, Format] = {
    "alpaca_eval": alpaca_eval.FORMAT,
    "csv": table.FORMAT,
    "every_eval_ever": every_eval_ever.FORMAT,
    "inspect": inspect_log.FORMAT,
}


def export(kind: str, folder: Path, out: Path | None = None) -> list[Path]:
    """Write the run in `folder` in another tool's format into `out` (the run's own folder). -> the files.

    Raises UserError for a format that is not there, a folder that is not there, and a run that is not
    finished."""
    if kind not in FORMATS:
        raise did_you_mean("format", kind, FORMATS)
    target = out or folder
    contents = FORMATS[kind].files(folder)
    if not target.is_dir():
        raise UserError(f"no folder '{target}' to write to: make it, or name another with --out")
    written = []
    for name, content in contents.items():
        path = target / name
        with disk_errors_in_one_line(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content)
        written.append(path)
    return written
