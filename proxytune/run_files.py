"""The files of a run folder: who may write them, and whether they are what was written.

A folder is locked by `flock`. Where that does nothing, as on some network file systems, a token in the folder
names its writer: another process of the same machine is refused at once, and where another machine takes the
folder over, the first writer finds that out before its next write. Nothing here imports torch, or knows what
a row says.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

from proxytune.errors import UserError
from proxytune.records import JsonRow

WRITER = ".writer"
"""Names the process that writes to a folder."""
PENDING = ".new."
"""Before a name: the content that takes the place of that file once run.json says so."""
PATIENCE = 1.0
"""Seconds for which a locked folder is waited for: what a killed process had just started may hold its lock a
moment longer than the process itself."""
LONGEST_NAME = 80
"""Characters of an id that a message shows."""
_STRAY = re.compile(r"\.(?:[a-z_]+\.jsonl?|\.writer|\.new\.[a-z]+\.jsonl)\.\d+|\.new\.[a-z]+\.jsonl")
_BOOT, _NAMESPACE = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")


# Content


def digest(content: bytes) -> str:
    """The SHA-256 of a file or a line."""
    return hashlib.sha256(content).hexdigest()


def not_a_file(path: Path) -> UserError:
    """The line about a folder, or something else, where a file should be."""
    return UserError(f"'{path}' is no file: it is damaged")


def content_of(path: Path) -> bytes:
    """What is in a file; UserError where it is no file, or cannot be read."""
    if path.exists() and not path.is_file():
        raise not_a_file(path)
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read '{path}': {error.strerror}") from None


def complete_lines(path: Path) -> list[tuple[JsonRow, bytes]]:
    """The whole rows of a JSONL file with their bytes; none where there is no file. Only the last line can be
    torn by a kill: it is left out."""
    return list(each_line(path))


def each_line(path: Path) -> Iterator[tuple[JsonRow, bytes]]:
    """As `complete_lines`, one row at a time: a trace of a million tokens is larger than memory should be."""
    if not path.exists():
        return
    if not path.is_file():
        raise not_a_file(path)
    try:
        with path.open("rb") as file:
            following = file.readline()
            for number in count(1):
                line, following = following, file.readline()
                if not line.endswith(b"\n"):
                    return
                try:
                    row = json.loads(line)
                    if not isinstance(row, dict) or not isinstance(row.get("id"), str):
                        raise ValueError("no object with an `id`")
                except (ValueError, RecursionError) as error:
                    if not following.endswith(b"\n"):
                        return
                    raise UserError(f"'{path}' line {number} is not a stored row: {error}") from None
                yield row, line
    except OSError as error:
        raise UserError(f"cannot read '{path}': {error.strerror}") from None


def by_id(lines: Iterable[tuple[JsonRow, bytes]]) -> dict[str, bytes]:
    """The lines of each id, in a row."""
    found: dict[str, bytes] = {}
    for row, line in lines:
        found[row["id"]] = found.get(row["id"], b"") + line
    return found


def problem_of(
    lines: Sequence[tuple[JsonRow, bytes]],
    records: Mapping[str, JsonRow],
    column: str,
    *,
    whole: bool = False,
) -> str | None:
    """Which id of a file is not as it was stored, by the digests in a column of the records, or (of a `whole`
    file) is missing; None where all are as they were."""
    found = by_id(lines)
    for name, own in found.items():
        shown = _shown(name)
        if name not in records:
            return f"{shown} is none that this run stored"
        if records[name].get(column) != digest(own):
            count = sum(row["id"] == name for row, _ in lines)
            again = column == "row" and count > 1
            return f"{shown} is there twice" if again else f"{shown} is not what was stored"
    missing = [name for name in records if name not in found] if whole else []
    more = f" (and {len(missing) - 1} more)" if missing[1:] else ""
    return f"{_shown(missing[0])} is missing{more}" if missing else None


def _shown(name: str) -> str:
    """An id in a message: whoever changed the file chose it."""
    return f"'{name if len(name) <= LONGEST_NAME else name[:LONGEST_NAME] + '...'}'"


def sealed(record: JsonRow) -> JsonRow:
    """A record with its own digest."""
    content = {name: value for name, value in record.items() if name != "sha256"}
    return {**content, "sha256": digest(json.dumps(content, sort_keys=True).encode())}


def files_of(seal: Any) -> dict[str, str]:
    """File -> digest, of a seal; nothing outside the folder."""
    found = seal.get("files") if isinstance(seal, dict) else None
    if not isinstance(found, dict):
        return {}
    return {name: wanted for name, wanted in found.items() if "/" not in name}


def seal_of(content: JsonRow, files: Mapping[str, str]) -> JsonRow:
    """The digests of a run's files, and one of these and everything else in run.json."""
    whole = json.dumps([content, files], sort_keys=True).encode()
    return {"files": dict(files), "sha256": digest(whole)}


def damaged(path: Path, how: str) -> UserError:
    """The line about a file that is not what was written."""
    return UserError(f"'{path}' is damaged: {how}. Restore it, or delete the folder to run it again")


# Writing


