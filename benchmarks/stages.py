"""Stages that share little: for measurements on a machine that is lent for minutes.

Stages run in order. Those of one group share a process, and what they make in it. Whatever one of them finds
is a line of JSON in a file and on stdout as soon as it is known, so that a run which is cut off has lost
nothing. Every stage that was begun ends with exactly one line of a kind in ENDS, and what goes wrong in one
leaves the next ones alone: an exception is a line with its traceback; a stage that takes too long is killed
with its process, and the next one gets a new one; so does the stage after one whose process died. A stage for
which there is no time is skipped.

This module imports neither torch nor proxytune: what watches over the stages holds no memory of the GPU."""

from __future__ import annotations

import faulthandler
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

ENDS = ("done", "skipped", "error", "killed", "died")
"""Kinds of the last line of a stage."""
FAILED = ("error", "killed", "died")
LINES, LOG = "day.jsonl", "day.log"
SHOWN = 40
"""Lines of a process's output that are shown where it was killed or died."""
WHERE = 1.0
"""Seconds in which a process that takes too long may write down where it is."""
GRACE = 20.0
"""Seconds in which a process whose stages are done may end by itself."""


class NotHere(Exception):
    """A stage does not belong on this machine; the message says why."""


class Say(Protocol):
    """How a stage tells what it has found: a kind, and fields that JSON can hold."""

    def __call__(self, kind: str, **found: object) -> None: ...


Work = Mapping[str, Callable[[Say], None]]
"""What the stages of one group do, by their names."""


@dataclass(frozen=True)
class Stage:
    """One part of the day."""

    group: str
    name: str
    need: float
    """Seconds without which it is not begun."""
    limit: float
    """Seconds after which it is killed."""

    @property
    def title(self) -> str:
        """Its group and its name."""
        return f"{self.group}: {self.name}"


@dataclass
class Day:
    """The clock and the file of results."""

    folder: Path
    deadline: float
    """Seconds from now until which everything has to be over."""
    failed: list[str] = field(default_factory=list)
    """Titles of the stages that were not done, skipped ones excepted."""
    _began: float = field(default_factory=time.monotonic)

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - (time.monotonic() - self._began)

    def say(self, stage: str, kind: str, found: Mapping[str, object]) -> None:
        """Put a line down, and show it."""
        if kind in FAILED:
            self.failed.append(stage)
        seconds = round(self.deadline - self.left, 1)
        text = json.dumps({"t": seconds, "stage": stage, "kind": kind, **found}, default=str)
        with (self.folder / LINES).open("a", encoding="utf-8") as lines:
            lines.write(text + "\n")
        print(text, flush=True)


@dataclass
class Worker:
    """The process of a group."""

    group: str
    process: subprocess.Popen[str]
    log: Path
    lines: queue.Queue[dict[str, Any] | None]
    """What it says; None when it has ended."""
    spent: bool = False
    """Whether it does no further stage."""
    _logged: int = 0
    """Length of the log when the stage began."""

    @classmethod
    def start(cls, group: str, command: Sequence[str], log: Path) -> Worker:
        """Start it. Its own output goes to the end of the log."""
        with log.open("a", encoding="utf-8") as output:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                text=True,
                bufsize=1,
                process_group=0,  # killed with all that it has started
            )
        worker = cls(group, process, log, queue.Queue())
        threading.Thread(target=worker._listen, daemon=True).start()
        return worker

    def _listen(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as said:
            for line in said:
                self.lines.put(json.loads(line))
        self.lines.put(None)

    def work(self, stage: Stage, limit: float, day: Day) -> None:
        """Have one stage done, within `limit` seconds."""
        assert self.process.stdin is not None
        until, self._logged = time.monotonic() + limit, self.log.stat().st_size
        with suppress(BrokenPipeError):  # it has ended: that is the next thing to be heard
            self.process.stdin.write(stage.name + "\n")
        while True:
            try:
                found = self.lines.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                self.process.send_signal(signal.SIGUSR1)
                time.sleep(WHERE)
                self.kill()
                day.say(stage.title, "killed", {"after_s": round(limit, 1), "log": self.tail()})
                return
            if found is None:
                self.spent = True
                day.say(stage.title, "died", {"exit_code": self.process.wait(), "log": self.tail()})
                return
            kind = found.pop("kind")
            self.spent = self.spent or bool(found.pop("spent", False))
            day.say(stage.title, kind, found)
            if kind in ENDS:
                return

    def tail(self) -> list[str]:
        """The last lines of its output in this stage."""
        with self.log.open(encoding="utf-8", errors="replace") as content:
            content.seek(self._logged)
            return list(deque((line.rstrip("\n")[:400] for line in content), SHOWN))

    def end(self) -> None:
        """No stage is left for it: wait until its memory is free."""
        self._hang_up()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(GRACE)
        self.kill()

    def _hang_up(self) -> None:
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.close()

    def kill(self) -> None:
        """End it, and what it has started."""
        self.spent = True
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self._hang_up()


def run(stages: Sequence[Stage], starts: Mapping[str, float], command: Sequence[str], day: Day) -> None:
    """Run stages in order. A group's process is `command` with the group's name; it takes `starts[group]`
    seconds until it can begin with its first stage."""
    worker: Worker | None = None
    try:
        for stage in stages:
            here = worker is not None and worker.group == stage.group and not worker.spent
            start = 0.0 if here else starts[stage.group]
            if day.left < start + stage.need:
                why = f"{day.left:.0f} s are left, and it takes about {start + stage.need:.0f} s"
                day.say(stage.title, "skipped", {"reason": why})
                continue
            if not here:
                if worker is not None:
                    worker.end()
                worker = Worker.start(stage.group, [*command, stage.group], day.folder / LOG)
            assert worker is not None
            worker.work(stage, min(start + stage.limit, day.left), day)
        if worker is not None:
            worker.end()
    finally:
        if worker is not None:
            worker.kill()


def serve(work: Work, recover: Callable[[], None] = lambda: None) -> None:
    """In the process of a group: do the stages that stdin names, one a line. After an exception `recover`
    puts things in order; where it cannot, this process does no further stage."""
    faulthandler.register(signal.SIGUSR1)  # where it is, for the log, before it is killed
    with _wire() as say:
        for line in sys.stdin:
            began, name = time.perf_counter(), line.strip()
            failure = _failure(work[name], say)
            if failure is None:
                say("done", seconds=round(time.perf_counter() - began, 1))
                continue
            if failure["kind"] == "error":  # the exception and all that its frames held are gone by now
                try:
                    recover()
                except Exception:
                    failure["spent"] = True
                    traceback.print_exc()
            say(**failure)
            if failure.get("spent"):
                return


def _failure(work: Callable[[Say], None], say: Say) -> dict[str, Any] | None:
    """Do a stage -> the line that says why it was not done."""
    try:
        work(say)
    except NotHere as reason:
        return {"kind": "skipped", "reason": str(reason)}
    except Exception as error:
        traceback.print_exc()  # the log has all of it in order
        text = f"{type(error).__name__}: {error}"
        return {"kind": "error", "error": text, "traceback": traceback.format_exc().splitlines()}
    return None


@contextmanager
def _wire() -> Iterator[Say]:
    """What stdout was, for lines of JSON; what anything prints goes to stderr from now on."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as wire:
        os.dup2(2, 1)

        def say(kind: str, **found: object) -> None:
            wire.write(json.dumps({"kind": kind, **found}, default=str) + "\n")
            wire.flush()

        yield say
