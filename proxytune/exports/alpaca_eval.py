"""FORMATS: a finished run in the files of other tools. To add one: a function, its line here, a test."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from proxytune.errors import UserError, did_you_mean
from proxytune.records import JsonRow
from proxytune.run_files import write_atomically
from proxytune.runs.verdicts import read_finished
from proxytune.terminal import json_text


def alpaca_eval(folder: Path) -> dict[str, list[JsonRow]]:
    """What the `alpaca_eval` tool reads: the run's outputs, and the baseline's."""
    run, rows = read_finished("alpaca_farm", folder)
    name = f"{run.spec.system.name}-{run.spec.role}"
    sides = {"model_outputs.json": ("output_2", name), "reference_outputs.json": ("output_1", None)}
    return {
        file: [
            {
                "dataset": row.get("dataset", ""),
                "instruction": row["instruction"],
                "output": row[column],
                "generator": generator or row.get("generator_1", ""),
            }
            for row in rows
        ]
        for file, (column, generator) in sides.items()
    }


def _then_alpaca_eval(written: Sequence[str]) -> tuple[str, ...]:
    outputs, reference = written
    return (
        f"then: alpaca_eval --model_outputs {outputs} --reference_outputs {reference}",
        "and:  proxytune score alpaca_farm annotations.json",
    )


@dataclass(frozen=True)
class Format:
    """The files of another tool."""

    files: Callable[[Path], dict[str, list[JsonRow]]]
    """The folder of a run -> file names and their rows."""
    then: Callable[[Sequence[str]], tuple[str, ...]]
    """The files that were written -> what to do with them."""


FORMATS: Mapping[str, Format] = {"alpaca_eval": Format(alpaca_eval, _then_alpaca_eval)}


def export(kind: str, folder: Path, out: Path | None = None) -> list[Path]:
    """Write the run in `folder` in another tool's format into `out` (the run's own folder). -> the files.

    Raises UserError for a format that is not there, a folder that is not there, and a run that is not
    finished."""
    if kind not in FORMATS:
        raise did_you_mean("format", kind, FORMATS)
    target = out or folder
    if not target.is_dir():
        raise UserError(f"no folder '{target}' to write to")
    written = []
    for name, rows in FORMATS[kind].files(folder).items():
        write_atomically(target / name, f"{json_text(rows)}\n".encode())
        written.append(target / name)
    return written
