"""What goes to a sandbox and comes back, its command lines, and what becomes of lost jobs: nothing is run."""

from __future__ import annotations

import base64
import json
import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from proxytune.errors import UserError
from proxytune.sandbox import LOST, MIB, Job, Limits, Outcome, Program, Sandbox, root
from proxytune.sandbox import sandbox as sandboxes
from proxytune.sandbox.inside.seccomp import filter_bytes
from proxytune.sandbox.root import Interpreter, View, closed_folder, environment, fresh_user, too_wide
from proxytune.sandbox.talk import NotStarted, outcomes, request

# What is said


def test_what_the_worker_reads() -> None:
    """A header whose length comes first, and then the texts in a row."""
    first = Job(
        (Program("a\u00e9", 2.5, ("x",), main=False, check="c"), Program("", check="\ud800")),
        {"f": b"\x00", "d/": b""}, ("out/*",), ("numpy", "os"),
    )  # fmt: skip
    second = Job((Program("b"),), imports=("os", "re"))
    sent = request([first, second], {"secret": "s", "user": 7})
    length = int(sent[:16])
    header, texts = json.loads(sent[16 : 16 + length]), sent[16 + length :]
    files = json.dumps({"f": base64.b64encode(b"\x00").decode(), "d/": ""}).encode()
    assert header == {
        "secret": "s", "user": 7, "imports": ["numpy", "os", "re"], "collect_bytes": 32 * MIB,
        "jobs": [
            {
                "collect": ["out/*"], "files_bytes": len(files),
                "programs": [
                    {"seconds": 2.5, "argv": ["x"], "main": False, "code_bytes": 3, "check_bytes": 1},
                    {"seconds": 3.0, "argv": [], "main": True, "code_bytes": 0, "check_bytes": 3},
                ],
            },
            {
                "collect": [], "files_bytes": 0,
                "programs": [{"seconds": 3.0, "argv": [], "main": True, "code_bytes": 1, "check_bytes": 0}],
            },
        ],
    }  # fmt: skip
    assert texts == files + b"a\xc3\xa9" + b"c" + b"" + b"\xed\xa0\x80" + b"b" and MIB == 1 << 20


def report(result: str, **files: bytes) -> dict[str, Any]:
    """A worker's report of a job of one program."""
    packed = {name: base64.b64encode(content).decode() for name, content in files.items()}
    return {"results": [result], "seconds": [0.5], "files": packed}


def said(*reports: dict[str, Any]) -> bytes:
    """What a worker prints, with a program's words in between and a last line that is cut."""
    lines = [b"S" + json.dumps(one).encode() for one in reports]
    return b"noise\n" + b"\n".join([*lines, b"S{cut"])


def test_what_a_worker_reported() -> None:
    jobs = [Job((Program(str(i)),)) for i in range(3)]
    ready = {"ready": True}
    found, stopped = outcomes(said(ready, report("passed", a=b"x"), report("timed out")), "S", jobs)
    assert (
        found == [Outcome(("passed",), (0.5,), {"a": b"x"}), Outcome(("timed out",), (0.5,))] and not stopped
    )
    found, stopped = outcomes(said(ready, report("passed"), {"spoiled": True}), "S", jobs)
    assert [one.results for one in found] == [("passed",)] and stopped
    assert outcomes(said(ready), "S", jobs) == ([], False)
    found, _ = outcomes(said(ready, *[report("passed")] * 5), "S", jobs)
    assert len(found) == 3
    for printed, reason in [
        (b"", "it printed nothing"), (b"one\ntwo\n \n", "two"), (b"x" * 400, "x" * 300),
        (b"S{}", "S{}"), (b"\xff\n", "\ufffd"),
    ]:  # fmt: skip
        with pytest.raises(NotStarted) as raised:
            outcomes(printed, "S", jobs)
        assert str(raised.value) == reason
    assert found[0].passed and not Outcome(("passed", "failed: x"), (0.0, 0.0)).passed


# Which job is lost


class Scripted(Sandbox):
    """A sandbox whose attempts end as they are told to."""

    def __init__(self, backend: Any, *attempts: tuple[int, bool] | str) -> None:
        self.backend, self.attempts, self.tried = backend, list(attempts), list[list[str]]()

    def _run(self, jobs: Sequence[Job]) -> tuple[list[Outcome], str]:
        self.tried.append([job.programs[0].code for job in jobs])
        attempt = self.attempts.pop(0)
        if isinstance(attempt, str):
            raise NotStarted(attempt)
        done, stopped = attempt
        return [Outcome(("passed",), (0.0,)) for _ in range(done)], "" if stopped else LOST


