"""The launcher of the `namespaces` backend: makes the namespaces and the small root, then becomes the
worker.

Standard library only (ctypes calls the kernel, Linux 5.12 or newer); started by sandbox.py with a bare
interpreter and the layout as JSON in its argument. Without root it makes a user namespace first. The worker
is process 1 of its own process namespace: nothing inside can kill it, and everything inside ends with it.
Manual pages: unshare(2), pivot_root(2), mount_setattr(2), capabilities(7).
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from typing import Any

NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET = (
    0x00020000, 0x02000000, 0x04000000, 0x08000000, 0x10000000, 0x20000000, 0x40000000,
)  # fmt: skip
NOSUID, NODEV, NOEXEC, BIND, REC, PRIVATE = 2, 4, 8, 4096, 16384, 1 << 18
ATTR_RDONLY, ATTR_NOSUID, ATTR_NODEV = 1, 2, 4
DETACH, AT_FDCWD, AT_RECURSIVE, MOUNT_SETATTR = 2, -100, 0x8000, 442
PDEATHSIG, CAPBSET_DROP, NO_NEW_PRIVS, SECCOMP = 1, 24, 38, 22
NEEDED = (6, 7, 8)
"""CAP_SETGID, CAP_SETUID, CAP_SETPCAP: as root, the worker changes user and then drops these, too."""
CAP_LAST = 63
NOBODY = 65534
DEVICES = ("null", "zero", "full", "random", "urandom")

libc = ctypes.CDLL(None, use_errno=True)


class Filter(ctypes.Structure):
    """The kernel's sock_fprog."""

    _fields_ = [("length", ctypes.c_ushort), ("code", ctypes.c_char_p)]


def call(name: str, *arguments: Any) -> None:
    """A libc function that returns 0, or the OSError."""
    if getattr(libc, name)(*arguments) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{name}: {os.strerror(error)}")


def mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
    """mount(2)."""
    texts = [text.encode() for text in (source, target, kind)]
    call("mount", *texts, ctypes.c_ulong(flags), data.encode() or None)


def restrict(target: str, attributes: int, *, recursive: bool) -> None:
    """Add attributes to a mount, and to all below it, without touching the ones it has."""
    wanted = (ctypes.c_uint64 * 4)(attributes, 0, 0, 0)
    flags = AT_RECURSIVE if recursive else 0
    path = target.encode()
    call("syscall", MOUNT_SETATTR, AT_FDCWD, path, flags, wanted, ctypes.c_size_t(32))


def pivot(new: str, old: str) -> None:
    """pivot_root(2)."""
    call("pivot_root", new.encode(), old.encode())


def main() -> None:
    """Leave the host's namespaces; the child is the worker, the parent waits for it."""
    layout = json.loads(sys.argv[1])
    os.umask(0o022)
    uid, gid = os.geteuid(), os.getegid()
    spaces = NEWNS | NEWPID | NEWNET | NEWIPC | NEWUTS | NEWCGROUP
    call("unshare", spaces if uid == 0 else spaces | NEWUSER)
    if uid != 0:
        for name, content in (
            ("setgroups", "deny"),
            ("uid_map", f"{NOBODY} {uid} 1"),
            ("gid_map", f"{NOBODY} {gid} 1"),
        ):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(content)
    child = os.fork()
    if child:
        os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) and 1)
    call("prctl", PDEATHSIG, 9)
    build_root(layout)
    for capability in range(CAP_LAST + 1):
        if uid != 0 or capability not in NEEDED:
            libc.prctl(CAPBSET_DROP, capability, 0, 0, 0)
    call("prctl", NO_NEW_PRIVS, 1, 0, 0, 0)
    code = bytes.fromhex(layout["filter"])
    call("prctl", SECCOMP, 2, ctypes.byref(Filter(len(code) // 8, code)), 0, 0)
    os.execv(layout["worker"][0], layout["worker"])


def build_root(layout: dict[str, Any]) -> None:
    """A root of read-only binds and private file systems, and nothing else; the host's root is let go."""
    mount("none", "/", "none", REC | PRIVATE)
    mount("tmpfs", "/tmp", "tmpfs", NOSUID | NODEV, "mode=0755,size=1m")
    os.mkdir("/tmp/old")
    pivot("/tmp", "/tmp/old")
    os.chdir("/")
    os.mkdir("/new", 0o755)
    mount("/new", "/new", "none", BIND | REC)
    for path, target in layout["links"].items():
        os.symlink(target, f"/new{path}")
    os.makedirs("/new/dev", exist_ok=True)
    for name in DEVICES:
        bind(f"/old/dev/{name}", f"/new/dev/{name}")
    os.symlink("/proc/self/fd", "/new/dev/fd")
    for path, size in layout["scratch"].items():
        memory(f"/new{path}", f"mode=1777,size={size}")
    for path, size in layout["holders"].items():
        memory(f"/new{path}", f"mode=0755,size={size}")
    for inside, path in layout["read_only"].items():
        bind(f"/old{path}", f"/new{inside}")
        restrict(f"/new{inside}", ATTR_RDONLY | ATTR_NOSUID | ATTR_NODEV, recursive=True)
    for path in layout["holders"]:
        restrict(f"/new{path}", ATTR_RDONLY | ATTR_NOSUID | ATTR_NODEV, recursive=False)
    os.mkdir("/new/proc")
    mount("proc", "/new/proc", "proc", NOSUID | NODEV | NOEXEC)
    os.chdir("/new")
    pivot(".", ".")
    call("umount2", b".", DETACH)
    restrict("/", ATTR_RDONLY | ATTR_NOSUID | ATTR_NODEV, recursive=False)
    os.chdir("/tmp")


def memory(target: str, data: str) -> None:
    """A private file system in memory."""
    os.makedirs(target, exist_ok=True)
    mount("tmpfs", target, "tmpfs", NOSUID | NODEV, data)


def bind(source: str, target: str) -> None:
    """Bind a file or a folder to the same kind of thing, made for it."""
    os.makedirs(target if os.path.isdir(source) else os.path.dirname(target), mode=0o755, exist_ok=True)
    if not os.path.isdir(source):
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o644))
    mount(source, target, "none", BIND | REC)


if __name__ == "__main__":
    main()
