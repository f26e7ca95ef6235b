"""Where the interpreter of a sandbox may lie, and what is said where it may not."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest

from proxytune.errors import UserError
from proxytune.sandbox import Job, Program, Sandbox
from proxytune.sandbox.inside.files import is_mount
from proxytune.sandbox.root import SCRATCH, Interpreter, View, closed_folder, visible
from tests.support.checkout import ROOT
from tests.support.require import require_or_skip
from tests.support.sandboxes import SYSTEM_PYTHON

Isolating = Literal["bubblewrap", "namespaces"]
ISOLATING: tuple[Isolating, ...] = ("bubblewrap", "namespaces")


@pytest.fixture(params=ISOLATING)
def backend(request: pytest.FixtureRequest) -> Isolating:
    """Each backend that isolates and works here."""
    found: Isolating = request.param
    if (problem := Sandbox(found).problem()) is not None:
        require_or_skip("sandbox", problem)
    return found


@pytest.fixture(params=SCRATCH)
def scratch(request: pytest.FixtureRequest) -> Iterator[Path]:
    """A folder of the host's where the sandbox has a private one."""
    with tempfile.TemporaryDirectory(dir=request.param) as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def environment_in(folder: Path, python: str = sys.executable) -> str:
    """The interpreter of a virtual environment that is made there."""
    subprocess.run([python, "-m", "venv", "--without-pip", str(folder)], check=True, timeout=60)
    return str(folder / "bin" / "python")


REPLACES = """
import os, shutil
scratch, top, own = {scratch!r}, {top!r}, {own!r}
assert os.path.exists(own + "/pyvenv.cfg")
done = []
for attempt in (
    lambda: os.rename(top, scratch + "/moved"),
    lambda: os.rename(os.path.dirname(own), top + "/moved"),
    lambda: os.rmdir(top),
    lambda: os.chmod(top, 0o777),
    lambda: open(top + "/new", "w"),
    lambda: open(own + "/new", "w"),
    lambda: os.unlink(own + "/pyvenv.cfg"),
):
    try:
        attempt()
    except OSError:
        continue
    done.append(attempt.__code__.co_firstlineno)
shutil.rmtree(scratch, ignore_errors=True)
os.makedirs(scratch + "/left/over")
assert not done, done
"""


def test_it_starts_from_a_temporary_folder(backend: Isolating, scratch: Path) -> None:
    """The checkout is there and so is its environment; the rest of the folder is not seen."""
    own = scratch / "checkout" / ".venv"
    box = Sandbox(backend, environment_in(own), workers=1)
    assert box.problem() is None
    (scratch / "secret").write_text("here")
    (scratch / "checkout" / "secret").write_text("here")
    seen = f"""
import os
assert os.listdir({str(scratch)!r}) == ["checkout"], os.listdir({str(scratch)!r})
assert os.listdir({str(scratch / "checkout")!r}) == [".venv"]
assert os.listdir({str(scratch.parent)!r}) == [{scratch.name!r}]
open("{scratch.parent}/mine", "w").close()
"""
    assert box.run(Job((Program(seen, 10),))).results == ("passed",)


def jobs_against(scratch: Path, own: Path) -> list[Job]:
    """One that tries to replace the interpreter, one that looks at what is left, one that brings a file."""
    replaces = REPLACES.format(scratch=str(scratch.parent), top=str(scratch), own=str(own))
    looks = f"import os, decimal, email.message\nleft = os.listdir({str(scratch.parent)!r})\n"
    looks += f"assert left == [{scratch.name!r}], left"
    writes = "open('out.cfg', 'w').close()"
    brings = Job((Program(writes, 10),), collect=("*.cfg",))
    return [Job((Program(replaces, 10),)), Job((Program(looks, 10),)), brings]


def test_no_job_replaces_an_interpreter_there(backend: Isolating, scratch: Path) -> None:
    own = scratch / "checkout" / ".venv"
    box = Sandbox(backend, environment_in(own), workers=1)
    outcomes = box.run_together(jobs_against(scratch, own))
    assert [outcome.results for outcome in outcomes] == [("passed",)] * 3
    assert list(outcomes[2].files) == ["out.cfg"]  # and not pyvenv.cfg


def test_no_job_of_an_ordinary_user_does(backend: Isolating, scratch: Path) -> None:
    """There the job's user is the owner of what is made in the sandbox's /tmp."""
    if os.geteuid() != 0 or not Path(SYSTEM_PYTHON).exists() or shutil.which("setpriv") is None:
        pytest.skip("not root (the test above is of an ordinary user then), or no system Python or setpriv")
    package, own = scratch / "package" / "proxytune", scratch / "checkout" / ".venv"
    shutil.copytree(ROOT / "proxytune" / "sandbox", package / "sandbox")
    shutil.copy(ROOT / "proxytune" / "errors.py", package)
    (package / "__init__.py").touch()
    python = environment_in(own, SYSTEM_PYTHON)
    for folder in (package, package.parent, own.parent):
        folder.chmod(0o755)
    code = f"""
from proxytune.sandbox import *
box = Sandbox({backend!r}, {python!r}, workers=1)
print(box.problem(), [outcome.results for outcome in box.run_together({jobs_against(scratch, own)!r})])
"""
    user = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups"]
    command = [*user, SYSTEM_PYTHON, "-c", code]
    given = {"HOME": "/nonexistent", "PATH": os.environ["PATH"]}
    done = subprocess.run(command, cwd=package.parent, env=given, capture_output=True, text=True, timeout=60)
    if "did not start" in done.stdout + done.stderr:
        require_or_skip("sandbox", f"{backend} as nobody: {done.stdout}{done.stderr[-500:]}")
    assert done.stdout == "None [('passed',), ('passed',), ('passed',)]\n", done.stderr


