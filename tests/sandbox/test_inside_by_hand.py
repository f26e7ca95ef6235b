"""What works inside a sandbox, run outside of one: the filter's decisions, files, processes, and calls."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import signal
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from proxytune.sandbox.inside import calls, files, plain, processes, seccomp, worker
from proxytune.sandbox.inside.calls import Calls, ProgramError
from proxytune.sandbox.inside.plain import Foreign, dumps, loads

# The filter

SAME_EVERYWHERE = "425 426 427 428 429 430 431 432 433 438 440 442 443 447 467"
"""From 424 on the machines number calls alike."""
REFUSED = {
    machine: {int(number) for number in f"{own} {SAME_EVERYWHERE}".split()}
    for machine, own in {
        "x86_64": (
            "29 30 31 64 65 66 68 69 70 71 101 103 153 154 155 159 161 163 164 165 166 167 168 "
            "169 170 171 172 173 175 176 179 212 220 227 240 241 246 248 249 250 256 279 298 300 "
            "303 304 305 308 310 311 312 313 319 320 321 323"
        ),
        "aarch64": (
            "18 39 40 41 51 58 60 89 104 105 106 112 116 117 142 161 162 170 171 180 181 186 187 "
            "188 189 190 191 192 193 194 195 196 217 218 219 224 225 238 239 241 262 264 265 266 "
            "268 270 271 272 273 279 280 282 294"
        ),
    }.items()
}
"""By the kernel's unistd.h of each machine, in ascending order."""
NAMED = {
    "x86_64": {
        "unshare": 272,
        "clone": 56,
        "socket": 41,
        "ioctl": 16,
        "fcntl": 72,
        "kill": 62,
        "tgkill": 234,
        "prlimit64": 302,
    },
    "aarch64": {
        "unshare": 97,
        "clone": 220,
        "socket": 198,
        "ioctl": 29,
        "fcntl": 25,
        "kill": 129,
        "tgkill": 131,
        "prlimit64": 261,
    },
}
SIGNALS = {"x86_64": {200, 129, 297, 424}, "aarch64": {130, 138, 240, 424}}
AUDIT = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
ALLOWED, EPERM, ENOSYS = 0x7FFF0000, 0x00050001, 0x00050026


def decided(code: bytes, audit: int, number: int, *arguments: int) -> int:
    """What a filter of classic BPF returns for a call."""
    words = {0: number, 4: audit} | {16 + 8 * at: value for at, value in enumerate(arguments)}
    at = value = 0
    while True:
        operation, then, otherwise, operand = struct.unpack_from("=HBBI", code, 8 * at)
        at += 1
        if operation == 0x20:
            value = words.get(operand, 0)
        elif operation == 0x06:
            return int(operand)
        else:
            met = {0x15: value == operand, 0x35: value >= operand, 0x45: bool(value & operand)}[operation]
            at += then if met else otherwise


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_which_calls_are_refused(machine: str) -> None:
    code, own = seccomp.filter_bytes(machine=machine), seccomp.filter_bytes(77, machine)
    audit, named = AUDIT[machine], NAMED[machine]
    numbers = {*range(600)} - {*named.values()}
    assert {n for n in numbers if decided(code, audit, n) == EPERM} == REFUSED[machine]
    assert {n for n in numbers if decided(own, audit, n) == EPERM} == REFUSED[machine] | SIGNALS[machine]
    for one in (code, own):
        assert {n for n in numbers if decided(one, audit, n) == ENOSYS} == {435}
        assert decided(one, audit + 1, 1) == ENOSYS, "another machine's numbers mean other calls"
        x32 = [decided(one, audit, number) for number in (0x3FFFFFFF, 0x40000000, 0x40000001)]
        assert x32 == [ALLOWED, *[ENOSYS if machine == "x86_64" else ALLOWED] * 2]


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_which_calls_are_refused_by_their_arguments(machine: str) -> None:
    audit, named = AUDIT[machine], NAMED[machine]
    code, own = seccomp.filter_bytes(machine=machine), seccomp.filter_bytes(77, machine)

    def allowed(one: bytes, name: str, *arguments: int) -> bool:
        found = decided(one, audit, named[name], *arguments)
        assert found in (ALLOWED, EPERM)
        return found == ALLOWED

    spaces = [0x00020000, 0x02000000, 0x04000000, 0x08000000, 0x10000000, 0x20000000, 0x40000000]
    for one in (code, own):
        for name in ("unshare", "clone"):
            assert allowed(one, name, 0x00010F11) and allowed(one, name, 0x00200000)
            assert not any(allowed(one, name, space | 17) for space in spaces)
        assert [allowed(one, "ioctl", 0, which) for which in (0x5411, 0x5412, 0x541C, 0x541D)] == [
            True, False, False, True,
        ]  # fmt: skip
    assert [n for n in range(50) if allowed(code, "socket", n)] == [1, 2, 10, 16]
    assert not any(allowed(own, "socket", n) for n in range(50))
    assert [allowed(one, "ioctl", 0, which) for one in (code, own) for which in (0x8901, 0x8902)] == [
        True, True, False, False,
    ]  # fmt: skip
    assert all(allowed(code, "fcntl", 3, n) for n in range(20))
    assert [n for n in range(20) if not allowed(own, "fcntl", 3, n)] == [8, 10, 15]
    for name in ("kill", "tgkill"):
        assert allowed(code, name, 1) and [n for n in range(99) if allowed(own, name, n)] == [77]
    assert [n for n in range(99) if allowed(own, "prlimit64", n)] == [0, 77] and allowed(code, "prlimit64", 5)


