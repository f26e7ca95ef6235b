"""A run as CSV: a line per example, with everything that is stored of it."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from proxytune.exports.format import Format
from proxytune.exports.stored import OWN_COLUMNS, StoredRun, responses
from proxytune.records import JsonRow

NAME = "predictions.csv"


def files(folder: Path) -> dict[str, bytes]:
    """The table. Its columns: the run's, the task's own, one per score, and the first response's."""
    stored = StoredRun.read(folder)
    lines = [_line(stored, row) for row in stored.rows]
    text = io.StringIO()
    columns = sorted({name for line in lines for name in line}, key=_place(lines))
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return {NAME: text.getvalue().encode()}


def _line(stored: StoredRun, row: JsonRow) -> dict[str, Any]:
    """An example under the names of the columns."""
    spec = stored.run.spec
    run = {"system": spec.system.name, "task": spec.task, "as": spec.role, "alpha": spec.alpha.text}
    first = (responses(row) or [{}])[0]
    return {
        **{f"run.{name}": value for name, value in run.items()},
        "id": row["id"],
        **{name: _cell(value) for name, value in row.items() if name not in OWN_COLUMNS},
        **{f"score.{name}": value for name, value in row.get("scores", {}).items()},
        **{f"response.{name}": _cell(value) for name, value in first.items()},
    }


def _place(lines: Sequence[dict[str, Any]]) -> Any:
    """Where a column stands: where the first line that has it has it, scores and responses last."""
    order = {"run": 0, "score": 2, "response": 3}
    first: dict[str, tuple[int, int]] = {}
    for line in lines:
        for place, name in enumerate(line):
            kind, dot, _ = name.partition(".")
            first.setdefault(name, (order.get(kind, 1) if dot else 1, place))
    return lambda name: (*first[name], name)


def _cell(value: Any) -> Any:
    """Lists and mappings as JSON, everything else as it is."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict) else value


def then(written: Sequence[str]) -> tuple[str, ...]:
    """A table needs no word."""
    return ()


FORMAT = Format("a table with a line per example (predictions.csv)", files, then)
