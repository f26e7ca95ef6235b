"""Run folders: run.json, predictions.jsonl and, when traced, trace.jsonl.

A run is written so that nothing that is finished gets lost: a line is appended when all samples of an example
are done, run.json is replaced in one step, and a folder continues where it stopped. It refuses to mix
settings in one folder, to overwrite a finished run, and to let two processes write to one folder. Nothing
here imports torch.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from proxytune.config import RunSpec, explain
from proxytune.errors import UserError
from proxytune.records import SCHEMA, JsonRow, Run

RUN, PREDICTIONS, TRACE, SWEEP = "run.json", "predictions.jsonl", "trace.jsonl", "sweep.json"
Value = str | float | bool | None

_WORDS = ("system.description", "system.data.", "system.judges.")
"""Parts of a system that describe it and decide no output (what is read is in `data`)."""


# Where a run lives, and what its settings are


def settings(spec: RunSpec) -> dict[str, Value]:
    """Every setting of a run under its dotted name (`sampling.temperature`), as run.json holds it."""
    return dict(_flatten(spec.model_dump(mode="json"), ""))


def _flatten(value: Any, name: str) -> Iterator[tuple[str, Value]]:
    """The leaves of nested mappings and lists with their dotted names."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flatten(inner, f"{name}.{key}" if name else key)
    elif isinstance(value, list) and any(isinstance(inner, Mapping) for inner in value):
        for i, inner in enumerate(value):
            yield from _flatten(inner, f"{name}.{i}")
    else:
        yield name, json.dumps(value, ensure_ascii=False) if isinstance(value, list) else value


def differences(there: RunSpec, now: RunSpec) -> dict[str, tuple[Value, Value]]:
    """Setting -> its values in the two specs, for the settings that differ and decide outputs."""
    a, b = settings(there), settings(now)
    names = [*a, *(name for name in b if name not in a)]
    changed = {name: (a.get(name), b.get(name)) for name in names if a.get(name) != b.get(name)}
    watched = "agreement" in (there.trace, now.trace)  # the proxy is traced whoever decodes
    idle = {"alpha", "system.alpha"} if there.role == now.role != "proxy" and not watched else set[str]()
    return {name: pair for name, pair in changed.items() if name not in idle and not name.startswith(_WORDS)}


def folder_for(root: Path, spec: RunSpec, defaults: RunSpec) -> Path:
    """`root/<system>/<task>/<as>` for the task's default settings, `<setting>-<hash>` in it for others."""
    folder = root / _plain(spec.system.name) / spec.task / spec.role
    changed = {name: now for name, (_, now) in differences(defaults, spec).items() if name != "data_sha256"}
    if not changed:
        return folder
    content = {**changed, "data_sha256": spec.data_sha256 if "data" in changed else ""}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]
    label = ",".join(f"{name.rpartition('.')[2]}={value}" for name, value in changed.items())
    return folder / f"{_plain(label)[:40].strip('-,=')}-{digest}"


def _plain(text: str) -> str:
    """`text` as one name of a file system."""
    return re.sub(r"[^A-Za-z0-9.,=_+-]+", "-", text).strip("-.") or "unnamed"


# Reading


def read_run(folder: Path) -> Run:
    """The Run of a folder; UserError where there is none or it is not one of ours."""
    path = folder / RUN
    try:
        content = json.loads(path.read_bytes())
        version = content.get("schema_version") if isinstance(content, dict) else None
        if version != SCHEMA:
            raise UserError(f"'{path}' has schema version {version}; this proxytune reads version {SCHEMA}")
        return Run.model_validate(content)
    except FileNotFoundError:
        raise UserError(f"no run in '{folder}': it has no {RUN}") from None
    except ValidationError as error:
        raise UserError(f"'{path}' is not a run: {explain(error)}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read '{path}': {error}") from None


def read_rows(folder: Path) -> list[JsonRow]:
    """The predictions of a run, in the order of the file."""
    path = folder / PREDICTIONS
    return [row for row, _ in _complete_lines(path)] if path.exists() else []


