"""Run model-written Python in a limited process. Nothing runs unless a caller opens a `Sandbox`, which the
command line does only with --allow-code-execution.

Backends, best first (`auto` takes the first that starts here, never `weak`):

- `bubblewrap` (`bwrap`) and `namespaces` (the same by our own hand, namespaces.py): own process,
  mount, network and IPC namespaces; a root that holds only the system's libraries and the interpreter,
  read-only; a private /tmp in memory; no network; a user without rights; hard limits (rlimit) on memory,
  processes, file size, open files and CPU. The worker is process 1: nothing inside can kill it, and
  everything inside ends with it.
- `weak`: a separate process in its own folder with the limits and a clean environment, and, where proxytune
  runs as root, under a user without rights. Only against accidents, and only where it is named: the code can
  read what that user can read, and what it writes elsewhere stays. It has no network, it can signal no
  process but its own, and nothing that it starts outlives it.

Everywhere a filter of system calls (inside/seccomp.py) refuses namespaces, mounts, traces and memory that no
process holds. The worker counts the memory of all processes and folders together, and kills what is over;
where a cgroup can be made (cgroups.py), the kernel holds that total, too.

`run` gives a job a sandbox of its own that starts empty and is thrown away: about 50 ms a start.
`run_together` gives several jobs one sandbox, for code whose imports take longer than that (DS-1000: the
samples of one problem). There everything that a job left running or wrote is killed and deleted before the
next; where it cannot be, the next gets a sandbox of its own (in `weak`, always). Nothing is shared with the
host but two pipes: files go in and come out as bytes, and the host never unpickles them.

A program with a `check` is judged from another process, which alone holds the test and what it expects. One
without is judged where it runs; docs/sandbox.md says what that cannot rule out.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from proxytune.errors import UserError
from proxytune.sandbox.cgroups import Cgroup
from proxytune.sandbox.inside.files import empty
from proxytune.sandbox.inside.processes import descendants, kill_all, refused, too_much
from proxytune.sandbox.inside.seccomp import filter_bytes, missing
from proxytune.sandbox.root import (
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
from proxytune.sandbox.talk import Job, NotStarted, Outcome, Program, converse, outcomes, request

Backend = Literal["bubblewrap", "namespaces", "weak"]
BackendChoice = Literal["auto", "bubblewrap", "namespaces", "weak"]
CHOICES: tuple[BackendChoice, ...] = get_args(BackendChoice)

START_SECONDS = 30.0
"""How long a sandbox may take to start, and to hand over its files."""
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
    total: int = 4096 * MIB
    """Memory of all processes and private folders together."""


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
                "say --sandbox weak: a process with limits, which can read your files and leave others behind"
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
        if reason := missing():
            return reason
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

    @property
    def warning(self) -> str:
        """What is to be said before this backend is used, or ""."""
        if self.backend != "weak":
            return ""
        return (
            "'weak' does not isolate: code can read what its user can read, and what it writes outside of "
            "its folder (in /tmp, /dev/shm or a home) stays behind"
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
            found, ended = self._run(jobs)
        except NotStarted:
            try:
                found, ended = self._run(jobs)
            except NotStarted as error:
                raise UserError(f"the sandbox did not start: {error}") from None
        if ended:  # then the first job without an outcome is the one that ended the sandbox
            found += [_lost(job, ended) for job in jobs[len(found) : max(1, len(found))]]
        return [*found, *self.run_together(jobs[len(found) :])]

    def _run(self, jobs: Sequence[Job]) -> tuple[list[Outcome], str]:
        """One attempt: the outcomes of the jobs that ended, and what is said of the next one, "" where the
        worker did not begin it."""
        secret, user = secrets.token_hex(16), fresh_user()
        names = ("memory", "file_bytes", "processes", "open_files", "total")
        about: dict[str, Any] = {
            "secret": secret,
            "user": user,
            "weak": self.backend == "weak",
            "path": self.python.packages,
            "limits": {name: getattr(self.limits, name) for name in names},
            "events": None,
        }
        seconds = sum(program.seconds for job in jobs for program in job.programs) + 2 * START_SECONDS
        with contextlib.ExitStack() as stack:
            folder, passed = "/tmp", []
            if self.backend == "weak":
                folder = stack.enter_context(_folder_for(user))
                command = weak(self.python, os.path.dirname(folder))
            elif self.backend == "bubblewrap":
                passed.append(_filter_pipe())
                stack.callback(os.close, passed[0])
                command = bubblewrap(self.python, self.limits.tmp_bytes, passed[0])
            else:
                command = namespaces(self.python, self.limits.tmp_bytes)
            if (group := Cgroup.make(self.limits.total)) is not None:
                stack.callback(group.close)
                about["events"] = group.events
                passed.append(group.events)
                command = group.entering(command)
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                cwd=folder,
                env=environment(folder),
                start_new_session=True,
                pass_fds=passed,
                bufsize=0,
            )
            stack.callback(self._stop, process)
            output = converse(process, request(jobs, about), time.monotonic() + seconds)
            full = group is not None and refused(group.events) > 0
        found, stopped = outcomes(output, secret, jobs)
        if stopped:
            return found, ""
        over = too_much(self.limits.total)
        named = any(over in outcome.results for outcome in found)  # then nobody knows who filled it last
        return found, over if full and not named else LOST

    def _stop(self, process: subprocess.Popen[bytes]) -> None:
        """End everything that the job started. The worker ends, and all below it, when its stdin does."""
        assert process.stdin is not None and process.stdout is not None
        process.stdin.close()
        try:
            process.wait(timeout=10 if self.backend == "weak" else 1)
        except subprocess.TimeoutExpired:
            if self.backend == "weak":  # elsewhere, what is below it ends with it
                kill_all(lambda: descendants(process.pid))
            process.kill()
            process.wait()
        process.stdout.close()


@contextlib.contextmanager
def _folder_for(user: int) -> Iterator[str]:
    """The working folder of `weak`, below one that is deleted; its user owns it."""
    with tempfile.TemporaryDirectory(prefix="proxytune-") as outer:
        folder = os.path.join(outer, "work")
        os.mkdir(folder, 0o700)
        if user:
            os.chmod(outer, 0o711)
            os.chown(folder, user, NOBODY)
        try:
            yield folder
        finally:
            empty(outer)


def _filter_pipe() -> int:
    """A pipe from which bwrap reads the filter of system calls."""
    read, write = os.pipe()
    os.write(write, filter_bytes())
    os.close(write)
    return read


def _lost(job: Job, ending: str) -> Outcome:
    """The outcome of a job that ended its sandbox."""
    return Outcome(tuple(ending for _ in job.programs), tuple(0.0 for _ in job.programs))