@pytest.mark.parametrize(
    ("attempts", "tried", "lost"),
    [
        ([(3, False)], ["abc"], ""),
        ([(1, True), (2, False)], ["abc", "bc"], ""),
        ([(1, False), (0, False), (1, False)], ["abc", "bc", "c"], "b"),
        ([(0, False), (2, False)], ["abc", "bc"], "a"),
        ([(0, False)] * 3, ["abc", "bc", "c"], "abc"),
        (["late", (3, False)], ["abc", "abc"], ""),
        ([(2, True), "late", (1, False)], ["abc", "c", "c"], ""),
    ],
)
def test_a_lost_sandbox_costs_the_job_that_ended_it(attempts: Any, tried: list[str], lost: str) -> None:
    box = Scripted("namespaces", *attempts)
    found = box.run_together([Job((Program(name),)) for name in "abc"])
    assert ["".join(names) for names in box.tried] == tried
    assert [one.results for one in found] == [((LOST if name in lost else "passed"),) for name in "abc"]


def test_a_sandbox_that_does_not_start_twice_is_an_error() -> None:
    with pytest.raises(UserError, match=r"^the sandbox did not start: again$"):
        Scripted("namespaces", "late", "again").run(Job((Program("a"),)))
    box = Scripted("weak", (1, False), (1, False))
    assert len(box.run_together([Job((Program(name),)) for name in "ab"])) == 2
    assert box.tried == [["a"], ["b"]], "nothing isolates them from each other"
    assert Scripted("weak").run_together([]) == []
    two = Scripted("weak", (0, False)).run(Job((Program("a"), Program("b"))))
    assert two == Outcome((LOST, LOST), (0.0, 0.0))


# Which sandbox


def test_the_limits_of_a_sandbox() -> None:
    assert Limits() == Limits(
        memory=4096 * MIB, file_bytes=64 * MIB, processes=128, open_files=256, tmp_bytes=256 * MIB,
        total=4096 * MIB,
    )  # fmt: skip
    box = Sandbox("namespaces")
    assert box.limits == Limits() and box.workers == len(os.sched_getaffinity(0)) and box.warning == ""
    assert "'weak' does not isolate" in Sandbox("weak", workers=2).warning


def test_what_is_said_where_none_works(monkeypatch: pytest.MonkeyPatch) -> None:
    problems = {"bubblewrap": "no b", "namespaces": "no n", "weak": "no w"}
    monkeypatch.setattr(Sandbox, "problem", lambda self: problems[self.backend])
    monkeypatch.setattr(Sandbox, "_refusal", lambda self: "never")
    monkeypatch.setattr(shutil, "which", lambda name: name)
    with pytest.raises(UserError, match=r"^--sandbox does not work here: weak: no w$"):
        Sandbox.open("weak", sys.executable)
    with pytest.raises(UserError, match=r"^no sandbox works here \(bubblewrap: no b; namespaces: no n\)$"):
        Sandbox.open("auto", sys.executable)
    monkeypatch.setattr(shutil, "which", lambda name: None if name == "bwrap" else name)
    with pytest.raises(UserError, match=r"\. You may install bubblewrap \(apt-get install bubblewrap\)$"):
        Sandbox.open("auto", sys.executable)
    monkeypatch.setattr(Sandbox, "_refusal", lambda self: None)
    with pytest.raises(
        UserError, match=r"\. You may install bubblewrap .*, or say --sandbox weak: a process"
    ):
        Sandbox.open("auto", sys.executable)


def test_why_a_sandbox_is_not_even_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandboxes, "missing", lambda: None)
    monkeypatch.setattr(sandboxes, "too_wide", lambda python: None)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(shutil, "which", lambda name: None if name == "bwrap" else sys.executable)
    assert Sandbox("bubblewrap")._refusal() == "bwrap is not installed"
    assert Sandbox("namespaces")._refusal() is None and Sandbox("weak")._refusal() is None
    monkeypatch.setattr(sandboxes, "too_wide", lambda python: "/home")
    refusal = Sandbox("namespaces")._refusal()
    assert refusal is not None and refusal.startswith("code would see all of '/home', the folder of '")
    assert Sandbox("weak")._refusal() is None
    monkeypatch.setattr(sandboxes, "closed_folder", lambda python, *, isolated: Path("/shut"))
    assert Sandbox("weak")._refusal() is None, "it runs as this user"
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    refusal = Sandbox("weak")._refusal()
    assert refusal is not None and "who cannot enter '/shut'" in refusal and "chmod" not in refusal
    assert "chmod -R o+rX '/shut', run as another user" in Sandbox("namespaces")._unreadable(Path("/shut"))
    monkeypatch.setattr(sandboxes, "missing", lambda: "no kernel")
    assert {Sandbox(backend)._refusal() for backend in ("bubblewrap", "namespaces", "weak")} == {"no kernel"}