def read_traces(folder: Path) -> list[JsonRow]:
    """The traces of a run, one per response: `id`, `sample` and `tokens`."""
    path = folder / TRACE
    return [row for row, _ in _complete_lines(path)] if path.exists() else []


def find_runs(root: Path) -> list[tuple[Path, Run]]:
    """Every finished run under `root` with its folder, in the order of the folders' names. One that cannot be
    read (another version's, for example) is left out with a note."""
    found = []
    for path in sorted(root.rglob(RUN)):
        try:
            run = read_run(path.parent)
        except UserError as error:
            print(f"note: left out: {error}", file=sys.stderr)
            continue
        if run.status == "done":
            found.append((path.parent, run))
    return found


def _complete_lines(path: Path) -> list[tuple[JsonRow, bytes]]:
    """The whole rows of a JSONL file with their bytes. Only the last line can be torn by a kill: it is left
    out."""
    rows: list[tuple[JsonRow, bytes]] = []
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines[:-1], start=1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or not isinstance(row.get("id"), str):
                raise ValueError("no object with an `id`")
        except ValueError as error:
            if number == len(lines) - 1:
                break
            raise UserError(f"'{path}' line {number} is not a stored row: {error}") from None
        rows.append((row, line + b"\n"))
    return rows


# Writing


