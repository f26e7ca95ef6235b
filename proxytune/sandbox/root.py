"""What a sandbox is made of: the interpreter, what of the host's files it sees, its environment, and the
command lines of the backends. sandbox.py describes what they promise."""

from __future__ import annotations

import functools
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from proxytune.errors import UserError
from proxytune.sandbox.inside.processes import SCRATCH
from proxytune.sandbox.inside.seccomp import filter_bytes

MIB = 1 << 20
SHM_BYTES = 64 * MIB
NOBODY = 65534
FIRST_USER = 1 << 30
BARE = ("-s", "-S")
"""No site-packages; unlike -I it lets the environment, which is all ours, fix the seed of hashes."""
HASH_SEED = "1"
"""The order of a set of texts decides whether some samples pass, so it must not change from run to run. Of
the 13,120 published samples here one is known to hang on it (HumanEval/158 in llama2-13B: `max(set(words),
key=len)` passes at 2 of 30 seeds, 0 among them); at this seed it fails, as it is stored."""

_HERE = Path(__file__).parent
INSIDE = _HERE / "inside"
"""The folder of ours that is there inside."""
_PLACE = "proxytune/sandbox/inside"
_ROOM = "/proxytune-inside"
_START = "import sys; sys.path[0] = {!r}; from proxytune.sandbox.inside.worker import main; main()"
_SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32")
_ETC = ("/etc/ld.so.cache", "/etc/alternatives", "/etc/localtime", "/etc/fonts")
_BELOW_SCRATCH = tuple(f"{folder}/" for folder in SCRATCH)
HOLDER_BYTES = MIB


@dataclass(frozen=True)
class Interpreter:
    """The Python that runs programs, and the folders that it needs."""

    executable: str
    folders: tuple[str, ...]
    packages: tuple[str, ...]
    library: str

    @classmethod
    @functools.cache
    def find(cls, executable: str) -> Interpreter:
        """Ask an interpreter where it lives; UserError if it is none."""
        ask = (
            "import json, sys, sysconfig; p = sysconfig.get_paths(); print(json.dumps("
            "[[sys.prefix, sys.base_prefix], sorted({p['purelib'], p['platlib']}), p['stdlib']]))"
        )
        try:
            command = [executable, "-I", "-c", ask]
            printed = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
            prefixes, packages, library = json.loads(printed)
        except (OSError, subprocess.SubprocessError, ValueError) as error:
            way = (*_above(executable), *_above(os.path.realpath(executable)))
            closed = next((at for at in way if at.exists() and not os.access(at, os.X_OK)), None)
            reason = error if closed is None else f"'{closed}' is closed to this user"
            raise UserError(f"'{executable}' is no Python interpreter that starts: {reason}") from None
        own = [path for path in prefixes if not Path(path).is_relative_to("/usr") and path != "/"]
        return cls(_hop_into(executable, own), tuple(dict.fromkeys(own)), tuple(packages), library)


def _above(path: str) -> list[Path]:
    """The folders on the way to a path, from the root."""
    return list(reversed(Path(path).parents))


def _hop_into(executable: str, folders: Sequence[str]) -> str:
    """The first of the links that lead to an interpreter which is seen inside (~/bin/python may be one that
    is not)."""
    hop = executable
    while not any(Path(hop).is_relative_to(folder) for folder in (*folders, *_SYSTEM)):
        if not os.path.islink(hop):
            return executable
        hop = os.path.normpath(os.path.join(os.path.dirname(hop), os.readlink(hop)))
    return hop


def fresh_user() -> int:
    """As root: a user that nobody else is, so that the limit on processes counts one sandbox alone and no
    sandbox can signal another; nobody where our own namespace has no such users. 0 without root."""
    if os.geteuid() != 0:
        return 0
    wanted = FIRST_USER + secrets.randbelow(FIRST_USER)
    ranges = [line.split() for line in Path("/proc/self/uid_map").read_text().splitlines()]
    known = any(int(first) <= wanted < int(first) + int(count) for first, _, count in ranges)
    return wanted if known else NOBODY


def environment(folder: str) -> dict[str, str]:
    """All that a sandboxed process knows of the environment."""
    threads = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL")}
    quiet = {
        "CUDA_VISIBLE_DEVICES": "-1",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "MPLBACKEND": "Agg",
        "PYTHONHASHSEED": HASH_SEED,
    }
    own = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "HOME": folder, "TMPDIR": folder}
    return {**own, **threads, **quiet}


@dataclass(frozen=True)
class View:
    """What of the host's file system is there inside."""

    links: Mapping[str, str]
    """Link -> its target."""
    read_only: Mapping[str, str]
    """Path inside -> the host's path, outer ones first."""

    def holders(self) -> list[str]:
        """Folders in a `SCRATCH` that hold an interpreter deeper in. Each is a file system of its own, made
        read-only, so that a job can neither rename what is above the interpreter nor replace it."""
        below = [Path(path) for path in self.read_only if path.startswith(_BELOW_SCRATCH)]
        tops = {str(_top(path)): None for path in below if str(_top(path)) not in self.read_only}
        return list(tops)


def _top(path: Path) -> Path:
    """The part of a path below a `SCRATCH` that lies in the scratch folder itself."""
    return next(at for at in (path, *path.parents) if str(at.parent) in SCRATCH)


