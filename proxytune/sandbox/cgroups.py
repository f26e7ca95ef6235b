"""A cgroup per sandbox (cgroup v2), where this process may make one: the kernel itself then holds the total
of memory, also between two counts of the worker and for what the kernel keeps for its processes.

Nothing is set up for it. It is used where the kernel lets this process make a cgroup with a limit on memory
and move a process there: as root on most machines, in a container with a cgroup tree of its own, and as an
ordinary user in what `systemd-run --user --scope` starts. Elsewhere the worker's count is the only limit.
"""

from __future__ import annotations

import contextlib
import functools
import os
import secrets
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

PREFIX = "proxytune"
_ENTER = 'echo $$ > "$0" && exec "$@"'
"""A shell moves itself, then becomes the command: nothing of it ever ran outside."""
_END_SECONDS = 2.0
"""How long the last processes of a sandbox may take to be gone."""


@dataclass(frozen=True)
class Cgroup:
    """A cgroup of one sandbox."""

    folder: Path
    events: int
    """An open file: `memory.events`, which the worker reads (`processes.refused`)."""

    @classmethod
    def make(cls, most: int) -> Cgroup | None:
        """A new one that may take so many bytes, without swap; None where none can be made."""
        if (folder := parent()) is None:
            return None
        try:
            return cls.below(folder, most)
        except OSError:  # as many as there may be (cgroup.max.descendants): counted, as where there is none
            return None

    @classmethod
    def below(cls, parent: Path, most: int) -> Cgroup:
        """A new one in this; OSError where that is not allowed."""
        folder = parent / f"{PREFIX}-{os.getpid()}-{secrets.token_hex(6)}"
        folder.mkdir()
        try:
            (folder / "memory.max").write_text(str(most))
            if (folder / "memory.swap.max").exists():
                (folder / "memory.swap.max").write_text("0")
            return cls(folder, os.open(folder / "memory.events", os.O_RDONLY | os.O_CLOEXEC))
        except OSError:
            folder.rmdir()
            raise

    def entering(self, command: Sequence[str]) -> list[str]:
        """The command line that runs a command in here."""
        return ["/bin/sh", "-c", _ENTER, str(self.folder / "cgroup.procs"), *command]

    def close(self) -> None:
        """End what is left in it, and remove it. What cannot be removed yet, a later sandbox sweeps away."""
        os.close(self.events)
        with contextlib.suppress(OSError):  # before Linux 5.14; all has ended with the worker
            (self.folder / "cgroup.kill").write_text("1")
        deadline = time.monotonic() + _END_SECONDS
        while not _removed(self.folder) and time.monotonic() < deadline:
            time.sleep(0.005)


@functools.cache
def parent() -> Path | None:
    """The nearest cgroup, from that of this process upwards, in which it may make others with a limit on
    memory and enter them; None where there is none."""
    mounts, own = Path("/proc/self/mountinfo").read_text(), Path("/proc/self/cgroup").read_text()
    for folder in candidates(mounts, own):
        if _bounds_memory(folder) and _can_enter(folder):
            _sweep(folder)
            return folder
    return None


def candidates(mounts: str, own: str) -> list[Path]:
    """The cgroup of a process and those above it, as folders, from its `mountinfo` and `cgroup` in /proc.
    Empty where there is no cgroup v2, or where the process lies outside of what is mounted."""
    paths = [line.removeprefix("0::") for line in own.splitlines() if line.startswith("0::")]
    for line in mounts.splitlines():
        about, _, kind = line.partition(" - ")
        if paths and kind.split(" ")[0] == "cgroup2":
            root, at = about.split(" ")[3:5]
            path = PurePosixPath(paths[0])
            if path.is_relative_to(root) and ".." not in path.parts:
                folder, top = Path(at) / path.relative_to(root), Path(at)
                return [one for one in (folder, *folder.parents) if one.is_relative_to(top)]
    return []


def _bounds_memory(folder: Path) -> bool:
    """Whether the cgroups in this one can have a limit on memory."""
    try:
        return "memory" in (folder / "cgroup.subtree_control").read_text().split()
    except OSError:
        return False


def _can_enter(folder: Path) -> bool:
    """Whether a process of ours can be moved into a cgroup made here: tried with one that ends at once."""
    try:
        group = Cgroup.below(folder, 1 << 26)
    except OSError:
        return False
    try:
        command = group.entering(["/bin/sh", "-c", ":"])
        return subprocess.run(command, stderr=subprocess.DEVNULL, check=False).returncode == 0
    finally:
        group.close()


def _sweep(folder: Path) -> None:
    """Remove what a proxytune left that was killed; one that still holds processes stays."""
    for left in folder.glob(f"{PREFIX}-*-*"):
        if not Path("/proc", left.name.split("-")[1]).exists():
            _removed(left)


def _removed(folder: Path) -> bool:
    """Whether a cgroup is there no more, after an attempt to remove it. Only an empty one can be."""
    with contextlib.suppress(OSError):
        folder.rmdir()
    return not folder.exists()