@contextlib.contextmanager
def _disk_errors_in_one_line(path: Path) -> Iterator[None]:
    """Turn a failure of the disk into one line with what to do."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in {errno.ENOSPC, errno.EFBIG, errno.EDQUOT}:
            more = "; finished examples are kept: make room and run the same command again to continue"
        else:
            more = ""
        raise UserError(f"cannot write '{path}': {reason}{more}") from None


def write_atomically(path: Path, content: bytes) -> None:
    """Replace `path` in one step that survives a crash: whoever reads it finds the old or the new content."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with _disk_errors_in_one_line(path):
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def _encode(row: JsonRow) -> bytes:
    """One line of JSONL."""
    return (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8", "surrogatepass")


class _Lines:
    """A JSONL file that only grows by whole lines: what could not be written whole is taken back."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with _disk_errors_in_one_line(path):
            self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)

    def append(self, row: JsonRow) -> None:
        """Write one row; UserError (and the file as it was) when the disk is full."""
        line = _encode(row)
        end = os.fstat(self._fd).st_size
        with _disk_errors_in_one_line(self.path):
            try:
                written = 0
                while written < len(line):
                    written += os.write(self._fd, line[written:])
            except BaseException:
                os.ftruncate(self._fd, end)
                raise

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)


@dataclass
class RunFolder:
    """One open run: made by `RunFolder.open`, a context manager that holds the folder's lock."""

    path: Path
    run: Run
    """As in run.json: `running` until `finish`."""
    done: set[str] = field(default_factory=set)
    """Ids of the examples that are stored."""
    cut: bool = False
    """Whether a torn last line was cut off when the folder was opened."""
    _lock: int = -1
    _predictions: _Lines | None = None
    _trace: _Lines | None = None

    @classmethod
    def open(cls, path: Path, new: Run) -> RunFolder:
        """Create the folder for `new`, or continue the run in it. UserError: other settings, or it is in
        use."""
        with _disk_errors_in_one_line(path):
            path.mkdir(parents=True, exist_ok=True)
        lock = _locked(path)
        try:
            folder = cls(path, _stored_or_new(path, new), _lock=lock)
            folder._begin()
        except BaseException:
            os.close(lock)
            raise
        return folder

    def _begin(self) -> None:
        """Read what is stored, cut a torn line, and open the files for the rest."""
        path = self.path / PREDICTIONS
        if path.exists():
            rows = _complete_lines(path)
            whole = sum(len(line) for _, line in rows)
            self.cut = whole < path.stat().st_size
            self.done = {row["id"] for row, _ in rows}
            if self.run.status == "running":
                os.truncate(path, whole)
        if self.run.status == "done":
            return
        write_atomically(self.path / RUN, _json(self.run))
        self._predictions = _Lines(path)
        if self.run.spec.trace != "off":
            self._drop_unfinished_traces()
            self._trace = _Lines(self.path / TRACE)
        else:
            (self.path / TRACE).unlink(missing_ok=True)

    def _drop_unfinished_traces(self) -> None:
        """A trace is written before its prediction: one whose prediction is missing will be made again."""
        path = self.path / TRACE
        if path.exists():
            kept = b"".join(line for row, line in _complete_lines(path) if row["id"] in self.done)
            if len(kept) != path.stat().st_size:
                write_atomically(path, kept)

    def append(self, row: JsonRow, traces: Sequence[JsonRow] = ()) -> None:
        """Store one finished example; `row["id"]` is its id."""
        assert self._predictions is not None, "a finished run takes no more rows"
        for trace in traces:
            assert self._trace is not None, "a run without trace takes no traces"
            self._trace.append(trace)
        self._predictions.append(row)
        self.done.add(row["id"])

    def save(self, run: Run) -> None:
        """Replace run.json."""
        write_atomically(self.path / RUN, _json(run))
        self.run = run

    def finish(self, run: Run, order: Sequence[str]) -> None:
        """Sort the stored lines by `order`, then write the finished run."""
        place = {example_id: i for i, example_id in enumerate(order)}
        for name in (PREDICTIONS, TRACE):
            path = self.path / name
            if path.exists():
                lines = _complete_lines(path)
                ordered = sorted(lines, key=lambda pair: (place[pair[0]["id"]], pair[0].get("sample", 0)))
                if ordered != lines:
                    write_atomically(path, b"".join(line for _, line in ordered))
        self.save(run)

    def close(self) -> None:
        """Close the files and let go of the folder."""
        for lines in (self._predictions, self._trace):
            if lines is not None:
                lines.close()
        if self._lock >= 0:
            os.close(self._lock)
        self._predictions = self._trace = None
        self._lock = -1

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextlib.contextmanager
def holding(path: Path) -> Iterator[None]:
    """The lock of a folder, for work on a finished run. UserError if another process has it."""
    lock = _locked(path)
    try:
        yield
    finally:
        os.close(lock)


def replace_rows(path: Path, rows: Sequence[JsonRow], run: Run) -> None:
    """Put judged rows and their metrics in the place of those of a finished run, within `holding`."""
    write_atomically(path / PREDICTIONS, b"".join(_encode(row) for row in rows))
    write_atomically(path / RUN, _json(run))


def _json(run: Run) -> bytes:
    """The content of run.json."""
    return (run.model_dump_json(indent=2) + "\n").encode()


def _locked(path: Path) -> int:
    """A descriptor with the lock of a folder, or the error that another process has it."""
    with _disk_errors_in_one_line(path):
        fd = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise UserError(
            f"another process is writing to '{path}': wait until it ends, or choose another folder with --out"
        ) from None
    except OSError as error:  # some network file systems have no locks: go on without one
        print(f"note: no lock on '{path}' ({error.strerror})", file=sys.stderr)
    return fd


def _stored_or_new(path: Path, new: Run) -> Run:
    """The run in the folder when it has the same settings; `new` when there is none; UserError otherwise."""
    if not (path / RUN).exists():
        if (path / PREDICTIONS).exists():
            raise UserError(
                f"'{path}' has a {PREDICTIONS} but no {RUN}: it cannot be continued, choose another --out"
            )
        return new
    stored = read_run(path)
    changed = differences(stored.spec, new.spec)
    if changed and stored.status == "running" and not read_rows(path):
        return new  # it was stopped before anything was finished: there is nothing to mix with
    if changed:
        pairs = [(name, _shown(old), _shown(now)) for name, (old, now) in changed.items()]
        changes = "; ".join(f"{name} is {old} there and {now} now" for name, old, now in pairs)
        raise UserError(
            f"'{path}' holds a run with other settings: {changes}. "
            "Give this run its own folder with --out, or delete that one"
        )
    return stored


def _shown(value: Value) -> str:
    """A value as a person reads it; hashes in short."""
    text = "unset" if value is None else str(value)
    return f"{text[:12]}..." if re.fullmatch(r"[0-9a-f]{40,}", text) else text
