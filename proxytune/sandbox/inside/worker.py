"""What runs inside a sandbox: programs, each in a forked process of its own, and a report of how they ended.

sandbox.py starts it with a bare interpreter (`python -s -S`). stdin brings a header (its length in 16
digits, then JSON) and after it the texts, one after the other. A text is read by the process that runs it
and by no other: neither this process nor one forked from it ever holds what a check expects or what another
program says. Then stdin stays open: when it ends, so does everything here. Reports go to stdout, a line per
job, after the secret of the header. Everything that a job left running or wrote is gone before the next
begins. Nothing here isolates anything by itself; see sandbox.py for what does.

A program with a check is judged from outside: the check runs in a second process and calls the program's
functions (calls.py). One without a check passes when it reaches its last line.
"""

from __future__ import annotations

import _socket
import base64
import contextlib
import ctypes
import json
import os
import resource
import select
import signal
import struct
import sys
import time
import types
from collections.abc import Callable
from typing import Any

from proxytune.sandbox.inside import calls, seccomp
from proxytune.sandbox.inside.files import collect, empty, write_files
from proxytune.sandbox.inside.plain import NOT_APART, NotPlain
from proxytune.sandbox.inside.processes import SCRATCH, kill_others, memory_used, reap, refused, too_much

NOBODY = 65534
DUMPABLE, CAPBSET_READ, CAPBSET_DROP, SUBREAPER, NO_NEW_PRIVS, SECCOMP = 4, 23, 24, 36, 38, 22
CAP_LAST = 63
CREDENTIALS = struct.Struct("3i")


def main() -> None:
    """Read the header, then run its jobs in order and report each."""
    header = json.loads(calls.read_exactly(0, int(calls.read_exactly(0, 16))))
    channel, null = os.dup(1), os.open(os.devnull, os.O_RDWR)
    close_off(header["user"], header["weak"])
    sys.path[:] = sys.path[1:] + header["path"]  # the first is the folder of this file
    for name in header["imports"]:
        try_import(name)
    secret = header["secret"].encode()
    send(channel, secret, {"ready": True})
    for fd in (1, 2):  # until here sandbox.py read from them why there was no start
        os.dup2(null, fd)
    try:
        for number, job in enumerate(header["jobs"]):
            if number and not clean_up():
                send(channel, secret, {"spoiled": True})
                break
            if job["files_bytes"]:
                put_files(job["files_bytes"])
            runner = JobRunner(header, null, channel)
            endings = [runner.run(program) for program in job["programs"]]
            kill_others()  # nobody moves the files that are collected
            report = {"results": [result for result, _ in endings], "seconds": [took for _, took in endings]}
            send(channel, secret, dict(report, files=collect(job["collect"], header["collect_bytes"])))
    finally:
        kill_others()


def send(channel: int, secret: bytes, content: Any) -> None:
    """One line of the report."""
    line, sent = b"\n" + secret + json.dumps(content).encode() + b"\n", 0
    while sent < len(line):
        sent += os.write(channel, line[sent:])