# What of the host is seen

PYTHON = Interpreter("/opt/p/bin/python", ("/opt/p",), ("/opt/p/lib/site",), "/opt/p/lib")


def test_the_environment_inside() -> None:
    assert environment("/w") == {
        "PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "HOME": "/w", "TMPDIR": "/w", "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "-1",
        "TF_CPP_MIN_LOG_LEVEL": "3", "MPLBACKEND": "Agg", "PYTHONHASHSEED": "1",
    }  # fmt: skip


def test_folders_that_hold_an_interpreter_deeper_in() -> None:
    view = View({}, {
        "/usr": "/usr", "/tmp/a/b/python": "/x", "/tmp/a/c": "/y", "/tmp/own": "/z", "/tmp/own/in": "/q",
        "/dev/shm/d/e": "/w", "/tmpfile/x": "/v",
    })  # fmt: skip
    assert view.holders() == ["/tmp/a", "/dev/shm/d"]
    assert str(root._top(Path("/tmp/a/b/python"))) == "/tmp/a" and str(root._top(Path("/tmp/a"))) == "/tmp/a"


def test_binds_come_with_the_folders_above_them() -> None:
    binds = root._binds({"/usr": "/usr", "/opt/p/q": "/real", "/opt/r": "/other"}, ("/there",))
    folder = ["--perms", "0755", "--dir"]
    assert binds == [
        *folder, "/opt", *folder, "/opt/p", "--ro-bind", "/usr", "/usr", "--ro-bind", "/real", "/opt/p/q",
        "--ro-bind", "/other", "/opt/r",
    ]  # fmt: skip
    assert root._binds({"/there/x": "/y"}, ("/there",)) == ["--ro-bind", "/y", "/there/x"]
    assert root._binds({"/a": "/a", "/a/b": "/c"}, ()) == ["--ro-bind", "/a", "/a", "--ro-bind", "/c", "/a/b"]


