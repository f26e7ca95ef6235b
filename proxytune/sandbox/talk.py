"""What goes between proxytune and the worker in a sandbox: a header and the texts one way, reports the other.
worker.py says how they are read."""

from __future__ import annotations

import base64
import json
import os
import select
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from proxytune.sandbox.root import MIB

MAX_FILES, MAX_REPORT = 32 * MIB, 1024 * MIB
"""Bytes of files that come back from a job, and all that a sandbox may send."""


@dataclass(frozen=True)
class Program:
    """One program text."""

    code: str
    seconds: float = 3.0
    """Wall-clock limit."""
    argv: tuple[str, ...] = ()
    main: bool = True
    """Run as `__main__`; without it the text runs in an empty namespace, as HumanEval's harness does."""
    check: str = ""
    """A text of ours that decides instead of the program's end. It runs in a process of its own, where
    `call(name)` gives the program's function of that name. Without a program, it judges files."""


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


class NotStarted(Exception):
    """The worker never reported that it was ready."""


def request(jobs: Sequence[Job], about: Mapping[str, Any]) -> bytes:
    """All that the worker and its children read. The header says how long each text is."""
    texts: list[bytes] = []

    def put(text: bytes) -> int:
        texts.append(text)
        return len(text)

    wanted = []
    for job in jobs:
        files = {name: base64.b64encode(data).decode() for name, data in job.files.items()}
        wanted.append(
            {
                "collect": job.collect,
                "files_bytes": put(json.dumps(files).encode()) if files else 0,
                "programs": [
                    {
                        "seconds": program.seconds,
                        "argv": program.argv,
                        "main": program.main,
                        "code_bytes": put(program.code.encode("utf-8", "surrogatepass")),
                        "check_bytes": put(program.check.encode("utf-8", "surrogatepass")),
                    }
                    for program in job.programs
                ],
            }
        )
    imports = list(dict.fromkeys(name for job in jobs for name in job.imports))
    header = {**about, "imports": imports, "jobs": wanted, "collect_bytes": MAX_FILES}
    packed = json.dumps(header).encode()
    return b"%016d" % len(packed) + packed + b"".join(texts)


def converse(process: subprocess.Popen[bytes], asked: bytes, deadline: float) -> bytes:
    """Send the request, and read until the worker ends, takes too long or prints too much."""
    assert process.stdin is not None and process.stdout is not None
    stdin, stdout, left = process.stdin.fileno(), process.stdout.fileno(), memoryview(asked)
    os.set_blocking(stdin, False)
    pieces, size = [], 0
    while size < MAX_REPORT and (seconds := deadline - time.monotonic()) > 0:
        ready, writable, _ = select.select([stdout], [stdin] if left else [], [], seconds)
        if writable:
            try:
                left = left[os.write(stdin, left) :]
            except BrokenPipeError:
                left = left[:0]
        if ready:
            piece = os.read(stdout, 1 << 16)
            if not piece:
                break
            pieces.append(piece)
            size += len(piece)
    return b"".join(pieces)


def outcomes(output: bytes, secret: str, jobs: Sequence[Job]) -> tuple[list[Outcome], bool]:
    """The worker's reports, one per job that ended, and whether it stopped before the next by itself."""
    lines = output.split(b"\n")
    own = [json.loads(line[len(secret) :]) for line in lines[:-1] if line.startswith(secret.encode())]
    if not own:
        reason = output.decode("utf-8", "replace").strip().splitlines()
        raise NotStarted(reason[-1][:300] if reason else "it printed nothing")
    stopped = "spoiled" in own[-1]
    reports = own[1 : len(own) - stopped]
    found = [
        Outcome(
            tuple(report["results"]),
            tuple(report["seconds"]),
            {name: base64.b64decode(text) for name, text in report["files"].items()},
        )
        for report, _ in zip(reports, jobs, strict=False)
    ]
    return found, stopped