def test_machines_without_a_filter() -> None:
    assert seccomp.missing("x86_64") == seccomp.missing("aarch64") == ""
    assert seccomp.missing("riscv64") == "no filter of system calls for 'riscv64' (only x86_64, aarch64)"


# Files


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_files_are_put_where_they_are_named(here: Path) -> None:
    packed = {"a": b"1", "b/c/d": b"\x00\xff", "e/": b"ignored", "f/g/": b""}
    files.write_files(
        json.dumps({name: base64.b64encode(text).decode() for name, text in packed.items()}).encode()
    )
    assert (here / "a").read_bytes() == b"1" and (here / "b" / "c" / "d").read_bytes() == b"\x00\xff"
    assert (here / "e").is_dir() and (here / "f" / "g").is_dir() and not [*(here / "e").iterdir()]


def test_files_come_back_as_long_as_they_fit(here: Path) -> None:
    (here / "out").mkdir()
    for name, size in (("out/a", 3), ("out/b", 4), ("x.cfg", 2), ("other", 1)):
        (here / name).write_bytes(b"z" * size)
    (here / "out" / "link").symlink_to(here / "other")
    os.mkfifo(here / "out" / "pipe")

    def found(patterns: list[str], most: int) -> dict[str, int]:
        return {name: len(base64.b64decode(text)) for name, text in files.collect(patterns, most).items()}

    whole = found(["out/*", "*.cfg"], 9)
    assert {name: size for name, size in whole.items() if size} == {"out/a": 3, "out/b": 4, "x.cfg": 2}
    assert "out/link" not in whole and found([], 100) == {} and found(["none"], 100) == {}
    assert sum(found(["out/*", "*.cfg"], 8).values()) < 9 and found(["x.cfg"], 1) == {}
    assert found(["x.cfg"], 2) == {"x.cfg": 2}


def test_a_folder_is_emptied_whatever_is_in_it(tmp_path: Path) -> None:
    kept, folder = tmp_path / "kept", tmp_path / "folder"
    (folder / "a" / "b" / "c").mkdir(parents=True)
    kept.mkdir()
    (kept / "file").write_text("x")
    (folder / "a" / "b" / "file").write_text("x")
    (folder / "file").write_text("x")
    (folder / "link").symlink_to(kept)
    (folder / "a" / "link").symlink_to(kept)
    (folder / "a" / "b").chmod(0)
    files.empty(str(folder))
    assert [*folder.iterdir()] == [] and (kept / "file").read_text() == "x"
    assert files.is_mount("/proc") and not files.is_mount(str(kept)) and not files.is_mount("/nowhere/x")


# Processes


