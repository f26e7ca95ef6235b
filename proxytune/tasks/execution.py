"""The leave to run the code of stored rows, the account of it, and how verdicts are settled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

from proxytune.sandbox.sandbox import Sandbox
from proxytune.tasks.data import Row


@dataclass
class Execution:
    """The leave to run the code of stored rows, with what that takes and an account of it."""

    sandbox: Sandbox
    items: Mapping[str, Row]
    """Example id -> target, for what rows do not hold (unit tests)."""
    samples: int = 0
    passed: int = 0
    timed_out: int = 0
    broken: int = 0
    """Samples that were not run, because their problem could not be set up with the libraries that there
    are."""
    compared: int = 0
    """Samples that had a verdict before."""
    rerun: int = 0
    """Samples that were run once more, alone and with a longer limit, because a time-out made the
    difference."""
    flips: int = 0
    """Samples whose verdict is another one than before."""

    def report(self) -> dict[str, int | str]:
        """The account, by name."""
        counts = {f.name: getattr(self, f.name) for f in fields(self) if f.type == "int"}
        return {"sandbox": self.sandbox.backend, **counts}
