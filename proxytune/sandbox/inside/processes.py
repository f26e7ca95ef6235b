"""The processes that a sandbox started: which there are, what memory they take together, and their end."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable

SCRATCH = ("/tmp", "/dev/shm")
"""The folders in memory that code may write to."""


def others() -> list[int]:
    """All processes but this one: what can be seen where this is process 1 of its own namespace, otherwise
    what descends from it (it takes in orphans)."""
    own = os.getpid()
    return [pid for pid in _parents() if pid != 1] if own == 1 else descendants(own)


def descendants(top: int) -> list[int]:
    """The processes below one."""
    parents = _parents()
    found, more = {top}, {top}
    while more:
        more = {pid for pid, parent in parents.items() if parent in more} - found
        found |= more
    return sorted(found - {top})


def _parents() -> dict[int, int]:
    """The processes that can be seen and have not ended, and their parents."""
    found = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/stat") as file:
                state, parent = file.read().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        if state not in "ZX":
            found[int(name)] = int(parent)
    return found


def kill_others() -> None:
    """End all other processes, and pick up what is left of them."""
    kill_all(others)
    reap()


def kill_all(which: Callable[[], list[int]]) -> None:
    """End these until there are none. Stopped first, one that keeps forking cannot do so between two
    passes."""
    found = which()
    while found:
        for order in (signal.SIGSTOP, signal.SIGKILL):
            for pid in found:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, order)
        time.sleep(0.001)
        found = which()


def reap() -> None:
    """Pick up whatever has ended (orphans come here)."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def memory_used(most: int) -> int:
    """Bytes that the other processes and the folders in memory take. Pages that several processes share are
    counted once, but only where the plain sum is over `most`: to look at them takes longer."""
    pids = others()
    used = sum(_status(pid) for pid in pids) + _in_scratch()
    return used if used <= most else sum(map(_share, pids)) + _in_scratch()


def refused(events: int | None) -> int:
    """How often the kernel had no memory left for the sandbox as a whole, and ended a process for that: from
    the `memory.events` of its cgroup, an open file. 0 where it has none."""
    if events is None:
        return 0
    counts = dict(line.split() for line in os.pread(events, 4096, 0).decode().splitlines())
    return int(counts["oom"])


def too_much(total: int) -> str:
    """What is said of a program that took more than the total."""
    return f"failed: MemoryError: its processes and files took over {total >> 20} MiB together"


def _status(pid: int) -> int:
    """The resident and swapped memory and the page tables of a process."""
    try:
        with open(f"/proc/{pid}/status") as file:
            return _sum(file.read(), ("VmRSS:", "VmSwap:", "VmPTE:"))
    except OSError:
        return 0


def _share(pid: int) -> int:
    """The share of a process in the memory that it uses; all of that, where it will not be looked into."""
    try:
        with open(f"/proc/{pid}/smaps_rollup") as file:
            return _sum(file.read(), ("Pss:", "SwapPss:"))
    except OSError:
        return _status(pid)


def _sum(text: str, names: tuple[str, ...]) -> int:
    """The sum of some lines of kilobytes."""
    lines = [line.split() for line in text.splitlines()]
    return sum(int(line[1]) * 1024 for line in lines if len(line) > 1 and line[0] in names)


def _in_scratch() -> int:
    """What the private folders hold; a host's own folders are no one's share."""
    if os.getpid() != 1:
        return 0
    found = [os.statvfs(folder) for folder in SCRATCH]
    return sum((one.f_blocks - one.f_bfree) * one.f_frsize for one in found)
