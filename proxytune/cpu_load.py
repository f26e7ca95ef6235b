"""How busy the CPU is with other work, and what to do about it.

Threads of a forward wait for each other after every product. Where another program has the core of one of
them, all wait for it, many times per token: two threads on a busy machine can be far slower than one."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

PRESSURE = (Path("/sys/fs/cgroup/cpu.pressure"), Path("/proc/pressure/cpu"))
"""Where Linux says how long tasks waited for a core: those of our container, or all of the machine."""
WAITING = 0.2
"""The share of time in which something waited for a core that makes a CPU busy."""


@dataclass(frozen=True)
class CpuLoad:
    """How busy the CPU was of late."""

    cores: int
    """That this process may use."""
    waiting: float | None
    """The share of the last ten seconds in which some task waited for a core; None where nobody knows."""
    runnable: float
    """Tasks that ran or waited for a core, on average over the last minute (the load average); of the whole
    machine, which may have more cores than we may use."""
    machine_cores: int

    @property
    def busy(self) -> bool:
        """Whether more work is there than cores."""
        if self.waiting is not None:
            return self.waiting >= WAITING
        return self.runnable >= self.machine_cores + 1


def advice(threads: int, load: CpuLoad) -> str | None:
    """What to tell somebody who is about to decode with so many threads; None where nothing is amiss."""
    if threads > load.cores:
        return (
            f"{threads} threads share {load.cores} core{'s' * (load.cores != 1)} and wait for each other: "
            f"--threads {load.cores} is faster"
        )
    if threads == 1 or not load.busy:
        return None
    seen = f"load {load.runnable:.1f} on {load.machine_cores} cores"
    if load.waiting is not None:
        seen = f"tasks waited for a core {load.waiting:.0%} of the last 10 seconds, {seen}"
    return (
        f"the CPU is busy with other work ({seen}): {threads} threads wait for each other then, which can be "
        "many times slower than one. Try --threads 1"
    )


def read() -> CpuLoad:
    """The load as it is now."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    runnable = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    return CpuLoad(allowed or 1, _waiting(), runnable, os.cpu_count() or 1)


def _waiting() -> float | None:
    """From the first file of `PRESSURE` that is there: `some avg10=1.23 avg60=...`."""
    for path in PRESSURE:
        try:
            some = path.read_text(encoding="ascii").splitlines()[0]
            return float(dict(part.split("=") for part in some.split()[1:])["avg10"]) / 100
        except (OSError, ValueError, IndexError, KeyError):
            continue  # no such file, or the kernel was built without it
    return None