def prctl(*arguments: Any) -> None:
    """prctl(2), or the OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(*arguments, *[0] * (5 - len(arguments))) != 0:
        raise OSError(ctypes.get_errno(), f"prctl {arguments[0]}: {os.strerror(ctypes.get_errno())}")


def close_off(user: int, weak: bool) -> None:
    """Give up root for good, with what could bring it back; let no process of the same user look into this
    one; and, where this is not process 1, take in orphans."""
    if user:
        for capability in range(CAP_LAST + 1):
            if ctypes.CDLL(None).prctl(CAPBSET_READ, capability, 0, 0, 0) == 1:
                prctl(CAPBSET_DROP, capability)
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(user, user, user)
    prctl(NO_NEW_PRIVS, 1)
    prctl(DUMPABLE, 0)
    if weak:
        prctl(SUBREAPER, 1)


def clean_up() -> bool:
    """Kill and delete what the last job left, where all that can be seen is ours; whether it is all gone."""
    kill_others()
    if os.getpid() != 1:
        return False
    with contextlib.suppress(OSError):
        for folder in SCRATCH:
            empty(folder)
        return True
    return False


def try_import(name: str) -> None:
    """Load a module before forking, so that programs need not; one that fails will fail in them."""
    with contextlib.suppress(BaseException):
        __import__(name)


# One program


class Child:
    """A forked process and the socket on which it is heard. The kernel says who sent a message, so nobody
    speaks for it: not a process that it forks, either."""

    def __init__(self, pid: int, socket: _socket.socket) -> None:
        self.pid, self.socket = pid, socket

    def hear(self) -> bytes | None:
        """The next message; b"" where there will be none, None where it was not its own."""
        size = _socket.CMSG_SPACE(CREDENTIALS.size)
        message, extra, _, _ = self.socket.recvmsg(4096, size)
        senders = [CREDENTIALS.unpack(data)[0] for _, kind, data in extra if kind == _socket.SCM_CREDENTIALS]
        return message if not message or senders == [self.pid] else None

    def ended(self) -> bool:
        """Whether the process is there no more."""
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def end(self) -> None:
        """Kill it and pick it up."""
        self.socket.close()
        with contextlib.suppress(ChildProcessError, ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)


def start(body: Callable[[_socket.socket], None]) -> Child:
    """Fork a process that runs this and ends."""
    here, there = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_SEQPACKET)
    here.setsockopt(_socket.SOL_SOCKET, _socket.SO_PASSCRED, 1)
    pid = os.fork()
    if pid == 0:
        try:
            here.close()
            body(there)
            os._exit(0)
        finally:
            os._exit(1)
    there.close()
    return Child(pid, here)


def put_files(size: int) -> None:
    """Read a job's files and put them in place, in a process of their own."""
    child = start(lambda _: write_files(calls.read_exactly(0, size)))
    ended = os.waitpid(child.pid, 0)[1]
    child.socket.close()
    if ended:
        raise OSError("the files of a job cannot be written")


