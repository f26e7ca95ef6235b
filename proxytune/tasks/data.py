"""Where a task's rows come from: a file in its public format, the Hugging Face hub, or the demo world.

All three give the same rows, so one parser per task reads them. What cannot be read is a UserError that names
the line.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from proxytune.errors import UserError
from proxytune.hub import require
from proxytune.records import JsonRow

MAX_LINE = 16_000_000
"""Characters of a line, or of a text in a .json file, beyond which it can be no row: reading on would take
minutes and memory, and end nowhere."""


@dataclass(frozen=True)
class DataTable:
    """Rows with the place that each came from."""

    origin: str
    """What an error message begins with: for example a quoted file name."""
    unit: str
    """What `numbers` count: line or row."""
    rows: tuple[JsonRow, ...]
    numbers: tuple[int, ...]
    notes: tuple[str, ...] = ()
    """What a user should know about how the rows were read."""

    def where(self, index: int) -> str:
        """The place of a row, for an error message."""
        return f"{self.origin} {self.unit} {self.numbers[index]}"

    def head(self, limit: int | None) -> DataTable:
        """The first `limit` rows."""
        return replace(self, rows=self.rows[:limit], numbers=self.numbers[:limit])

    def map(self, change: Callable[[JsonRow], JsonRow]) -> DataTable:
        """This table with every row changed."""
        return replace(self, rows=tuple(change(row) for row in self.rows))

    def unique(self, column: str) -> DataTable:
        """This table with every name in `column` once: an equal row is dropped, a different one numbered."""
        named, dropped, renumbered = unique_rows(self.rows, column)
        number_of = dict(zip(map(id, self.rows), self.numbers, strict=True))
        note = (
            f"{self.origin}: {dropped} rows dropped (equal to an earlier one of the same {column}), "
            f"{renumbered} numbered (a different row has their {column})"
        )
        return replace(
            self,
            rows=tuple({**row, column: name} for name, row in named.items()),
            numbers=tuple(number_of[id(row)] for row in named.values()),
            notes=(*self.notes, note) if dropped or renumbered else self.notes,
        )

    def require(self, columns: Sequence[str]) -> DataTable:
        """This table, or the UserError about the first row in which a column is absent or is no text."""
        for index, row in enumerate(self.rows):
            for column in columns:
                if column not in row or row[column] is None:
                    has = ", ".join(key for key in row if key) or "nothing"
                    raise UserError(f"{self.where(index)}: no field '{column}' (it has {has})")
                if not isinstance(row[column], str):
                    value = json.dumps(row[column])[:60]
                    raise UserError(f"{self.where(index)}: field '{column}' must be text, not {value}")
        return self


def unique_rows(rows: Sequence[JsonRow], column: str = "id") -> tuple[dict[str, JsonRow], int, int]:
    """Rows by id, the number of equal rows dropped, and of different rows that got a number because their id
    was taken.

    Rows without the column (the paper's files have no `id`) are known by their place and never dropped.
    """
    kept: dict[str, JsonRow] = {}
    same_id: dict[str, list[JsonRow]] = {}
    dropped = renumbered = 0
    for place, row in enumerate(rows):
        name = str(row[column]) if column in row else f"@{place}"
        seen = same_id.setdefault(name, [])
        if row in seen:
            dropped += 1
            continue
        seen.append(row)
        renumbered += len(seen) > 1
        kept[name if len(seen) == 1 else f"{name}#{len(seen)}"] = row
    return kept, dropped, renumbered


@dataclass(frozen=True)
class Hub:
    """A dataset on the Hugging Face hub. How its rows become those of the public file: Task.public."""

    id: str
    config: str | None
    split: str
    """Several splits are joined by `+`; then each row names its own under `split`."""
    train: str | None = None
    """The split that few-shot items are drawn from."""
    file: str | None = None
    """The file to load, or a pattern of files (.json, .jsonl), for a repository whose own loader is a script
    (`datasets` runs none) or that holds other files as well."""


# Files


def read_file(path: Path) -> DataTable:
    """The rows of a .jsonl, .json, .csv or .txt file, or of one of these with .gz.

    A .txt line is a row {"text": line}; a .json file holds a list of objects, or {"Data": such a list}.
    """
    kind = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    if kind not in _READERS:
        raise UserError(
            f"cannot tell the format of '{path}': its name must end in .jsonl, .json, .csv or .txt (or one + "
            ".gz)"
        )
    found = _READERS[kind](_text(path), path)
    if not found:
        raise UserError(f"'{path}' has no rows")
    numbers, rows = zip(*found, strict=True)
    return DataTable(f"'{path}'", "item" if kind == ".json" else "line", rows, numbers)


def _text(path: Path) -> str:
    """The text of a file, unpacked; UserError where it cannot be had."""
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
        return content.decode("utf-8-sig", "surrogatepass")  # as results.py writes
    except FileNotFoundError:
        raise UserError(f"no file '{path}'") from None
    except IsADirectoryError:
        raise UserError(f"'{path}' is a folder, not a file") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"'{path}' is cut short or is no gzip file: {error}") from None
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UserError(
            f"'{path}' line {line} is not UTF-8 text (byte {error.start}): convert the file first"
        ) from None
    except OSError as error:
        raise UserError(f"cannot read '{path}': {error.strerror}") from None


def _jsonl(text: str, path: Path) -> list[tuple[int, JsonRow]]:
    """The objects of a JSONL text with their line numbers; blank lines are passed over."""
    found = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        if len(line) > MAX_LINE:
            raise UserError(f"'{path}' line {number} has {_too_long(line)}: is it a row of a data set?")
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"'{path}' line {number} is not JSON: {error}") from None
        if not isinstance(row, dict):
            raise UserError(f"'{path}' line {number} must be a JSON object, not {type(row).__name__}")
        found.append((number, row))
    return found


def _json(text: str, path: Path) -> list[tuple[int, JsonRow]]:
    """The objects of a JSON list with their places from 1."""
    try:
        content = json.loads(text) if text.strip() else []
    except (ValueError, RecursionError) as error:
        raise UserError(f"'{path}' is not JSON: {error}") from None
    items = content.get("Data") if isinstance(content, dict) else content
    if not isinstance(items, list):
        raise UserError(f"'{path}' must hold a JSON list of objects")
    for number, item in enumerate(items, start=1):
        if not isinstance(item, dict):
            raise UserError(f"'{path}' item {number} must be a JSON object, not {type(item).__name__}")
        for name, text in item.items():
            if isinstance(text, str) and len(text) > MAX_LINE:
                raise UserError(f"'{path}' item {number}: field '{name}' has {_too_long(text)}")
    return list(enumerate(items, start=1))


def _too_long(text: str) -> str:
    """How long a text is, beside what is allowed."""
    return f"{len(text) / 1e6:.1f} million characters (at most {MAX_LINE / 1e6:.0f} are read)"


def _csv(text: str, path: Path) -> list[tuple[int, JsonRow]]:
    """The rows of a CSV text under its header, with the number of the line on which each ends."""
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    found = []
    try:
        for row in reader:
            if None in row:
                raise UserError(f"'{path}' line {reader.line_num} has more cells than the header has columns")
            found.append((reader.line_num, row))
    except csv.Error as error:
        raise UserError(f"'{path}' line {reader.reader.line_num} is not CSV: {error}") from None
    return found


def _txt(text: str, path: Path) -> list[tuple[int, JsonRow]]:
    """The lines of a text that are not blank."""
    lines = enumerate(text.split("\n"), start=1)
    return [(number, {"text": line.removesuffix("\r")}) for number, line in lines if line.strip()]


_READERS: dict[str, Callable[[str, Path], list[tuple[int, JsonRow]]]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".txt": _txt,
}


# Hub and demo world


def read_hub(hub: Hub, split: str) -> DataTable:
    """The rows of a split, through `datasets` (which keeps a local copy)."""
    import datasets

    local = Path(hub.id).is_absolute()
    if not local:
        require(hub.id, "dataset")
    try:
        if hub.file is not None:
            files = f"{hub.id if local else f'hf://datasets/{hub.id}'}/{hub.file}"
            parts = {split: _read_hub_files(files)}
        else:
            parts = {s: datasets.load_dataset(hub.id, hub.config, split=s) for s in split.split("+")}
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"cannot load '{hub.id}' from the hub: {reason}. Or give a file: --data FILE"
        ) from None
    several = len(parts) > 1
    found = [{**row, "split": name} if several else dict(row) for name, part in parts.items() for row in part]
    return DataTable(f"'{hub.id}' {split}", "row", tuple(found), tuple(range(1, len(found) + 1)))


def _read_hub_files(files: str) -> Iterable[JsonRow]:
    """The rows of JSON files. Lines of .jsonl are parsed here: `datasets` wants a field to have one type
    throughout."""
    import datasets

    if not files.endswith(".jsonl"):
        return cast("Iterable[JsonRow]", datasets.load_dataset("json", data_files=files, split="train"))
    lines = datasets.load_dataset("text", data_files=files, split="train")
    return [json.loads(line["text"]) for line in lines if line["text"].strip()]


def generate(task: str, split: str, limit: int | None) -> DataTable:
    """The first items of a task in the demo world, in the columns of the real data: the task's usual number,
    or `limit`."""
    from proxytune.demo import world

    if task not in world.TASKS:
        raise UserError(
            f"the demo world has no '{task}': it has {', '.join(world.TASKS)}. Use --data hub or --data FILE"
        )
    rows: tuple[JsonRow, ...] = tuple(world.rows(task, split=split, n=limit or world.ITEMS[task]))
    return DataTable(f"demo world, {task} {split}", "row", rows, tuple(range(1, len(rows) + 1)))


def read_smoke_data(task: str, limit: int | None) -> DataTable:
    """The first items of the smoke data of a task: all of them, or `limit`."""
    from proxytune.demo import smoke_data

    rows = tuple(smoke_data.rows(task, min(limit or smoke_data.ITEMS, smoke_data.ITEMS)))
    return DataTable(f"smoke data, {task}", "row", rows, tuple(range(1, len(rows) + 1)))
