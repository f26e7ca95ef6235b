"""Run model-written Python in a limited process. Nothing runs unless a caller opens a `Sandbox`, which the
command line does only with --allow-code-execution.

Backends, best first (`auto` takes the first that starts here, never `weak`):

- `bubblewrap` (`bwrap`) and `namespaces` (the same by our own hand, namespaces.py): own process,
  mount, network and IPC namespaces; a root that holds only the system's libraries and the interpreter,
  read-only; a private /tmp in memory; no network; a user without rights; hard limits (rlimit) on memory,
  processes, file size, open files and CPU. The worker is process 1: nothing inside can kill it, and
  everything inside ends with it.
- `weak`: a separate process in its own folder with the limits and a clean environment, and, where proxytune
  runs as root, under a user without rights. Only against accidents: the code can read what that user can
  read, open the network, write where that user may, and hide from the clean-up.

`run` gives a job a sandbox of its own that starts empty and is thrown away: about 40 ms a start.
`run_together` gives several jobs one sandbox, for code whose imports take longer than that (DS-1000: the
samples of one problem). There everything that a job left running or wrote is killed and deleted before the
next, and the worker cannot be traced; but a job that found a way into the worker would decide the verdicts
of those after it (in `weak` nothing is cleaned in between, so each job gets its own). Nothing is shared
with the host but two pipes: files go in and come out as bytes, and the host never unpickles them.

What this does not protect from: a bug in the kernel (there is no seccomp filter, and no virtual machine);
use of all cores, and of `Limits.memory` times the number of processes (no cgroup is needed, so none bounds
the sum); side channels; readable system files under /usr and /etc/ld.so.cache; the interpreter's own
site-packages.

What no checker in the program's own process can stop, here as in the paper's harness: code that wants to
pass can return objects that equal everything, patch builtins that the test uses (`abs`, `all`), replace the
function that checks it, or find the worker's token in the frames of the interpreter and report `passed`. An
exit, a printed verdict, a killed parent or a message without the token never count as passing.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import secrets
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from proxytune.errors import UserError
from proxytune.sandbox.root import (
    MARK,
    MIB,
    NOBODY,
    Interpreter,
    bubblewrap,
    closed_folder,
    environment,
    fresh_user,
    namespaces,
    too_wide,
    weak,
)

Backend = Literal["bubblewrap", "namespaces", "weak"]
BackendChoice = Literal["auto", "bubblewrap", "namespaces", "weak"]
CHOICES: tuple[BackendChoice, ...] = get_args(BackendChoice)

START_SECONDS = 30.0
"""How long a sandbox may take to start, and to hand over its files."""
MAX_FILES, MAX_REPORT = 32 * MIB, 1024 * MIB
"""Bytes of files that come back from a job, and all that a sandbox may send."""
LOST = "failed: the sandbox ended without a verdict"

_STARTS = """
import json, math, os, sys
for folder in sys.path:
    try:
        os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        pass
"""
"""What shows that a sandbox works: the library is there, and the packages can be read."""


@dataclass(frozen=True)
class Limits:
    """What each process of a program may use."""

    memory: int = 4096 * MIB
    """Address space of one process, in bytes."""
    file_bytes: int = 64 * MIB
    processes: int = 128
    open_files: int = 256
    tmp_bytes: int = 256 * MIB
    """Size of the private /tmp (bubblewrap, namespaces)."""


@dataclass(frozen=True)
class Program:
    """One program text."""

    code: str
    seconds: float = 3.0
    """Wall-clock limit."""
    argv: tuple[str, ...] = ()
    main: bool = True
    """Run as `__main__`; without it the text runs in an empty namespace, as HumanEval's harness does."""


@dataclass(frozen=True)
class Job:
    """Programs that share one sandbox, the files that they find and those that are wanted back."""

    programs: tuple[Program, ...]
    files: Mapping[str, bytes] = field(default_factory=dict)
    """Relative name -> content; a name that ends in `/` is a folder."""
    collect: tuple[str, ...] = ()
    """Patterns of the files to bring back."""
    imports: tuple[str, ...] = ()
    """Modules that are loaded once, before the programs are forked."""