def test_what_descends_from_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    parents = {1: 0, 5: 1, 6: 5, 7: 6, 8: 1, 9: 7, 10: 99}
    monkeypatch.setattr(processes, "_parents", lambda: parents)
    assert processes.descendants(5) == [6, 7, 9] and processes.descendants(9) == []
    monkeypatch.setattr(os, "getpid", lambda: 5)
    assert processes.others() == [6, 7, 9]
    monkeypatch.setattr(os, "getpid", lambda: 1)
    assert processes.others() == [5, 6, 7, 8, 9, 10]
    monkeypatch.undo()
    assert processes._parents()[os.getpid()] == os.getppid()


def test_processes_are_stopped_before_they_are_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    passes, sent = [[3, 4], [5], []], list[tuple[int, int]]()

    def kill(pid: int, order: int) -> None:
        sent.append((pid, order))
        if pid == 4:
            raise ProcessLookupError

    monkeypatch.setattr(os, "kill", kill)
    processes.kill_all(lambda: passes.pop(0))
    stop, end = signal.SIGSTOP, signal.SIGKILL
    assert sent == [(3, stop), (4, stop), (3, end), (4, end), (5, stop), (5, end)]


def test_the_memory_of_processes_and_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shared pages are looked at only where the plain sum is over the limit."""
    monkeypatch.setattr(processes, "others", lambda: [3, 4])
    monkeypatch.setattr(processes, "_status", {3: 100, 4: 50}.__getitem__)
    monkeypatch.setattr(processes, "_share", {3: 60, 4: 30}.__getitem__)
    monkeypatch.setattr(processes, "_in_scratch", lambda: 7)
    assert processes.memory_used(157) == 157 and processes.memory_used(156) == 97
    monkeypatch.undo()
    text = "VmRSS:\t  12 kB\nVmSwap:\t 3 kB\nVmPTE:\t1 kB\nVmPeak:\t99 kB\nVmRSS:\nx\n"
    assert processes._sum(text, ("VmRSS:", "VmSwap:", "VmPTE:")) == 16 * 1024
    assert processes._sum(text, ("VmPTE:",)) == 1024 and processes._status(2**22 + 1) == 0
    assert processes._status(os.getpid()) > 1 << 20 and processes._in_scratch() == 0
    monkeypatch.setattr(os, "getpid", lambda: 1)
    room = os.statvfs_result((0, 512, 10, 4, 3, 0, 0, 0, 0, 0))
    monkeypatch.setattr(os, "statvfs", lambda folder: room)
    assert processes.SCRATCH == ("/tmp", "/dev/shm") and processes._in_scratch() == 2 * 6 * 512


# Plain data


def test_what_is_foreign_keeps_its_truth_alone() -> None:
    class Odd:
        def __bool__(self) -> bool:
            raise ValueError

    class Empty:
        def __len__(self) -> int:
            return 0

    for value, truth in ((Odd(), True), (Empty(), False), (object(), True)):
        found = loads(dumps(value))
        assert (
            isinstance(found, Foreign) and bool(found) is truth and repr(found) == f"<{type(value).__name__}>"
        )
    for number in (plain.LONG - 1, plain.LONG, -plain.LONG, 1 - plain.LONG, 255):
        assert loads(dumps(number)) == number
    assert json.loads(dumps(plain.LONG - 1)) == plain.LONG - 1 and json.loads(dumps(plain.LONG))[0] == "int"
    assert len(list(loads(dumps(iter(range(100_007)))))) == plain.MOST_ITEMS == 100_000
    assert list(loads(dumps({1: 2, 3: 4}.values()))) == [2, 4]
    with pytest.raises(ValueError, match="an object where there is none"):
        loads(b"{}")


# Calls


@pytest.fixture
def pipes() -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """Requests and answers."""
    made = os.pipe(), os.pipe()
    yield made
    for fd in (*made[0], *made[1]):
        with contextlib.suppress(OSError):
            os.close(fd)


def answered(pipes: Any, names: dict[str, Any], failure: str = "passed") -> tuple[Calls, threading.Thread]:
    """A check's end of the pipes, with a program behind them."""
    (asked, asks), (answers, answer) = pipes

    def serve() -> None:
        calls.receive(asked)  # the check is ready
        calls.serve(asked, answer, names, failure)

    thread = threading.Thread(target=serve)
    thread.start()
    return Calls(asks, answers), thread


