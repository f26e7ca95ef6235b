"""Run folders: run.json, predictions.jsonl, cost.jsonl and, when traced, trace.jsonl.

A run is written so that nothing that is finished gets lost: a line is appended when all samples of an example
are done, run.json is replaced in one step, and a folder continues where it stopped. It refuses to mix
settings in one folder, to overwrite a finished run, and to let two processes write to one folder.

What is read is what was written. A line of cost.jsonl says what an example took, and has the digests of its
lines in the other files; run.json has its own digest and, once the run is finished, those of its files.
Nothing here imports torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from proxytune.config import RunSpec
from proxytune.errors import UserError
from proxytune.records import SCHEMA, JsonRow, Run
from proxytune.run_files import (
    PENDING,
    FolderOwner,
    GrowingFile,
    by_id,
    complete_lines,
    content_of,
    damaged,
    digest,
    disk_errors_in_one_line,
    each_line,
    encode,
    files_of,
    problem_of,
    seal_of,
    sealed,
    write_atomically,
)
from proxytune.schema import explain
from proxytune.terminal import say

RUN, PREDICTIONS, TRACE, SWEEP = "run.json", "predictions.jsonl", "trace.jsonl", "sweep.json"
COST = "cost.jsonl"
"""What each example took, and the digests of its lines."""
_COLUMNS = {PREDICTIONS: "row", TRACE: "trace"}
"""The file that a digest is of -> its column in cost.jsonl."""
SEAL = "seal"
"""The key of run.json that has the digests. Runs of versions before 0.2.0 have none."""
Value = str | float | bool | None

_WORDS = ("system.description", "system.data.", "system.judges.", "system.base.key_variable")
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
    """The Run of a folder; UserError where there is none, it is not one of ours, or it is not what was
    written: a finished run has all of its files as they were when it ended, an unfinished one has no row that
    it did not store."""
    path = folder / RUN
    if not path.exists():
        raise UserError(
            f"no run in '{folder}': it has no {RUN}. `proxytune runs RESULTS` lists the runs of a folder"
        )
    stored = content_of(path)
    try:
        content = json.loads(stored)
        version = content.get("schema_version") if isinstance(content, dict) else None
        if version != SCHEMA:
            raise OtherVersion(
                f"'{path}' has schema version {version}; this proxytune reads version {SCHEMA}"
            )
        seal = content.pop(SEAL, None)
        run = Run.model_validate(content)
    except ValidationError as error:
        raise UserError(f"'{path}' is not a run: {explain(error)}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"cannot read '{path}': {error}") from None
    files = files_of(seal)
    if (folder / COST).exists() if seal is None else seal != seal_of(content, files):
        raise damaged(path, "it was changed by hand")
    try:
        if seal is not None and run.status == "done":
            _require_files(folder, files)
        elif seal is not None:
            _require_rows(folder)
    except UserError:
        if path.exists() and content_of(path) != stored:
            return read_run(folder)  # another process has judged it in this moment
        raise
    return run


class OtherVersion(UserError):
    """A run of another version of proxytune."""


def _require_files(folder: Path, files: Mapping[str, str]) -> None:
    """UserError that names what is not as it was when the run ended. Where a process was killed as it put
    judged rows in their place, they are put there now."""
    for name, wanted in files.items():
        path, pending = folder / name, folder / f"{PENDING}{name}"
        if path.is_file() and digest(content_of(path)) == wanted:
            continue
        if pending.is_file() and digest(content_of(pending)) == wanted:
            with disk_errors_in_one_line(path):
                pending.replace(path)
            continue
        if not path.exists():
            raise damaged(path, "it is missing")
        problem = None
        if name in _COLUMNS and COST in files:
            problem = problem_of(complete_lines(path), _records(folder), _COLUMNS[name], whole=True)
        raise damaged(path, problem or "it is not what was stored")


def _require_rows(folder: Path) -> None:
    """UserError that names a row of an unfinished run that it did not store, or one that is missing. The last
    ones may be: a crash takes the end of a file."""
    path = folder / PREDICTIONS
    lines = complete_lines(path)  # before the records: another process may be adding to both
    stored, records = by_id(lines), _records(folder)
    while records and next(reversed(records)) not in stored:
        records.popitem()
    if (problem := problem_of(lines, records, _COLUMNS[PREDICTIONS], whole=True)) is not None:
        raise damaged(path, problem)


def read_rows(folder: Path) -> list[JsonRow]:
    """The predictions of a run, in the order of the file; UserError where a finished run is damaged."""
    require_intact(folder / PREDICTIONS)
    rows = [row for row, _ in complete_lines(folder / PREDICTIONS)]
    if len({row["id"] for row in rows}) < len(rows):
        raise damaged(folder / PREDICTIONS, "a row is there twice")
    return rows


def read_traces(folder: Path) -> Iterator[JsonRow]:
    """The traces of a run, one per response: `id`, `sample` and `tokens`. One at a time: those of a large run
    do not fit in memory."""
    require_intact(folder / TRACE)
    for row, _ in each_line(folder / TRACE):
        yield row


def _records(folder: Path) -> dict[str, JsonRow]:
    """What cost.jsonl says of each example."""
    found: dict[str, JsonRow] = {}
    for record, _ in complete_lines(folder / COST):
        if found.setdefault(record["id"], record) is not record:
            raise damaged(folder / COST, f"'{record['id']}' is there twice")
        if record != sealed(record):
            raise damaged(folder / COST, f"'{record['id']}' is not what was stored")
    return found


def require_intact(path: Path) -> None:
    """UserError where a file belongs to a run that is damaged."""
    if (path.parent / RUN).exists():
        read_run(path.parent)


def find_runs(root: Path) -> list[tuple[Path, Run]]:
    """Every finished run under `root` with its folder, in the order of the folders' names. One of another
    version is left out with a note; UserError where one is damaged."""
    found = []
    for path in sorted(root.rglob(RUN)):
        try:
            run = read_run(path.parent)
        except OtherVersion as error:
            say(f"note: left out: {error}")
            continue
        if run.status == "done":
            found.append((path.parent, run))
    return found


# Writing


@dataclass
class RunFolder:
    """One open run: made by `RunFolder.open`, a context manager that holds the folder's lock."""

    path: Path
    run: Run
    """As in run.json: `running` until `finish`."""
    owner: FolderOwner
    done: set[str] = field(default_factory=set)
    """Ids of the examples that are stored."""
    records: dict[str, JsonRow] = field(default_factory=dict)
    """What each of them took, as cost.jsonl has it."""
    cut: bool = False
    """Whether a torn last line was cut off when the folder was opened."""
    _files: dict[str, GrowingFile] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path, new: Run) -> RunFolder:
        """Create the folder for `new`, or continue the run in it. UserError: other settings, it is in use, or
        what is stored is not what was written."""
        with disk_errors_in_one_line(path):
            path.mkdir(parents=True, exist_ok=True)
        owner = FolderOwner(path)
        try:
            run = _stored_or_new(path, new)
            if run.status == "running":
                owner.take()
                run = _stored_or_new(path, new)  # it may have ended since, where locks do not work
            else:
                owner.tidy()
            folder = cls(path, run, owner)
            folder._begin()
        except BaseException:
            owner.release()
            raise
        return folder

    def _begin(self) -> None:
        """Read what is stored, drop what is not whole, and open the files for the rest."""
        if self.run.status == "done":
            self.done = {row["id"] for row in read_rows(self.path)}
            return
        path = self.path / PREDICTIONS
        lines, self.records = complete_lines(path), _records(self.path)
        if lines and not self.records:  # of a version before 0.2.0: otherwise `read_run` has refused it
            traces = by_id(complete_lines(self.path / TRACE))
            self.records = {row["id"]: _adopted(row, line, traces) for row, line in lines}
        self.done = {row["id"] for row, _ in lines}
        self.records = {name: record for name, record in self.records.items() if name in self.done}
        whole = b"".join(line for _, line in lines)
        self.cut = path.exists() and len(whole) < path.stat().st_size
        if self.cut:
            write_atomically(path, whole)
        write_atomically(self.path / COST, b"".join(map(encode, self.records.values())))
        self._begin_traces()
        write_atomically(self.path / RUN, run_json(self.run))
        names = [COST, PREDICTIONS] if self.run.spec.trace == "off" else [COST, TRACE, PREDICTIONS]
        self._files = {name: GrowingFile(self.path / name) for name in names}

    def _begin_traces(self) -> None:
        """A trace is written before its prediction: one whose prediction is missing will be made again."""
        path = self.path / TRACE
        if self.run.spec.trace == "off":
            path.unlink(missing_ok=True)
            return
        lines = [(row, line) for row, line in complete_lines(path) if row["id"] in self.done]
        if (problem := problem_of(lines, self.records, "trace", whole=True)) is not None:
            raise damaged(path, problem)
        kept = b"".join(line for _, line in lines)
        if path.exists() and len(kept) != path.stat().st_size:
            write_atomically(path, kept)

    def append(self, row: JsonRow, traces: Sequence[JsonRow] = (), took: JsonRow | None = None) -> None:
        """Store one finished example and what it took; `row["id"]` is its id. UserError where the folder or a
        file in it is no longer ours to write."""
        self._check()
        line = encode(row)
        seen = [encode(trace) for trace in sorted(traces, key=_sample)]
        record: JsonRow = {"id": row["id"], "row": digest(line)}
        if traces:
            record["trace"] = digest(b"".join(seen))
        record = sealed(record | (took or {}))
        self._files[COST].append(encode(record))
        for trace in seen:
            self._files[TRACE].append(trace)
        self._files[PREDICTIONS].append(line)
        self.done.add(row["id"])
        self.records[row["id"]] = record

    def _check(self) -> None:
        """UserError where somebody took the folder away, or writes to it as well."""
        self.owner.check()
        for file in self._files.values():
            file.check()

    def save(self, run: Run) -> None:
        """Replace run.json."""
        self._check()
        write_atomically(self.path / RUN, run_json(run))
        self.run = run

    def finish(self, run: Run, order: Sequence[str]) -> None:
        """Sort the stored lines by `order`, then write the finished run."""
        self._check()
        place, files = {example_id: i for i, example_id in enumerate(order)}, dict[str, str]()
        for name in self._files:
            path = self.path / name
            lines = complete_lines(path)
            column = _COLUMNS.get(name)
            if column and (problem := problem_of(lines, self.records, column, whole=True)) is not None:
                raise damaged(path, problem)
            ordered = sorted(lines, key=lambda pair: (place[pair[0]["id"]], _sample(pair[0])))
            content = b"".join(line for _, line in ordered)
            if ordered != lines:
                write_atomically(path, content)
            files[name] = digest(content)
        write_atomically(self.path / RUN, run_json(run, files))
        self.run = run

    def close(self) -> None:
        """Close the files and let go of the folder."""
        for file in self._files.values():
            file.close()
        self._files = {}
        self.owner.release()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextlib.contextmanager
