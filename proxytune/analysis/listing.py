"""What is in a folder of results: which runs are finished, and which command goes on with the others."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from proxytune.config import Sampling
from proxytune.errors import UserError
from proxytune.records import Metric, Run
from proxytune.results import RUN, read_rows, read_run
from proxytune.tasks import TASKS


@dataclass(frozen=True)
class ListedRun:
    """A folder with a run."""

    folder: Path
    status: Literal["finished", "unfinished", "unreadable"]
    run: Run | None = None
    """None where it cannot be read."""
    done: int = 0
    """Examples that are stored."""
    problem: str = ""
    """Why it cannot be read."""

    @property
    def score(self) -> Metric | None:
        """The headline of a finished run."""
        return None if self.run is None or self.status != "finished" else self.run.score

    @property
    def command(self) -> str:
        """What goes on with an unfinished run: the command that it was started with, or one of the same
        settings; "" for others."""
        if self.run is None or self.status != "unfinished":
            return ""
        try:
            words = shlex.split(self.run.made.command)
        except ValueError:
            words = []
        started = len(words) > 1 and words[0] == "proxytune"
        return shlex.join(words if started else _same_settings(self.run, self.folder))


def listing(root: Path) -> list[ListedRun]:
    """Every run under `root`, in the order of the folders' names; UserError where there is none."""
    if not root.is_dir():
        raise UserError(f"no folder '{root}': `proxytune eval` makes it, or name another")
    found = [_listed(path.parent) for path in sorted(root.rglob(RUN))]
    if not found:
        raise UserError(f"no run in '{root}': `proxytune eval` makes one")
    return found


def _listed(folder: Path) -> ListedRun:
    try:
        run, rows = read_run(folder), read_rows(folder)
    except UserError as error:
        return ListedRun(folder, "unreadable", problem=str(error))
    return ListedRun(folder, "finished" if run.status == "done" else "unfinished", run, len(rows))


def _same_settings(run: Run, folder: Path) -> list[str]:
    """The command with the settings of a run that Python started. A system or data in a file is called by
    its name: where it lies is not stored."""
    spec, task = run.spec, TASKS.get(run.spec.task)
    named = run.facts.file if run.facts is not None and run.facts.file else spec.task
    words = ["proxytune", "eval", named, "--system", spec.system.name, "--as", spec.role]
    usual = Sampling() if task is None else task.sampling
    given: dict[str, object] = {
        "alpha": spec.alpha.text if spec.role == "proxy" and spec.alpha != spec.system.alpha else None,
        "data": spec.data if spec.data != spec.system.data.get(spec.task, "hub") else None,
        "limit": spec.limit,
        "shots": spec.shots or None,
        "trace": spec.trace if spec.trace != "off" else None,
        "mode": spec.mode if spec.mode != "generate" else None,
        **{name: value for name, value in spec.sampling if value != getattr(usual, name)},
        "out": folder,
    }
    for name, value in given.items():
        option = "-n" if name == "n" else f"--{name.replace('_', '-')}"
        values = value if isinstance(value, tuple) else () if value is None else (value,)
        words += [word for one in values for word in (option, str(one))]
    return words