def encode(row: JsonRow) -> bytes:
    """One line of JSONL."""
    return (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8", "surrogatepass")


@contextlib.contextmanager
def disk_errors_in_one_line(path: Path) -> Iterator[None]:
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
    with disk_errors_in_one_line(path):
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def remove_strays(folder: Path) -> None:
    """Delete what killed processes left half-written."""
    with disk_errors_in_one_line(folder):
        for name in os.listdir(folder):
            writer = name.rpartition(".")[2]
            writing = writer.isdecimal() and int(writer) != os.getpid() and _started(int(writer))
            if _STRAY.fullmatch(name) and not writing:
                (folder / name).unlink(missing_ok=True)


class GrowingFile:
    """A JSONL file that only grows by whole lines, and only by ours: what could not be written whole is taken
    back."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with disk_errors_in_one_line(path):
            self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        self._size = os.fstat(self._fd).st_size

    def check(self) -> None:
        """UserError where the file is gone, is another one, or was written to by somebody else."""
        own = os.fstat(self._fd)
        try:
            there = os.stat(self.path)
        except FileNotFoundError:
            raise UserError(f"'{self.path}' was deleted while this run was going on: it stops here") from None
        if (there.st_dev, there.st_ino) != (own.st_dev, own.st_ino):
            raise UserError(f"'{self.path}' was replaced while this run was going on: it stops here")
        if there.st_size != self._size:
            raise UserError(
                f"'{self.path}' was changed by somebody else while this run was going on: it stops here"
            )

    def append(self, line: bytes) -> None:
        """Write one line; UserError (and the file as it was) when the disk is full."""
        with disk_errors_in_one_line(self.path):
            try:
                written = 0
                while written < len(line):
                    written += os.write(self._fd, line[written:])
            except BaseException:
                os.ftruncate(self._fd, self._size)
                raise
        self._size += len(line)

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)


# Who writes


class FolderOwner:
    """The right of this process to write to a folder, from `take` until `release`."""

    def __init__(self, folder: Path) -> None:
        """Lock the folder; UserError where another process has it, and keeps it."""
        self.folder, self._token = folder, b""
        with disk_errors_in_one_line(folder):
            self._lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        deadline = time.monotonic() + PATIENCE
        while not self._locked():
            if time.monotonic() > deadline:
                os.close(self._lock)
                raise self._taken()
            time.sleep(0.02)

    def _locked(self) -> bool:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:
            pass  # a file system without locks: the token is left
        return True

    def _taken(self) -> UserError:
        return UserError(
            f"another process is writing to '{self.folder}': wait until it ends, or choose another folder "
            "with --out"
        )

    def take(self) -> None:
        """Put our token there; UserError where a process that runs on this machine has its own there."""
        path = self.folder / WRITER
        if self._has_other_writer():
            raise self._taken()
        self._token = json.dumps({"token": secrets.token_hex(8), **_this_process()}).encode()
        _ours.add(self._token)
        write_atomically(path, self._token)
        remove_strays(self.folder)

    def tidy(self) -> None:
        """Delete what killed processes left in the folder of a finished run, which is only read."""
        if not self._has_other_writer():
            remove_strays(self.folder)
            with disk_errors_in_one_line(self.folder):
                (self.folder / WRITER).unlink(missing_ok=True)

    def _has_other_writer(self) -> bool:
        path = self.folder / WRITER
        return path.exists() and _runs_here(content_of(path))

    def check(self) -> None:
        """UserError where the folder is gone, is another one, or another process has taken it over."""
        own = os.fstat(self._lock)
        try:
            there = os.stat(self.folder)
        except FileNotFoundError:
            raise UserError(
                f"'{self.folder}' was deleted or moved while this run was going on: it stops here"
            ) from None
        if (there.st_dev, there.st_ino) != (own.st_dev, own.st_ino):
            raise UserError(f"'{self.folder}' was replaced while this run was going on: it stops here")
        if not (self.folder / WRITER).exists():
            raise UserError(f"'{self.folder}' was emptied while this run was going on: it stops here")
        if not self._has_token():
            raise UserError(
                f"another process has begun to write to '{self.folder}', where locks do not work: this one "
                "stops here, and what it has stored is kept"
            )

    def _has_token(self) -> bool:
        try:
            return (self.folder / WRITER).read_bytes() == self._token
        except OSError:
            return False

    def release(self) -> None:
        """Let go of the folder."""
        _ours.discard(self._token)
        if self._token and self._has_token():
            (self.folder / WRITER).unlink(missing_ok=True)
        os.close(self._lock)


_ours: set[bytes] = set()
"""The tokens that this process has in folders."""


def _this_process() -> dict[str, str]:
    """What tells this process from all others, on every machine; little where there is no /proc."""
    return {"process": str(os.getpid()), "started": _started(os.getpid()), "machine": _machine()}


def _runs_here(writer: bytes) -> bool:
    """Whether the process that a token names runs on this machine. Of other machines nothing is known."""
    try:
        found = json.loads(writer)
        pid, started, machine = int(found["process"]), found["started"], found["machine"]
    except (ValueError, TypeError, KeyError):
        return False  # torn
    if not started or machine != _machine() or _started(pid) != started:
        return False
    return pid != os.getpid() or writer in _ours  # not one that was left where its folder had been moved away


def _machine() -> str:
    """This start of this machine, and the container within it: where process ids mean the same."""
    try:
        return f"{_BOOT.read_text().strip()} {os.stat(_NAMESPACE).st_ino}"
    except OSError:
        return ""


def _started(pid: int) -> str:
    """When a process began, in ticks since the machine did; "" where there is none, or it has ended."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return ""
    return "" if state in "ZX" else rest[18]