@pytest.mark.parametrize(("path", "mount"), [("/proc", True), ("/usr/bin", False), ("/nowhere", False)])
def test_what_begins_another_file_system_is_left_alone(path: str, mount: bool) -> None:
    assert is_mount(path) == mount


def test_it_starts_below_a_closed_folder(backend: Isolating, tmp_path: Path) -> None:
    """Folders above the interpreter are made anew inside: nobody need enter the host's."""
    python = environment_in(tmp_path / "home" / "venv")
    (tmp_path / "home").chmod(0o700)
    assert Sandbox(backend, python).problem() is None


def test_a_link_elsewhere_leads_to_the_interpreter(backend: Isolating, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    link = tmp_path / "bin" / "python-of-mine"
    link.symlink_to(os.path.realpath(sys.executable))
    box = Sandbox(backend, str(link))
    assert box.problem() is None and box.python.executable != str(link)


def test_an_interpreter_that_nobody_may_read_is_named(backend: Isolating, tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("an ordinary user's code is read as that user")
    python = environment_in(tmp_path / "venv")
    (tmp_path / "venv" / "lib").chmod(0o700)
    problem = Sandbox(backend, python).problem()
    assert problem is not None
    assert f"cannot enter '{tmp_path / 'venv' / 'lib'}', which '{python}' needs: chmod -R o+rX" in problem


def test_the_closed_folder_above_counts_where_nothing_is_made_anew(tmp_path: Path) -> None:
    python = Interpreter(str(tmp_path / "home/venv/python"), (str(tmp_path / "home/venv"),), (), "/usr/lib")
    (tmp_path / "home" / "venv").mkdir(parents=True)
    for folder in (tmp_path, *tmp_path.parents, tmp_path / "home" / "venv"):
        if not folder.stat().st_mode & 0o001 and folder != tmp_path:
            folder.chmod(folder.stat().st_mode | 0o001)
    tmp_path.chmod(0o755)
    (tmp_path / "home").chmod(0o700)
    assert closed_folder(python, isolated=False) == tmp_path / "home"
    assert closed_folder(python, isolated=True) is None


@pytest.mark.parametrize("backend", ISOLATING)
def test_a_home_is_not_shown_for_an_interpreter_in_it(
    backend: Isolating, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend == "bubblewrap" and shutil.which("bwrap") is None:
        pytest.skip("bwrap is not installed")
    python = environment_in(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    problem = Sandbox(backend, python).problem()
    assert problem is not None and problem.startswith(f"code would see all of '{tmp_path}', the folder of")


def test_an_interpreter_out_of_reach_names_the_closed_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) != "/usr")
    with pytest.raises(
        UserError, match=r"'/usr/nowhere/python' is no Python .* '/usr' is closed to this user"
    ):
        Interpreter.find("/usr/nowhere/python")


@pytest.mark.parametrize("bwrap", [None, "/usr/bin/bwrap"])
@pytest.mark.parametrize("closed", [None, Path("/shut")])
def test_only_what_may_help_is_advised(
    monkeypatch: pytest.MonkeyPatch, bwrap: str | None, closed: Path | None
) -> None:
    monkeypatch.setattr(Sandbox, "problem", lambda self: "not today")
    monkeypatch.setattr(shutil, "which", lambda name: bwrap if name == "bwrap" else name)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr("proxytune.sandbox.sandbox.closed_folder", lambda python, *, isolated: closed)
    with pytest.raises(UserError, match="no sandbox works here") as raised:
        Sandbox.open("auto", sys.executable)
    assert ("install bubblewrap" in str(raised.value)) == (bwrap is None)
    assert ("say --sandbox weak: a process" in str(raised.value)) == (closed is None)


def test_only_what_lies_deeper_in_a_scratch_folder_is_held() -> None:
    view = View({}, {"/opt/py": "/opt/py", "/tmp/a/b/venv": "/x", "/tmp/a/c": "/y", "/tmp/d": "/z"})
    assert view.holders() == ["/tmp/a"]
    assert View({}, {"/tmpfoo/a/b": "/x", "/dev/shm/a/b": "/y"}).holders() == ["/dev/shm/a"]


def test_folders_are_shown_once_under_each_name(tmp_path: Path) -> None:
    (tmp_path / "real" / "venv").mkdir(parents=True)
    (tmp_path / "alias").symlink_to(tmp_path / "real")
    folders = (str(tmp_path / "alias"), str(tmp_path / "real" / "venv"), str(tmp_path / "real"))
    shown = visible(Interpreter("python", folders, (), "/usr/lib")).read_only
    mine = {path: real for path, real in shown.items() if path.startswith(str(tmp_path))}
    assert mine == dict.fromkeys((str(tmp_path / "alias"), str(tmp_path / "real")), str(tmp_path / "real"))
