"""What runs inside a sandbox: programs, one forked process each, and a report of how they ended.

sandbox.py starts this file with a bare interpreter (`python -s -S`): standard library only, Python 3.7 or
newer (DS-1000 pins 3.7). The request is the first line of stdin, JSON. Then stdin stays open: when it ends,
so does everything here. Reports go to stdout, a line per job, after the secret of the request. Where this is
process 1 of its own namespace, everything that a job left running or wrote is gone before the next begins.
Nothing here isolates anything by itself; see sandbox.py for what does.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import resource
import select
import signal
import sys
import time
import types
from typing import Any

NOBODY = 65534
SCRATCH = ("/tmp", "/dev/shm")


def main() -> None:
    """Read the request, then run its jobs in order and report each."""
    request = json.loads(sys.stdin.buffer.readline())
    channel = os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    close_off(request["user"])
    sys.path[:] = sys.path[1:] + request["path"]  # the first is the folder of this file
    for name in request["imports"]:
        try_import(name)
    secret = request["secret"].encode()
    send(channel, secret, {"ready": True})
    for fd in (1, 2):  # until here sandbox.py read from them why there was no start
        os.dup2(null, fd)
    for number, job in enumerate(request["jobs"]):
        if number:
            clean_up()
        write_files(job["files"])
        endings = [run(program, request["limits"], null, channel) for program in job["programs"]]
        report = {"results": [result for result, _ in endings], "seconds": [took for _, took in endings]}
        send(channel, secret, dict(report, files=collect(job["collect"], request["collect_bytes"])))


def send(channel: int, secret: bytes, content: Any) -> None:
    """One line of the report."""
    line, sent = b"\n" + secret + json.dumps(content).encode() + b"\n", 0
    while sent < len(line):
        sent += os.write(channel, line[sent:])


def close_off(user: int) -> None:
    """Give up root for good (groups first), and let no process of the same user look into this one: the
    kernel sees to that when a user is changed; otherwise it is asked."""
    if user:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(user, user, user)
    else:
        import ctypes

        ctypes.CDLL(None).prctl(4, 0, 0, 0, 0)  # PR_SET_DUMPABLE


def clean_up() -> None:
    """Kill and delete what the last job left, where all that can be seen is ours."""
    if os.getpid() != 1:
        return
    import shutil  # costs more than a short program

    try:
        os.kill(-1, signal.SIGKILL)
        while os.waitpid(-1, 0)[0]:
            pass
    except (ChildProcessError, ProcessLookupError):
        pass
    for folder in SCRATCH:
        for entry in os.scandir(folder):
            if is_mount(entry.path):
                continue  # the interpreter, where it lies here
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path, ignore_errors=True)
            else:
                os.unlink(entry.path)


def is_mount(path: str) -> bool:
    """Whether another file system begins here; not, if a program took it away."""
    try:
        return os.lstat(path).st_dev != os.lstat(os.path.dirname(path)).st_dev
    except FileNotFoundError:
        return False


def write_files(files: dict[str, str]) -> None:
    """Put the given files below the working directory; a name that ends in / is a folder."""
    for name, content in files.items():
        os.makedirs(os.path.dirname(name) or ".", exist_ok=True)
        if not name.endswith("/"):
            with open(name, "wb") as file:
                file.write(base64.b64decode(content))


def try_import(name: str) -> None:
    """Load a module before forking, so that programs need not; one that fails will fail in them."""
    with contextlib.suppress(BaseException):
        __import__(name)


def run(program: dict[str, Any], limits: dict[str, int], null: int, channel: int) -> tuple[str, float]:
    """Run one program in a child: `passed`, `timed out` or `failed: ...`, and how long it took.

    `passed` means that the last line was reached: an exit, whatever its code, is not enough.
    """
    read, write = os.pipe()
    token = base64.b64encode(os.urandom(18))
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        os.close(read)
        os.close(channel)
        os.dup2(null, 0)
        result = execute(program, limits)
        os.write(write, token + result.encode("utf-8", "replace")[:400])
        os._exit(0)
    os.close(write)
    try:
        heard = wait(read, child, program["seconds"])
    finally:
        os.close(read)
        end(child)
    took = time.monotonic() - began
    if heard is None:
        return "timed out", took
    if not heard.startswith(token):
        return "failed: it ended itself before its last line", took
    return heard[len(token) :].decode("utf-8", "replace"), took


def execute(program: dict[str, Any], limits: dict[str, int]) -> str:
    """In the child: limits, then the program's text."""
    limit(limits, program["seconds"])
    module = types.ModuleType("__main__")
    names: dict[str, Any] = {}
    if program["main"]:
        sys.modules["__main__"], names = module, module.__dict__
    sys.argv = ["program.py", *program["argv"]]
    try:
        exec(compile(program["code"], "program.py", "exec"), names)
    except BaseException as error:
        try:
            return f"failed: {type(error).__name__}: {error}"
        except BaseException:
            return "failed: with an error that cannot be shown"
    return "passed"


def limit(limits: dict[str, int], seconds: float) -> None:
    """Hard limits that the program's own children inherit."""
    cpu = int(seconds * 2) + 5
    wanted = {
        resource.RLIMIT_AS: limits["memory"],
        resource.RLIMIT_FSIZE: limits["file_bytes"],
        resource.RLIMIT_NPROC: limits["processes"],
        resource.RLIMIT_NOFILE: limits["open_files"],
        resource.RLIMIT_CPU: cpu,
        resource.RLIMIT_CORE: 0,
    }
    for kind, value in wanted.items():
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a full file is an OSError


def wait(read: int, child: int, seconds: float) -> bytes | None:
    """What the child wrote: b"" if it died silently, None if it took too long. The end of stdin ends all."""
    deadline, written = time.monotonic() + seconds, b""
    while True:
        left = deadline - time.monotonic()
        if left <= 0:
            return None
        # a grandchild may hold the pipe open: look after the child itself, too
        ready = select.select([read, 0], [], [], min(left, 0.2))[0]
        if 0 in ready:
            end(child)
            os._exit(3)
        if read in ready:
            piece = os.read(read, 4096)
            written += piece
            if not piece or len(written) > 24:
                return written
        elif os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return written


def end(child: int) -> None:
    """Kill the child and pick up whatever has ended (orphans come here where this is process 1)."""
    try:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except (ChildProcessError, ProcessLookupError):
        pass


def collect(patterns: list[str], most: int) -> dict[str, str]:
    """The regular files below the working directory that match, as base64, as long as they fit."""
    import fnmatch

    found: dict[str, str] = {}
    for folder, inner, names in os.walk(".") if patterns else ():
        inner[:] = [name for name in inner if not is_mount(os.path.join(folder, name))]
        for name in names:
            path = os.path.join(folder, name)[2:]
            if not any(fnmatch.fnmatch(path, pattern) for pattern in patterns):
                continue
            try:
                fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
                with os.fdopen(fd, "rb") as file:
                    content = file.read(most + 1)
            except OSError:
                continue
            most -= len(content)
            if most >= 0:
                found[path] = base64.b64encode(content).decode()
    return found


if __name__ == "__main__":
    main()
