"""What a sandbox is made of: the interpreter, what of the host's files it sees, its environment, and the
command lines of the backends. sandbox.py describes what they promise."""

from __future__ import annotations

import functools
import json
import os
import secrets
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from proxytune.errors import UserError

MIB = 1 << 20
SHM_BYTES = 64 * MIB
MARK = "PROXYTUNE_SANDBOX"
"""The variable by which `weak` finds what a job left running."""
NOBODY = 65534
FIRST_USER = 1 << 30
BARE = ("-s", "-S")
"""No site-packages; unlike -I it lets the environment, which is all ours, fix the seed of hashes."""
HASH_SEED = "1"
"""The order of a set of texts decides whether some samples pass, so it must not change from run to run. Of
the 13,120 published samples here one is known to hang on it (HumanEval/158 in llama2-13B: `max(set(words),
key=len)` passes at 2 of 30 seeds, 0 among them); at this seed it fails, as it is stored."""

_HERE = Path(__file__).parent
_WORKER = _HERE / "worker.py"
_INSIDE = "/proxytune_worker.py"
_SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32")
_ETC = ("/etc/ld.so.cache", "/etc/alternatives", "/etc/localtime", "/etc/fonts")


@dataclass(frozen=True)
class Interpreter:
    """The Python that runs programs, and the folders that it needs."""

    executable: str
    folders: tuple[str, ...]
    packages: tuple[str, ...]

    @classmethod
    @functools.cache
    def find(cls, executable: str) -> Interpreter:
        """Ask an interpreter where it lives; UserError if it is none."""
        ask = (
            "import json, sys, sysconfig; p = sysconfig.get_paths(); "
            "print(json.dumps([[sys.prefix, sys.base_prefix], sorted({p['purelib'], p['platlib']})]))"
        )
        try:
            command = [executable, "-I", "-c", ask]
            printed = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
            prefixes, packages = json.loads(printed)
        except (OSError, subprocess.SubprocessError, ValueError) as error:
            raise UserError(f"'{executable}' is no Python interpreter that starts: {error}") from None
        own = (path for path in prefixes if not path.startswith("/usr") and path != "/")
        return cls(executable, tuple(dict.fromkeys(own)), tuple(packages))


def fresh_user() -> int:
    """As root: a user that nobody else is, so that the limit on processes counts one sandbox alone and no
    sandbox can signal another; nobody where our own namespace has no such users. 0 without root."""
    if os.geteuid() != 0:
        return 0
    wanted = FIRST_USER + secrets.randbelow(FIRST_USER)
    ranges = [line.split() for line in Path("/proc/self/uid_map").read_text().splitlines()]
    known = any(int(first) <= wanted < int(first) + int(count) for first, _, count in ranges)
    return wanted if known else NOBODY


def environment(folder: str, mark: str) -> dict[str, str]:
    """All that a sandboxed process knows of the environment."""
    threads = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL")}
    quiet = {
        "CUDA_VISIBLE_DEVICES": "-1",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "MPLBACKEND": "Agg",
        "PYTHONHASHSEED": HASH_SEED,
    }
    own = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "HOME": folder, "TMPDIR": folder, MARK: mark}
    return {**own, **threads, **quiet}


def visible(python: Interpreter) -> tuple[dict[str, str], dict[str, str]]:
    """What of the host's file system is there inside: links, and path -> path inside, read-only."""
    links = {path: os.readlink(path) for path in _SYSTEM if os.path.islink(path)}
    folders = [path for path in _SYSTEM if os.path.isdir(path) and path not in links]
    paths = [*folders, *(path for path in _ETC if os.path.exists(path)), *python.folders]
    return links, {**{os.path.realpath(path): path for path in paths}, str(_WORKER): _INSIDE}


@functools.cache
def _bubblewrap_options() -> str:
    """What this bwrap can do."""
    return subprocess.run(["bwrap", "--help"], capture_output=True, text=True, timeout=60).stdout


def bubblewrap(python: Interpreter, tmp_bytes: int) -> list[str]:
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
    command += ["--die-with-parent", "--as-pid-1"]
    if os.geteuid() == 0:
        command += ["--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    else:
        command += ["--unshare-user", "--uid", str(NOBODY), "--gid", str(NOBODY)]
        command += ["--disable-userns"] if "--disable-userns" in known else []
    links, read_only = visible(python)
    for path, target in links.items():
        command += ["--symlink", target, path]
    parents = {
        str(parent): None for inside in read_only.values() for parent in reversed(Path(inside).parents)
    }
    for parent in parents:
        if parent != "/" and parent not in read_only:
            command += ["--perms", "0755", "--dir", parent]
    for path, inside in read_only.items():
        command += ["--ro-bind", path, inside]
    command += ["--proc", "/proc", "--dev", "/dev", "--perms", "1777", *shared, "--tmpfs", "/dev/shm"]
    command += ["--perms", "1777", *sized, "--tmpfs", "/tmp", "--remount-ro", "/dev", "--remount-ro", "/"]
    return [*command, "--chdir", "/tmp", "--", python.executable, *BARE, _INSIDE]


def reachable(python: Interpreter) -> bool:
    """Whether every user can get at the interpreter and its library."""
    real = Path(python.executable).resolve()
    paths = [Path(python.executable).absolute(), real, *map(Path, python.folders), _WORKER.resolve()]
    folders = {parent for path in paths for parent in path.parents}
    return all(folder.stat().st_mode & 0o001 for folder in folders)


def weak(python: Interpreter) -> list[str]:
    """The worker as it is."""
    return [python.executable, *BARE, str(_WORKER)]


def namespaces(python: Interpreter, tmp_bytes: int) -> list[str]:
    """Our launcher, in proxytune's own interpreter; only the worker runs in the one that was asked for."""
    links, read_only = visible(python)
    layout = {
        "python": python.executable,
        "worker_inside": _INSIDE,
        "links": links,
        "read_only": read_only,
        "tmp_bytes": tmp_bytes,
        "shm_bytes": SHM_BYTES,
    }
    return [sys.executable, "-I", "-S", str(_HERE / "namespaces.py"), json.dumps(layout)]