def test_a_program_is_called_from_outside(pipes: Any) -> None:
    def change(items: list[int], table: dict[str, int], fixed: tuple[int, ...], *, by: int = 1) -> int:
        items.append(by)
        table.clear()
        table["n"] = len(items)
        return sum(items) + len(fixed)

    def grow(numbers: set[int], text: bytearray, items: list[int]) -> None:
        numbers ^= {1, 7}
        text += b"b"
        items.append(4)
        raise ValueError("at last")

    def fail(kind: str) -> None:
        own = type("Own", (Exception,), {})
        raise {"key": KeyError("k", 2), "stop": StopIteration(), "own": own("text"), "exit": SystemExit(3)}[
            kind
        ]

    check, thread = answered(pipes, {"change": change, "grow": grow, "fail": fail})
    check.begin()
    function = check("change")
    given, table = [1, 2], {"old": 1}
    assert function.__name__ == "change" and function(given, table, (7, 8), by=4) == 9
    assert given == [1, 2, 4] and table == {"n": 3}, "what it did to its arguments is done to ours"
    kept = {1, 2}, bytearray(b"a"), [3]
    with pytest.raises(ValueError, match=r"^at last$"):
        check("grow")(*kept[:2], items=kept[2])
    assert kept == ({2, 7}, bytearray(b"ab"), [3, 4]), "of every kind, by name, and before an exception"
    with pytest.raises(KeyError) as raised:
        check("fail")("key")
    assert raised.value.args == ("k", 2)
    with pytest.raises(RuntimeError, match=r"^it raised StopIteration$"):
        check("fail")("stop")
    with pytest.raises(Exception, match=r"^text$") as own:
        check("fail")("own")
    assert type(own.value).__name__ == "Own"
    with pytest.raises(SystemExit):
        check("fail")("exit")
    with pytest.raises(NameError, match="name 'none' is not defined"):
        check("none")()
    os.close(pipes[0][1])
    thread.join(10)
    assert not thread.is_alive()


@pytest.mark.parametrize(
    ("failure", "told"),
    [
        ("failed: SyntaxError: x", "failed: SyntaxError: x"),
        ("failed: " + "y" * 500, "failed: " + "y" * 392),
        ("nonsense", "failed: it ended itself before its last line"),
        (plain.NOT_APART, "failed: it ended itself before its last line"),
    ],
)
def test_how_a_program_ended_is_told_once(failure: str, told: str, pipes: Any) -> None:
    check, thread = answered(pipes, {}, failure)
    with pytest.raises(ProgramError) as raised:
        check.begin()
    assert str(raised.value) == told
    thread.join(10)


def test_messages_have_a_length(pipes: Any) -> None:
    (read, write), _ = pipes
    calls.send(write, b"ab")
    calls.send(write, b"")
    assert os.read(read, 6) == b"\x00\x00\x00\x02ab" and calls.receive(read) == b""
    os.write(write, struct.pack("!I", calls.MOST_BYTES + 1))
    with pytest.raises(EOFError):
        calls.receive(read)
    os.write(write, b"xy")
    os.close(write)
    with pytest.raises(EOFError):
        calls.read_exactly(read, 3)
    assert calls.MOST_BYTES == 256 << 20


def test_how_a_text_ends() -> None:
    def fails(error: BaseException) -> str:
        def run() -> None:
            raise error

        return worker.ending(run)

    class Odd(Exception):
        def __str__(self) -> str:
            raise ValueError

    assert worker.ending(lambda: None) == "passed"
    assert (
        fails(ValueError("x")) == "failed: ValueError: x" and fails(SystemExit(0)) == "failed: SystemExit: 0"
    )
    assert fails(Odd()) == "failed: with an error that cannot be shown"
    for error in (ProgramError("x"), plain.NotPlain("x")):
        with pytest.raises(type(error)):
            fails(error)
    names: dict[str, Any] = {}
    worker.run_text("x = 1\n__y = __name__", names)
    assert (names["x"], names["__y"]) == (1, "builtins")