@dataclass(frozen=True)
class Outcome:
    """How the programs of a job ended: `passed`, `timed out` or `failed: ...`."""

    results: tuple[str, ...]
    seconds: tuple[float, ...]
    files: Mapping[str, bytes] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether every program reached its end."""
        return all(result == "passed" for result in self.results)


class Sandbox:
    """One backend, ready to run jobs; `open` finds one that works here."""

    def __init__(
        self, backend: Backend, python: str = sys.executable, limits: Limits | None = None, workers: int = 0
    ) -> None:
        self.backend, self.limits = backend, limits or Limits()
        self.python = Interpreter.find(os.path.abspath(shutil.which(python) or python))
        self.workers = workers or len(os.sched_getaffinity(0))

    @classmethod
    def open(cls, choice: str = "auto", python: str = sys.executable, workers: int = 0) -> Sandbox:
        """The backend of that name, or the first that works; UserError where it does not."""
        if choice not in CHOICES:
            raise UserError(f"--sandbox '{choice}' must be one of {', '.join(CHOICES)}")
        tried: dict[str, list[str]] = {}  # several may have the same problem
        for backend in ("bubblewrap", "namespaces") if choice == "auto" else (choice,):
            sandbox = cls(backend, python, workers=workers)
            if (problem := sandbox.problem()) is None:
                return sandbox
            tried.setdefault(problem, []).append(backend)
        reasons = "; ".join(f"{', '.join(names)}: {problem}" for problem, names in tried.items())
        if choice != "auto":
            raise UserError(f"--sandbox does not work here: {reasons}")
        advice = []
        if shutil.which("bwrap") is None:
            advice.append("install bubblewrap (apt-get install bubblewrap)")
        if cls("weak", python)._refusal() is None:
            advice.append(
                "say --sandbox weak: a process with limits, which can read your files and use the network"
            )
        then = f". You may {', or '.join(advice)}" if advice else ""
        raise UserError(f"no sandbox works here ({reasons}){then}")

    def limited(self, limits: Limits) -> Sandbox:
        """The same sandbox with other limits."""
        return Sandbox(self.backend, self.python.executable, limits, self.workers)

    def problem(self) -> str | None:
        """Why this backend does not work here, or None."""
        if (refusal := self._refusal()) is not None:
            return refusal
        try:
            result = self.run(Job((Program(_STARTS),))).results[0]
        except UserError as error:
            result = str(error)
        if result == "passed":
            return None
        closed = closed_folder(self.python, isolated=True) if os.geteuid() == 0 else None
        return result if closed is None else f"{result} ({self._unreadable(closed)})"

    def _refusal(self) -> str | None:
        """Why this backend is not even tried here, or None."""
        if self.backend == "bubblewrap" and shutil.which("bwrap") is None:
            return "bwrap is not installed"
        if self.backend != "weak":
            wide = too_wide(self.python)
            return wide and (
                f"code would see all of '{wide}', the folder of '{self.python.executable}': use a virtual "
                "environment in a folder of its own (--code-python)"
            )
        closed = closed_folder(self.python, isolated=False) if os.geteuid() == 0 else None
        return None if closed is None else self._unreadable(closed)

    def _unreadable(self, folder: Path) -> str:
        """What to do about a folder that the user without rights cannot enter. Opening a home to everybody
        is no advice; an interpreter's own folder (isolated, only those are looked at) may be opened."""
        opening = "" if self.backend == "weak" else f"chmod -R o+rX '{folder}', "
        return (
            f"as root it runs code as a user without rights, who cannot enter '{folder}', which "
            f"'{self.python.executable}' needs: {opening}run as another user, or name an interpreter "
            "that everybody can read (--code-python)"
        )

    # Running

    def map(self, batches: Iterable[Sequence[Job]]) -> Iterator[list[Outcome]]:
        """Run batches of jobs, as many at a time as there are cores, and give their outcomes in order."""
        pool = ThreadPoolExecutor(self.workers)
        try:
            yield from pool.map(self.run_together, batches)
        finally:
            pool.shutdown(cancel_futures=True)

    def run(self, job: Job) -> Outcome:
        """Run one job in a sandbox of its own."""
        return self.run_together([job])[0]

    def run_together(self, jobs: Sequence[Job]) -> list[Outcome]:
        """Run jobs in one sandbox, one after another; those whose sandbox was lost before their turn get
        one of their own. A sandbox that did not start (a crowded machine) is tried once more."""
        if not jobs:
            return []
        if self.backend == "weak" and len(jobs) > 1:
            return [self.run(job) for job in jobs]
        try:
            outcomes = self._run(jobs)
        except _NotStarted:
            try:
                outcomes = self._run(jobs)
            except _NotStarted as error:
                raise UserError(f"the sandbox did not start: {error}") from None
        done = max(1, len(outcomes))  # the first job without an outcome is the one that ended the sandbox
        lost = [_lost(job) for job in jobs[len(outcomes) : done]]
        return [*outcomes, *lost, *(self.run_together(jobs[done:]) if done < len(jobs) else [])]

    def _run(self, jobs: Sequence[Job]) -> list[Outcome]:
        """One attempt: the outcomes of the jobs that ended."""
        secret, user = secrets.token_hex(16), fresh_user()
        request = json.dumps(self._request(jobs, secret, user)).encode() + b"\n"
        seconds = sum(program.seconds for job in jobs for program in job.programs) + 2 * START_SECONDS
        with contextlib.ExitStack() as stack:
            folder = "/tmp"
            if self.backend == "weak":
                folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="proxytune-"))
                if user:
                    os.chown(folder, user, NOBODY)
            process = subprocess.Popen(
                self._command(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                cwd=folder,
                env=environment(folder, secret),
                start_new_session=True,
            )
            stack.callback(self._stop, process, secret)
            output = _talk(process, request, time.monotonic() + seconds)
        return _outcomes(output, secret, jobs)

    def _request(self, jobs: Sequence[Job], secret: str, user: int) -> dict[str, Any]:
        """The line that the worker reads."""
        limits = self.limits
        texts = [{name: base64.b64encode(data).decode() for name, data in job.files.items()} for job in jobs]
        return {
            "secret": secret,
            "user": user,
            "path": self.python.packages,
            "imports": list(dict.fromkeys(name for job in jobs for name in job.imports)),
            "jobs": [
                {
                    "files": files,
                    "programs": [vars(program) for program in job.programs],
                    "collect": job.collect,
                }
                for job, files in zip(jobs, texts, strict=True)
            ],
            "collect_bytes": MAX_FILES,
            "limits": {
                name: getattr(limits, name) for name in ("memory", "file_bytes", "processes", "open_files")
            },
        }

    def _command(self) -> list[str]:
        """The command line of the backend."""
        match self.backend:
            case "bubblewrap":
                return bubblewrap(self.python, self.limits.tmp_bytes)
            case "namespaces":
                return namespaces(self.python, self.limits.tmp_bytes)
            case "weak":
                return weak(self.python)

    def _stop(self, process: subprocess.Popen[bytes], mark: str) -> None:
        """End everything that the job started. The worker ends itself when its stdin does."""
        assert process.stdin is not None and process.stdout is not None
        with contextlib.suppress(OSError):
            process.stdin.close()
        try:
            process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()
        if self.backend == "weak":
            _kill_marked(mark)


class _NotStarted(Exception):
    """The worker never reported that it was ready."""


# Talking to the worker


def _talk(process: subprocess.Popen[bytes], request: bytes, deadline: float) -> bytes:
    """Send the request and read until the worker ends, takes too long or prints too much."""
    assert process.stdin is not None and process.stdout is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(request)
        process.stdin.flush()
    pieces, size = [], 0
    while size < MAX_REPORT and (left := deadline - time.monotonic()) > 0:
        if not select.select([process.stdout], [], [], left)[0]:
            break
        piece = os.read(process.stdout.fileno(), 1 << 16)
        if not piece:
            break
        pieces.append(piece)
        size += len(piece)
    return b"".join(pieces)


def _outcomes(output: bytes, secret: str, jobs: Sequence[Job]) -> list[Outcome]:
    """The worker's reports, one per job that ended."""
    lines = output.split(b"\n")
    own = [json.loads(line[len(secret) :]) for line in lines[:-1] if line.startswith(secret.encode())]
    if not own:
        reason = output.decode("utf-8", "replace").strip().splitlines()
        raise _NotStarted(reason[-1][:300] if reason else "it printed nothing")
    return [
        Outcome(
            tuple(report["results"]),
            tuple(report["seconds"]),
            {name: base64.b64decode(text) for name, text in report["files"].items()},
        )
        for report, _ in zip(own[1:], jobs, strict=False)
    ]


def _lost(job: Job) -> Outcome:
    """The outcome of a job that ended its sandbox."""
    return Outcome(tuple(LOST for _ in job.programs), tuple(0.0 for _ in job.programs))


def _kill_marked(mark: str) -> None:
    """Kill every process that still carries the mark of a job, until there is none (a program that keeps
    forking needs several passes)."""
    wanted = f"{MARK}={mark}".encode()
    for _ in range(50):
        found = [pid for pid in _pids() if _carries(pid, wanted)]
        if not found:
            return
        for pid in found:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)


def _pids() -> Sequence[int]:
    """The processes that there are."""
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _carries(pid: int, wanted: bytes) -> bool:
    """Whether a process was started with this variable and is no zombie."""
    try:
        return wanted in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return False
