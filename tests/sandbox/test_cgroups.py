"""A cgroup per sandbox: where it is looked for, what is written there, and what the worker makes of it. The
last test needs a cgroup v2 in which this process may make others, which few machines of tests have
(docs/sandbox.md says on which it was run)."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from proxytune.sandbox import LOST, MIB, Job, Limits, Program, Sandbox, cgroups
from proxytune.sandbox import sandbox as sandboxes
from proxytune.sandbox.cgroups import Cgroup, candidates
from proxytune.sandbox.inside.processes import refused, too_much
from proxytune.sandbox.sandbox import Backend
from tests.support.sandboxes import open_or_skip

V2 = "24 30 0:26 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw\n"
BOTH = "31 30 0:27 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n" + V2.replace(
    "cgroup rw", "cgroup/u rw"
)


@pytest.mark.parametrize(
    ("mounts", "own", "found"),
    [
        (V2, "0::/user.slice/a.scope\n", ["/user.slice/a.scope", "/user.slice", ""]),
        (V2, "0::/\n", [""]),
        (BOTH, "4:memory:/job\n0::/x\n", ["/u/x", "/u"]),
        (V2.replace("0:26 /", "0:26 /box"), "0::/box/deep\n", ["/deep", ""]),
        (V2.replace("0:26 /", "0:26 /box"), "0::/boxes\n", []),
        (V2, "0::/../other\n", []),
        (V2, "4:memory:/job\n", []),
        ("31 30 0:27 / /sys/fs/cgroup rw - cgroup cgroup rw,memory\n", "0::/x\n", []),
    ],
)  # fmt: skip
def test_where_a_cgroup_is_looked_for(mounts: str, own: str, found: list[str]) -> None:
    assert [str(folder) for folder in candidates(mounts, own)] == [f"/sys/fs/cgroup{path}" for path in found]


EVENTS = b"low 0\nhigh 0\nmax 7\noom %04d\noom_kill 5\n"


@pytest.fixture()
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Folders that stand for cgroups: new ones come with the kernel's files, and go with them."""
    mkdir, rmdir = Path.mkdir, Path.rmdir

    def make(self: Path) -> None:
        mkdir(self)
        (self / "memory.events").write_bytes(EVENTS % 0)

    def remove(self: Path) -> None:
        for file in self.iterdir():
            file.unlink()
        rmdir(self)

    monkeypatch.setattr(Path, "mkdir", make)
    monkeypatch.setattr(Path, "rmdir", remove)
    find = cgroups.parent
    find.cache_clear()
    yield tmp_path
    find.cache_clear()


