"""What may happen to the files of a run between its writing and its reading, drawn at random."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from proxytune import results

FILES = (results.PREDICTIONS, results.COST, results.TRACE, results.RUN)
Tampering = Callable[[Path, Path, random.Random], None]
"""Gets the folder of a run, and of another run of the same items."""


def _lines(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True)


def _some_file(folder: Path, draw: random.Random) -> Path:
    return folder / draw.choice([name for name in FILES if (folder / name).exists()])


def _row_of(folder: Path, draw: random.Random) -> tuple[Path, list[bytes], int]:
    """A JSONL file of a run, its lines, and one of them."""
    path = folder / draw.choice([name for name in FILES[:3] if (folder / name).exists()])
    lines = _lines(path)
    return path, lines, draw.randrange(len(lines))


def missing(folder: Path, other: Path, draw: random.Random) -> None:
    """A line is gone."""
    path, lines, place = _row_of(folder, draw)
    path.write_bytes(b"".join(lines[:place] + lines[place + 1 :]))


def twice(folder: Path, other: Path, draw: random.Random) -> None:
    """A line is there twice."""
    path, lines, place = _row_of(folder, draw)
    path.write_bytes(b"".join([*lines, lines[place]]))


def foreign(folder: Path, other: Path, draw: random.Random) -> None:
    """A line of another example is added, or stands in the place of one."""
    path, lines, place = _row_of(folder, draw)
    row = json.loads(lines[place]) | {"id": "another"}
    lines[place:place] = [json.dumps(row).encode() + b"\n"]
    path.write_bytes(b"".join(lines if draw.random() < 0.5 else lines[: place + 1] + lines[place + 2 :]))


def edited(folder: Path, other: Path, draw: random.Random) -> None:
    """A figure or a text of a line is another one."""
    path, lines, place = _row_of(folder, draw)
    row = json.loads(lines[place])
    name = draw.choice([name for name in row if name != "id"])
    row[name] = _other(row[name])
    lines[place] = json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"
    path.write_bytes(b"".join(lines))


def _other(value: Any) -> Any:
    """Something else of the same kind."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, str):
        return value + "x"
    if isinstance(value, dict):
        return {name: _other(inner) for name, inner in value.items()} or {"x": 1}
    return [_other(inner) for inner in value] if value else ["x"]


def swapped(folder: Path, other: Path, draw: random.Random) -> None:
    """Two lines have changed their ids."""
    path, lines, place = _row_of(folder, draw)
    other = (place + 1) % len(lines)
    one, two = json.loads(lines[place]), json.loads(lines[other])
    lines[place] = json.dumps({**one, "id": two["id"]}).encode() + b"\n"
    lines[other] = json.dumps({**two, "id": one["id"]}).encode() + b"\n"
    path.write_bytes(b"".join(lines))


def shuffled(folder: Path, other: Path, draw: random.Random) -> None:
    """The lines are in another order."""
    path, lines, _ = _row_of(folder, draw)
    draw.shuffle(lines)
    path.write_bytes(b"".join(lines))


def folder_in_its_place(folder: Path, other: Path, draw: random.Random) -> None:
    """A file is a folder."""
    path = _some_file(folder, draw)
    path.unlink()
    path.mkdir()


def deleted(folder: Path, other: Path, draw: random.Random) -> None:
    """A file is gone."""
    _some_file(folder, draw).unlink()


def emptied(folder: Path, other: Path, draw: random.Random) -> None:
    """A file is empty."""
    _some_file(folder, draw).write_bytes(b"")


def torn(folder: Path, other: Path, draw: random.Random) -> None:
    """A file ends somewhere in its middle."""
    path = _some_file(folder, draw)
    path.write_bytes(path.read_bytes()[: draw.randrange(path.stat().st_size)])


def flipped(folder: Path, other: Path, draw: random.Random) -> None:
    """A bit is another one."""
    path = _some_file(folder, draw)
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(bytes(content))


def status_by_hand(folder: Path, other: Path, draw: random.Random) -> None:
    """An unfinished run calls itself finished, or a finished one unfinished."""
    content = json.loads((folder / results.RUN).read_text())
    content["status"] = "done" if content["status"] == "running" else "running"
    (folder / results.RUN).write_text(json.dumps(content, indent=2))


def figure_by_hand(folder: Path, other: Path, draw: random.Random) -> None:
    """Something in run.json is another one."""
    content = json.loads((folder / results.RUN).read_text())
    name = draw.choice(["metrics", "n", "cost", "notes", "spec", "made", "seal", "started"])
    content[name] = _other(content[name])
    (folder / results.RUN).write_text(json.dumps(content, indent=2))


def strays(folder: Path, other: Path, draw: random.Random) -> None:
    """Killed processes have left half-written files."""
    for name in (".run.json.99999999", ".predictions.jsonl.99999998", ".new.cost.jsonl", ".writer"):
        (folder / name).write_bytes(b'{"half')


def from_another_run(folder: Path, other: Path, draw: random.Random) -> None:
    """A file is that of another run of the same items."""
    name = draw.choice([name for name in FILES if (folder / name).exists() and (other / name).exists()])
    shutil.copy(other / name, folder / name)


KINDS: Mapping[str, Tampering] = {
    one.__name__: one
    for one in (
        *(missing, twice, foreign, edited, swapped, shuffled, folder_in_its_place, deleted, emptied, torn),
        *(flipped, status_by_hand, figure_by_hand, strays, from_another_run),
    )
}