class JobRunner:
    """Runs the programs of a job."""

    def __init__(self, header: dict[str, Any], null: int, channel: int) -> None:
        self.limits, self.weak, self.null, self.channel = header["limits"], header["weak"], null, channel
        self.events: int | None = header["events"]

    def run(self, program: dict[str, Any]) -> tuple[str, float]:
        """Run one program: `passed`, `timed out` or `failed: ...`, and how long it took."""
        kill_others()  # nothing of an earlier program is there when this one is judged
        token = base64.b64encode(os.urandom(18))
        children = []
        if not program["check_bytes"]:
            children.append(start(lambda way: self.program(way, program, token)))
            self.expect_ready(children)
        else:
            asked, answered = os.pipe(), os.pipe()
            if program["code_bytes"]:
                theirs, ours = (asked[0], answered[1]), (asked[1], answered[0])
                children.append(start(lambda way: self.served(way, program, theirs, ours)))
                self.expect_ready(children)
            close(asked[0], answered[1])
            check = start(lambda way: self.check(way, program, (asked[1], answered[0]), token))
            children.append(check)
            close(asked[1], answered[0])
            self.expect_ready(children)
        began, before = time.monotonic(), refused(self.events)
        try:
            heard = self.wait(children, began + program["seconds"])
        finally:
            for child in children:
                child.end()
            reap()
        took = time.monotonic() - began
        if refused(self.events) > before:  # whatever was heard: one of its processes was killed for it
            return too_much(self.limits["total"]), took
        if isinstance(heard, str):
            return heard, took
        if not heard.startswith(token):
            return f"failed: {calls.GONE}", took
        return heard[len(token) :].decode("utf-8", "replace"), took

    def expect_ready(self, children: list[Child]) -> None:
        """Wait until the last child has its text. It runs our own lines until then."""
        while True:
            heard = children[-1].hear()
            if heard == b"ready":
                return
            if heard == b"":
                raise EOFError("the texts would come to the wrong ones from here")

    def wait(self, children: list[Child], deadline: float) -> bytes | str:
        """What the last child said, b"" if it died silently; or, as text, what is to be said of it."""
        last, poll = children[-1], select.poll()
        poll.register(0, 0)  # only its end
        poll.register(last.socket.fileno(), select.POLLIN)
        gone = False
        while time.monotonic() < deadline:
            left = 1000 * max(0.0, deadline - time.monotonic())
            ready = dict(poll.poll(min(200.0 if self.weak else 50.0, left)))
            if 0 in ready:
                kill_others()
                os._exit(3)
            if ready:
                heard = last.hear()
                if heard is not None:
                    return heard
            elif gone:
                return b""
            else:  # a grandchild may hold the socket open; a check may wait for a program that is no more
                gone = any(child.ended() for child in children)
            if memory_used(self.limits["total"]) > self.limits["total"]:
                kill_others()
                return too_much(self.limits["total"])
        return "timed out"

    # In the children

    def program(self, way: _socket.socket, program: dict[str, Any], token: bytes) -> None:
        """Run a text that passes when it reaches its last line."""
        text = self.enter(way, program["code_bytes"], program["seconds"], ours=False)
        result = ending(lambda: run_text(text, names_for(program)))
        way.send(token + result.encode("utf-8", "replace")[:400])

    def served(
        self, way: _socket.socket, program: dict[str, Any], theirs: tuple[int, int], ours: tuple[int, int]
    ) -> None:
        """Run a text, then answer the calls of its check. It begins when the check is ready for it."""
        close(*ours)
        text = self.enter(way, program["code_bytes"], program["seconds"], ours=False)
        calls.receive(theirs[0])
        names = names_for(program)
        calls.serve(*theirs, names, ending(lambda: run_text(text, names)))

    def check(
        self, way: _socket.socket, program: dict[str, Any], pipes: tuple[int, int], token: bytes
    ) -> None:
        """Run the check of a program: it passes when that reaches its last line."""
        text = self.enter(way, program["check_bytes"], program["seconds"], ours=True)
        call = calls.Calls(*pipes)

        def judge() -> None:
            if program["code_bytes"]:
                call.begin()
            run_text(text, {"call": call})

        try:
            result = ending(judge)
        except calls.ProgramError as error:
            result = str(error)
        except NotPlain:
            result = NOT_APART
        way.send(token + result.encode("utf-8", "replace")[:400])

    def enter(self, way: _socket.socket, size: int, seconds: float, ours: bool) -> str:
        """In a child: read its text, let go of what is the worker's, take the limits."""
        text = calls.read_exactly(0, size).decode("utf-8", "surrogatepass")
        os.close(self.channel)
        if self.events is not None:
            os.close(self.events)
        os.dup2(self.null, 0)
        if not ours:
            prctl(DUMPABLE, 1)  # its memory may be counted, and it holds nothing of the worker's
            with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
                file.write("1000")  # where the machine has no memory left, it goes first
            if self.weak:
                forbid(seccomp.filter_bytes(os.getpid()))
        limit(self.limits, seconds)
        way.send(b"ready")
        return text


def ending(run: Callable[[], None]) -> str:
    """How this ends: `passed` means that it came to its last line; an exit is not enough."""
    try:
        run()
    except (calls.ProgramError, NotPlain):
        raise
    except BaseException as error:
        try:
            return f"failed: {type(error).__name__}: {error}"
        except BaseException:
            return "failed: with an error that cannot be shown"
    return "passed"


def names_for(program: dict[str, Any]) -> dict[str, Any]:
    """The names in which a program runs: those of `__main__`, or none."""
    sys.argv = ["program.py", *program["argv"]]
    if not program["main"]:
        return {}
    sys.modules["__main__"] = types.ModuleType("__main__")
    return sys.modules["__main__"].__dict__


def run_text(text: str, names: dict[str, Any]) -> None:
    """Run a text in these names."""
    exec(compile(text, "program.py", "exec"), names)


class _Filter(ctypes.Structure):
    """The kernel's sock_fprog."""

    _fields_ = [("length", ctypes.c_ushort), ("code", ctypes.c_char_p)]


def forbid(code: bytes) -> None:
    """Put a filter of system calls on this process and all that it starts."""
    prctl(SECCOMP, 2, ctypes.byref(_Filter(len(code) // 8, code)))


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


def close(*fds: int) -> None:
    """Close file descriptors."""
    for fd in fds:
        os.close(fd)