def test_the_nearest_that_bounds_memory_and_lets_us_in(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, control in (
        ("a", "cpu memory pids"),
        ("a/b", "cpu memory"),
        ("a/b/c", "cpu pids"),
        ("a/b/c/d", ""),
    ):
        os.mkdir(tree / name)
        (tree / name / "cgroup.subtree_control").write_text(f"{control}\n")
    order = [tree / "a/b/c/d", tree / "a/b/c", tree / "a/b", tree / "a", tree]
    monkeypatch.setattr(cgroups, "candidates", lambda mounts, own: order)
    gone, ours = tree / "a/b/proxytune-999999999-ab", tree / f"a/b/proxytune-{os.getpid()}-ab"
    os.mkdir(gone)
    os.mkdir(ours)
    assert cgroups.parent() == tree / "a/b"
    assert not gone.exists() and ours.exists(), "only what a process left that is there no more"
    assert sorted(path.name for path in (tree / "a/b").iterdir()) == [
        "c",
        "cgroup.subtree_control",
        ours.name,
    ]
    cgroups.parent.cache_clear()
    monkeypatch.setattr(cgroups, "_ENTER", 'case "$0" in */a/b/proxytune*) exit 2;; esac')  # not let in
    assert cgroups.parent() == tree / "a"
    cgroups.parent.cache_clear()
    monkeypatch.setattr(cgroups, "candidates", lambda mounts, own: order[:2])
    assert cgroups.parent() is None and Cgroup.make(5) is None


def test_what_is_written_into_a_cgroup(tree: Path) -> None:
    group = Cgroup.below(tree, 123 * MIB)
    assert group.folder.parent == tree and group.folder.name.startswith(f"proxytune-{os.getpid()}-")
    assert (group.folder / "memory.max").read_text() == str(123 * MIB)
    assert not (group.folder / "memory.swap.max").exists(), "a kernel without swap has no such file"
    moved = subprocess.run(
        group.entering(["/bin/sh", "-c", "echo $$ $0 $1", "x", "y z"]), capture_output=True
    )
    assert [*(group.folder / "cgroup.procs").read_bytes().split(), b"x", b"y", b"z"] == moved.stdout.split()
    assert refused(group.events) == 0 and refused(None) == 0
    (group.folder / "memory.events").write_text("max 9\noom 3\noom_kill 2\n")
    assert refused(group.events) == 3, "kills for the whole machine's sake are not its own"
    group.close()
    assert not group.folder.exists()
    with pytest.raises(OSError, match="Bad file"):
        refused(group.events)


def test_one_that_cannot_be_bounded_is_not_left_behind(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "write_text", _denied)
    with pytest.raises(PermissionError):
        Cgroup.below(tree, 1)
    monkeypatch.setattr(cgroups, "parent", lambda: tree)
    assert Cgroup.make(1) is None, "then its memory is counted"
    assert list(tree.iterdir()) == []


def _denied(self: Path, text: str) -> None:
    raise PermissionError(13, "Permission denied", str(self))


def test_swap_is_refused_where_there_is_some(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Path.mkdir

    def with_swap(self: Path) -> None:
        made(self)
        (self / "memory.swap.max").write_text("max")

    monkeypatch.setattr(Path, "mkdir", with_swap)
    assert (Cgroup.below(tree, 1).folder / "memory.swap.max").read_text() == "0"


LIMITS = Limits(total=64 * MIB)
LOOKS = """
import os
held = [os.path.realpath(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")]
assert not [path for path in held if path.endswith("memory.events")], held
"""


@pytest.fixture(params=["bubblewrap", "namespaces", "weak"])
def grouped(request: pytest.FixtureRequest, tree: Path, monkeypatch: pytest.MonkeyPatch) -> Sandbox:
    """Each backend, its processes in such a folder."""
    box = open_or_skip(request.param, LIMITS)
    monkeypatch.setattr(cgroups, "parent", lambda: tree)
    return box


@contextlib.contextmanager
def filling(tree: Path) -> Iterator[None]:
    """Say again and again, as the kernel does, that a cgroup was full."""
    done = threading.Event()

    def run() -> None:
        for count in itertools.count(1):
            if done.wait(0.1):
                return
            for events in tree.glob("proxytune-*/memory.events"):
                with contextlib.suppress(FileNotFoundError), events.open("r+b") as file:
                    file.write(EVENTS % count)  # at no time is the file empty

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def test_a_program_that_filled_its_cgroup_has_failed(grouped: Sandbox, tree: Path) -> None:
    """Whatever it said; and no program sees the file that tells."""
    with filling(tree):
        assert grouped.run(Job((Program("import time; time.sleep(1)"),))).results == (too_much(64 * MIB),)
    outcomes = grouped.run_together([Job((Program(LOOKS),)), Job((Program(LOOKS),))])
    assert [outcome.results for outcome in outcomes] == [("passed",)] * 2
    assert list(tree.iterdir()) == [], "removed with the sandbox"


def test_a_sandbox_that_fell_to_its_own_limit_is_not_lost(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker was the last to be killed: no second try, a verdict. A full cgroup whose verdict was given
    to an earlier job says nothing of the one that was lost."""
    monkeypatch.setattr(cgroups, "parent", lambda: tree)
    box = Sandbox("namespaces", limits=LIMITS)
    over = {"results": [too_much(LIMITS.total)], "seconds": [0.1], "files": {}}

    def play(oom: int, *reports: object) -> str:
        def said(process: subprocess.Popen[bytes], asked: bytes, deadline: float) -> bytes:
            for events in tree.glob("proxytune-*/memory.events"):
                events.write_text(f"oom {oom}\n")
            secret = json.loads(asked[16 : 16 + int(asked[:16])])["secret"]
            return "".join(f"\n{secret}{json.dumps(one)}\n" for one in ({"ready": True}, *reports)).encode()

        monkeypatch.setattr(sandboxes, "converse", said)
        return box._run([Job((Program("a"),)), Job((Program("b"),))])[1]

    assert play(1) == too_much(LIMITS.total) and play(0) == LOST
    assert play(1, over) == LOST and play(1, over, {"spoiled": True}) == ""


BOMB = """
import os
pids = []
for _ in range(8):
    if not (pid := os.fork()):
        held = [bytearray(os.urandom(1 << 20) * 64) for _ in range(60)]
        os._exit(0)
    pids.append(pid)
for pid in pids:
    os.waitpid(pid, 0)
"""


@pytest.mark.parametrize("backend", ["bubblewrap", "namespaces", "weak"])
def test_the_kernel_holds_the_total(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight processes that take 30 GiB at once, between two counts: they never have more than the total."""
    if cgroups.parent() is None:
        pytest.skip("no cgroup v2 here in which this process may make one with a limit on memory")
    box = open_or_skip(backend, Limits(total=256 * MIB))
    peaks, close = list[int](), Cgroup.close

    def read_first(self: Cgroup) -> None:
        peaks.append(int((self.folder / "memory.peak").read_text()))
        close(self)
        assert not self.folder.exists()

    monkeypatch.setattr(Cgroup, "close", read_first)
    outcomes = box.run_together([Job((Program(BOMB, seconds=60),)), Job((Program("pass", seconds=60),))])
    assert [outcome.results for outcome in outcomes] == [(too_much(256 * MIB),), ("passed",)]
    assert 128 * MIB < max(peaks) <= 256 * MIB