def holding(path: Path) -> Iterator[None]:
    """The sole right to write to a finished run's folder. UserError if another process has it."""
    owner = FolderOwner(path)
    try:
        read_run(path)  # rows that a killed process left are put in their place, before `take` deletes them
        owner.take()
        yield
    finally:
        owner.release()


def replace_rows(path: Path, rows: Sequence[JsonRow], run: Run) -> None:
    """Put judged rows and their metrics in the place of those of a finished run, within `holding`, in one
    step: the replacement of run.json. Whoever reads the folder after a kill finds all of the old or all of
    the new. UserError where the folder holds another run by now."""
    there = read_run(path)
    if (there.spec, there.started) != (run.spec, run.started):
        raise UserError(f"'{path}' was replaced while its rows were judged: nothing is stored")
    files = files_of(json.loads(content_of(path / RUN)).get(SEAL))
    lines = [(row, encode(row)) for row in rows]
    new = {PREDICTIONS: b"".join(line for _, line in lines)}
    if COST in files:
        digests, records = by_id(lines), _records(path)
        changed = [sealed({**records[name], "row": digest(digests[name])}) for name in records]
        new[COST] = b"".join(map(encode, changed))
    for name, content in new.items():
        write_atomically(path / f"{PENDING}{name}", content)
    files |= {name: digest(content) for name, content in new.items()}
    write_atomically(path / RUN, run_json(run, files))
    _require_files(path, files)
    for name in new:  # where it is what was there before
        (path / f"{PENDING}{name}").unlink(missing_ok=True)


def _sample(row: JsonRow) -> int:
    """Which of an example's responses a trace is of."""
    found: int = row.get("sample", 0)
    return found


def run_json(run: Run, files: Mapping[str, str] | None = None) -> bytes:
    """The content of run.json; `files` are the digests of a finished run's."""
    content = run.model_dump(mode="json")
    content[SEAL] = seal_of(content, files or {})
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def _adopted(row: JsonRow, line: bytes, traces: Mapping[str, bytes]) -> JsonRow:
    """The record of a row that a version before 0.2.0 stored: of what it took, only the tokens are known."""
    tokens = sum(response["tokens"] for response in row["responses"])
    record = {"id": row["id"], "row": digest(line), "generated_tokens": tokens}
    return sealed(record | ({"trace": digest(traces[row["id"]])} if row["id"] in traces else {}))


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