@pytest.mark.parametrize(
    ("uid", "options", "user", "sizes"),
    [
        (
            0,
            "--size --disable-userns",
            [
                "--cap-drop",
                "ALL",
                "--cap-add",
                "CAP_SETUID",
                "--cap-add",
                "CAP_SETGID",
                "--cap-add",
                "CAP_SETPCAP",
            ],
            True,
        ),
        (1000, "--size", ["--unshare-user", "--uid", "65534", "--gid", "65534"], True),
        (
            1000,
            "--disable-userns",
            ["--unshare-user", "--uid", "65534", "--gid", "65534", "--disable-userns"],
            False,
        ),
    ],
)
def test_the_command_of_bubblewrap(
    uid: int, options: str, user: list[str], sizes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    monkeypatch.setattr(root, "_bubblewrap_options", lambda: options)
    view = View({"/bin": "usr/bin"}, {"/usr": "/usr", "/tmp/a/b": "/real"})
    monkeypatch.setattr(root, "visible", lambda python: view)
    tmp, shm, small = [["--size", str(n)] if sizes else [] for n in (7 * MIB, 64 * MIB, MIB)]
    wide, narrow = ["--perms", "1777"], ["--perms", "0755"]
    assert root.bubblewrap(PYTHON, 7 * MIB, 9) == [
        "bwrap",
        "--unshare-pid",
        "--unshare-net",
        "--unshare-ipc",
        "--unshare-uts",
        "--unshare-cgroup-try",
        "--die-with-parent",
        "--as-pid-1",
        "--seccomp",
        "9",
        *user,
        "--symlink",
        "usr/bin",
        "/bin",
        "--ro-bind",
        "/usr",
        "/usr",
        "--proc",
        "/proc",
        "--dev",
        "/dev",
        *wide,
        *shm,
        "--tmpfs",
        "/dev/shm",
        *wide,
        *tmp,
        "--tmpfs",
        "/tmp",
        *narrow,
        *small,
        "--tmpfs",
        "/tmp/a",
        "--ro-bind",
        "/real",
        "/tmp/a/b",
        "--remount-ro",
        "/tmp/a",
        "--remount-ro",
        "/dev",
        "--remount-ro",
        "/",
        "--chdir",
        "/tmp",
        "--",
        *root.worker(PYTHON),
    ]
    assert root.worker(PYTHON, "/room")[:4] == ["/opt/p/bin/python", "-s", "-S", "-c"]
    assert root.worker(PYTHON, "/room")[4].startswith("import sys; sys.path[0] = '/room'; from proxytune.")


def test_the_layout_of_namespaces(monkeypatch: pytest.MonkeyPatch) -> None:
    view = View({"/bin": "usr/bin"}, {"/usr": "/usr", "/tmp/a/b": "/real"})
    monkeypatch.setattr(root, "visible", lambda python: view)
    *command, layout = root.namespaces(PYTHON, 7 * MIB)
    assert command[:3] == [sys.executable, "-I", "-S"] and command[3].endswith("namespaces.py")
    found = json.loads(layout)
    assert bytes.fromhex(found.pop("filter")) == filter_bytes()
    assert found == {
        "worker": root.worker(PYTHON), "links": {"/bin": "usr/bin"},
        "read_only": {"/usr": "/usr", "/tmp/a/b": "/real"},
        "scratch": {"/tmp": 7 * MIB, "/dev/shm": 64 * MIB}, "holders": {"/tmp/a": MIB},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("uid", "ranges", "user"),
    [
        (1000, "0 0 4294967295", 0),
        (0, "0 0 4294967295", (1 << 30) + 5),
        (0, "0 100000 65536", 65534),
        (0, f"0 0 1\n{(1 << 30) + 5} 7 1", (1 << 30) + 5),
        (0, f"{(1 << 30) + 6} 7 9", 65534),
        (0, f"{1 << 30} 7 5", 65534),
        (0, f"{1 << 30} 7 6", (1 << 30) + 5),
    ],
)
def test_a_user_that_nobody_else_is(
    uid: int, ranges: str, user: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def randbelow(bound: int) -> int:
        asked.append(bound)
        return 5

    monkeypatch.setattr(os, "geteuid", lambda: uid)
    monkeypatch.setattr(secrets, "randbelow", randbelow)
    monkeypatch.setattr(Path, "read_text", lambda path: ranges)
    found = fresh_user()
    monkeypatch.undo()
    assert found == user and asked == ([] if uid else [1 << 30])


def test_an_interpreter_whose_folder_holds_a_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, temporary = tmp_path / "homes" / "me", tmp_path / "temporary"
    for folder in (home / "venv", temporary, tmp_path / "opt"):
        folder.mkdir(parents=True)
    monkeypatch.setattr(os.path, "expanduser", lambda path: str(home))
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(temporary))

    def python(*folders: Path) -> Interpreter:
        return Interpreter("p", tuple(map(str, folders)), (), "")

    assert too_wide(python(home / "venv", tmp_path / "opt")) is None
    for wide in (home, home.parent, temporary):
        assert too_wide(python(tmp_path / "opt", wide)) == str(wide)


def test_a_folder_that_others_cannot_enter(tmp_path: Path) -> None:
    """With an isolating backend only the folders of the interpreter itself count."""
    shut, own = tmp_path / "shut", tmp_path / "shut" / "own"
    (own / "bin").mkdir(parents=True)
    (own / "lib" / "site").mkdir(parents=True)
    (own / "bin" / "python").write_text("")
    tmp_path.chmod(0o755)
    python = Interpreter(
        str(own / "bin" / "python"), (str(own),), (str(own / "lib" / "site"),), str(own / "lib")
    )
    above = [folder for folder in (*tmp_path.parents, tmp_path) if folder.stat().st_mode & 0o001 == 0]
    shut.chmod(0o700)
    assert closed_folder(python, isolated=False) == (
        min(above, key=lambda one: len(one.parts)) if above else shut
    )
    assert closed_folder(python, isolated=True) is None
    (own / "lib" / "site").chmod(0o750)
    assert closed_folder(python, isolated=True) == own / "lib" / "site"
    (own / "lib" / "site").chmod(0o755)
    own.chmod(0o700)
    assert closed_folder(python, isolated=True) == own
