"""Work that is killed at random moments, in forked processes, so that models are loaded once."""

from __future__ import annotations

import json
import os
import random
import signal
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from proxytune import results
from proxytune.records import Run


@dataclass
class Killer:
    """Kills what it runs, again and again, until it has killed often enough."""

    draw: random.Random
    whole: float = 0.0
    """Seconds that the work takes when it is left alone."""
    kills: int = 0
    endings: list[int] = field(default_factory=list)
    """Exit codes of those that ended by themselves."""

    def start(self, work: Callable[[], Any]) -> bool:
        """Run the work in a process of its own, and kill it at a random moment. -> whether it was killed."""
        deadline = time.monotonic() + self.draw.uniform(0, self.whole)
        child = in_another_process(work)
        while time.monotonic() < deadline:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                self.endings.append(os.waitstatus_to_exitcode(status))
                return False
            time.sleep(0.001)
        os.kill(child, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code != -signal.SIGKILL:
            self.endings.append(code)
            return False
        self.kills += 1
        return True

    def until_done(self, work: Callable[[], Any], most: int) -> int:
        """Kill the work up to `most` times, then let it end. -> how often it was killed."""
        for count in range(most):
            if not self.start(work):
                return count
        child = in_another_process(work)
        self.endings.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        return most


def in_another_process(work: Callable[[], Any]) -> int:
    """Start the work in a fork of this process; -> its id. It exits with 0, or with 1 after a traceback."""
    child = os.fork()
    if child:
        return child
    code = 1
    time.perf_counter = time.process_time  # what a run takes is then its own work, whatever else runs here
    try:
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def figures(folder: Path) -> dict[str, Any]:
    """What a finished run says, but for time and the peaks of memory, which no two runs share."""
    run: Run = results.read_run(folder)
    assert run.status == "done"
    cost = run.cost.model_dump(exclude={"seconds", "prefill_seconds", "process_peak", "sessions", "memory"})
    weights = {name: memory.weights for name, memory in run.cost.memory.items()}
    notes = [note for note in run.notes if not note.startswith("continued ")]
    found = {"metrics": run.metrics, "n": run.n, "headline": run.headline, "judge": run.judge}
    rows = (folder / results.PREDICTIONS).read_bytes()
    return {**found, "cost": cost, "weights": weights, "notes": notes, "rows": rows, "trace": _traces(folder)}


def _traces(folder: Path) -> list[Any]:
    """The traces, but for the last digits of probabilities, which differ with what shares a batch."""
    path = folder / results.TRACE
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line, parse_float=lambda text: f"{float(text):.9g}") for line in lines]