def visible(python: Interpreter) -> View:
    """The system's libraries, the interpreter under its own name and its real one, and the worker."""
    links = {path: os.readlink(path) for path in _SYSTEM if os.path.islink(path)}
    paths = [path for path in _SYSTEM if os.path.isdir(path) and path not in links]
    paths += [path for path in _ETC if os.path.exists(path)]
    paths += [name for folder in python.folders for name in (folder, os.path.realpath(folder))]
    outer = [path for path in sorted(paths) if not any(str(parent) in paths for parent in Path(path).parents)]
    real = {path: os.path.realpath(path) for path in outer}
    return View(links, {**real, f"{_ROOM}/{_PLACE}": str(INSIDE.resolve())})


def too_wide(python: Interpreter) -> str | None:
    """A folder of the interpreter that holds a home or a temporary folder, which would all be seen inside."""
    private = {
        os.path.realpath(path)
        for path in (os.path.expanduser("~"), tempfile.gettempdir(), "/tmp", "/var/tmp")
    }
    for folder in python.folders:
        if any(Path(path).is_relative_to(os.path.realpath(folder)) for path in private):
            return folder
    return None


@functools.cache
def _bubblewrap_options() -> str:
    """What this bwrap can do."""
    return subprocess.run(["bwrap", "--help"], capture_output=True, text=True, timeout=60).stdout


def worker(python: Interpreter, room: str = _ROOM) -> list[str]:
    """The command line of the worker, whose files lie in this folder."""
    return [python.executable, *BARE, "-c", _START.format(room)]


def bubblewrap(python: Interpreter, tmp_bytes: int, filter_fd: int) -> list[str]:
    """bwrap with its options. As root there is no user namespace: the worker changes user, so that the
    limit on processes counts (it never does for root)."""
    known = _bubblewrap_options()
    sized = ["--size", str(tmp_bytes)] if "--size" in known else []
    shared = ["--size", str(SHM_BYTES)] if "--size" in known else []
    command = [
        "bwrap",
        "--unshare-pid",
        "--unshare-net",
        "--unshare-ipc",
        "--unshare-uts",
        "--unshare-cgroup-try",
    ]
    command += ["--die-with-parent", "--as-pid-1", "--seccomp", str(filter_fd)]
    if os.geteuid() == 0:
        command += ["--cap-drop", "ALL"]
        for needed in ("CAP_SETUID", "CAP_SETGID", "CAP_SETPCAP"):  # to change user, and to drop these, too
            command += ["--cap-add", needed]
    else:
        command += ["--unshare-user", "--uid", str(NOBODY), "--gid", str(NOBODY)]
        command += ["--disable-userns"] if "--disable-userns" in known else []
    view = visible(python)
    for path, target in view.links.items():
        command += ["--symlink", target, path]
    hidden = {path: real for path, real in view.read_only.items() if path.startswith(_BELOW_SCRATCH)}
    command += _binds({path: real for path, real in view.read_only.items() if path not in hidden}, ())
    command += ["--proc", "/proc", "--dev", "/dev", "--perms", "1777", *shared, "--tmpfs", "/dev/shm"]
    command += ["--perms", "1777", *sized, "--tmpfs", "/tmp"]
    holders, small = view.holders(), ["--size", str(HOLDER_BYTES)] if sized else []
    for holder in holders:
        command += ["--perms", "0755", *small, "--tmpfs", holder]
    command += _binds(hidden, (*SCRATCH, *holders))
    for path in (*holders, "/dev", "/"):
        command += ["--remount-ro", path]
    return [*command, "--chdir", "/tmp", "--", *worker(python)]


def _binds(read_only: Mapping[str, str], there: Sequence[str]) -> list[str]:
    """bwrap's options for binds and the folders above them that are not there yet."""
    parents = {str(parent): None for path in read_only for parent in _above(path)}
    options = []
    for parent in parents:
        if parent not in ("/", "/dev", *there) and parent not in read_only:
            options += ["--perms", "0755", "--dir", parent]
    for path, real in read_only.items():
        options += ["--ro-bind", real, path]
    return options


def closed_folder(python: Interpreter, *, isolated: bool) -> Path | None:
    """The first folder on the way to the interpreter, its library or its packages that a user without rights
    cannot enter, or None. An isolating backend makes the folders above those that it shows anew."""
    shown = {os.path.realpath(folder) for folder in python.folders}
    paths = [python.library, *python.packages, os.path.realpath(python.executable)]
    if not isolated:
        paths.append(os.path.abspath(python.executable))
    for path in paths:
        for folder in (*_above(path), *([Path(path)] if os.path.isdir(path) else [])):
            above = isolated and not any(folder.resolve().is_relative_to(own) for own in shown)
            if not above and folder.exists() and not folder.stat().st_mode & 0o001:
                return folder
    return None


def weak(python: Interpreter, folder: str) -> list[str]:
    """The worker as it is, with a copy of its files: whoever it runs as need not be able to read ours."""
    room = os.path.join(folder, "room")
    shutil.copytree(INSIDE, os.path.join(room, _PLACE), ignore=shutil.ignore_patterns("__pycache__"))
    for at, _, names in os.walk(room):
        for path in (at, *(os.path.join(at, name) for name in names)):
            os.chmod(path, 0o755)
    return worker(python, room)


def namespaces(python: Interpreter, tmp_bytes: int) -> list[str]:
    """Our launcher, in proxytune's own interpreter; only the worker runs in the one that was asked for."""
    view = visible(python)
    layout = {
        "worker": worker(python),
        "filter": filter_bytes().hex(),
        "links": dict(view.links),
        "read_only": dict(view.read_only),
        "scratch": {"/tmp": tmp_bytes, "/dev/shm": SHM_BYTES},
        "holders": dict.fromkeys(view.holders(), HOLDER_BYTES),
    }
    return [sys.executable, "-I", "-S", str(_HERE / "namespaces.py"), json.dumps(layout)]
