"""Programs that attack the sandbox or their verdict, and what counts as contained. It is also a script, which
runs them against one backend and prints JSON: so they can be run as another user, with another Python.

Each is bounded in itself: were the sandbox not there, it would harm nothing. It uses the standard library and
`proxytune.sandbox` only.
"""

# ruff: noqa: E501  a line of a program stays a line

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from proxytune.sandbox import MIB, Job, Limits, Program, Sandbox
from proxytune.sandbox import sandbox as module

LIMITS = Limits(
    memory=1024 * MIB, file_bytes=64 * MIB, processes=64, open_files=256, tmp_bytes=64 * MIB, total=512 * MIB
)
CHECK = "f = call('f')\nfor i in range(3, 6):\n    assert f(i) == i * 7919\n"
"""The check of the false passes; no program knows the factor."""


@dataclass(frozen=True)
class Attack:
    """One program."""

    kind: Literal["false pass", "escape", "left behind", "bomb"]
    code: str
    contained: Literal["reaches its end", "does not reach its end"]
    then: str = ""
    """The program of the next job in the same sandbox; it reaches its end if it finds nothing."""
    weak: bool = True
    """Whether `weak` contains it, too."""


def forging(code: str) -> Attack:
    """A wrong program that wants to pass."""
    return Attack("false pass", code, "does not reach its end")


def escaping(code: str, *, weak: bool = True) -> Attack:
    """A program that looks for a way out, and fails if it finds one."""
    return Attack("escape", SYSTEM + code, "reaches its end", weak=weak)


def bombing(code: str, *, weak: bool = True) -> Attack:
    """A program that takes more than it may, and reaches its end if it gets it."""
    return Attack("bomb", SYSTEM + code, "does not reach its end", weak=weak)


def leaving(code: str, then: str, *, weak: bool = True) -> Attack:
    """A program that leaves something behind, and one that looks for it."""
    return Attack("left behind", SYSTEM + code, "reaches its end", SYSTEM + then, weak)


SYSTEM = """
import ctypes, os, platform, signal, socket, sys, time
libc = ctypes.CDLL(None, use_errno=True)
X86 = platform.machine() == "x86_64"
def refused(name, result):
    assert result == -1, name + " was allowed"
def call(x86, arm, *given):
    return libc.syscall(ctypes.c_long(x86 if X86 else arm), *given)
"""

MEMORY = """
import re
def look(pattern):
    for line in open('/proc/self/maps'):
        ends, kind = line.split()[:2]
        begin, end = [int(n, 16) for n in ends.split('-')]
        if not kind.startswith('rw'):
            continue
        try:
            with open('/proc/self/mem', 'rb') as memory:
                memory.seek(begin)
                text = memory.read(min(end - begin, 1 << 26))
        except (OSError, ValueError, OverflowError):
            continue
        yield from re.finditer(pattern, text)
"""
ALL_FDS = "import os\nfor fd in range(3, 256):\n    try: os.write(fd, {what})\n    except OSError: pass\n"

FALSE_PASSES = {
    "a child passes after os.fork": "import os\ndef f(x):\n  if os.fork() == 0: return 0\n  os.wait(); os._exit(0)",
    "a child goes on after os.fork": "import os\nif os.fork():\n  os.wait(); os._exit(0)\nf = lambda x: x",
    "an object that equals everything": "class E:\n  def __eq__(self, o): return True\nf = lambda x: E()",
    "an int that equals everything": "class E(int):\n  def __eq__(self, o): return True\nf = lambda x: E()",
    "a list that equals everything": "class E(list):\n  __eq__ = lambda s, o: True\nf = lambda x: E()",
    "a type that equals everything": "class M(type):\n  def __eq__(c, o): return True\n"
    "class E(metaclass=M): pass\nf = lambda x: E",
    "NotImplemented": "f = lambda x: NotImplemented",
    "patched builtins": "import builtins\nfor n in ('abs','all','any','len','isinstance','range'):\n"
    "  setattr(builtins, n, lambda *a: [])\nf = lambda x: 0",
    "a patched os.write": "import os\nwrite = os.write\n"
    "os.write = lambda fd, data: write(fd, data.replace(b'failed', b'passed'))\nf = lambda x: 0",
    "a patched json": "import json\njson.dumps = lambda *a, **k: 'null'\njson.loads = lambda *a: ['f', [1], {}]\n"
    "f = lambda x: 0",
    "the expected value in the frames": "import sys\ndef f(x):\n  frame = sys._getframe(1)\n  while frame:\n"
    "    for v in [*frame.f_locals.values(), *frame.f_code.co_consts]:\n"
    "      if v == int('79' '19'): return x * v\n    frame = frame.f_back",
    "the expected value in the heap": "import gc, re\ndef f(x):\n  for o in gc.get_objects():\n"
    "    for v in gc.get_referents(o):\n      if type(v) in (str, bytes):\n"
    "        m = re.search('assert f.i. == i . ([0-9]+)', str(v))\n        if m: return x * int(m[1])",
    "the expected value in the memory": MEMORY + "def f(x):\n"
    "  for m in look(rb'assert f\\(i\\) == i \\* ([0-9]+)'): return x * int(m[1])",
    "the token in the frames": "import sys\nframe = sys._getframe()\nwhile frame:\n  for v in list(frame.f_locals.values()):\n"
    "    if hasattr(v, 'send'):\n      for t in list(frame.f_locals.values()) + [b'']:\n"
    "        if isinstance(t, bytes): v.send(t + b'passed')\n  frame = frame.f_back\nf = lambda x: 0",
    "a verdict on every descriptor": ALL_FDS.format(what="b'passed\\n'") + "f = lambda x: 0",
    "a report on every descriptor": ALL_FDS.format(what="b'{\"results\": [\"passed\"]}\\n'") + "f = lambda x: 0",
    "noise on every descriptor": ALL_FDS.format(what="os.urandom(64)") + "f = lambda x: 0",
    "an answer that is no answer": ALL_FDS.format(what='b"\\0\\0\\0\\x08\\"passed\\"" * 20') + "f = lambda x: 0",
    "an answer as long as the memory": ALL_FDS.format(what="b'\\x7f\\xff\\xff\\xff'") + "f = lambda x: 0",
    "an answer without an end": "def f(x):\n  a = []\n  for _ in range(10 ** 5): a = [a]\n  return a",
    "an iterator without an end": "import itertools\nf = lambda x: itertools.count()",
    "the end of an iteration": "def f(x): raise StopIteration",
    "an error of the check's own": "class ProgramError(BaseException): pass\n"
    "def f(x): raise ProgramError('passed')",
    "an error called passed": "class passed(Exception): pass\ndef f(x): raise passed('passed')",
    "an exit": "import sys\ndef f(x): sys.exit(0)",
    "an exit without a word": "import os\ndef f(x): os._exit(0)",
    "an exit at once": "import os\nos._exit(0)",
    "a killed check": "import os, signal, time\ndef f(x):\n  for n in os.listdir('/proc'):\n"
    "    if n.isdigit() and int(n) not in (1, os.getpid()):\n      try: os.kill(int(n), 9)\n"
    "      except OSError: pass\n  return 0",
    "a killed worker": "import os\ndef f(x):\n  os.kill(os.getppid(), 9)\n  return 0",
    "a stopped check": "import os\ndef f(x):\n  for n in os.listdir('/proc'):\n"
    "    if n.isdigit() and int(n) not in (1, os.getpid(), os.getppid()):\n      try: os.kill(int(n), 19)\n"
    "      except OSError: pass\n  return 0",
    "the memory of the check": "import os\ndef f(x):\n  for n in filter(str.isdigit, os.listdir('/proc')):\n"
    "    if int(n) == os.getpid(): continue\n    for what in ('mem', 'environ', 'maps', 'fd/0', 'fd/1'):\n"
    "      try: data = open('/proc/%s/%s' % (n, what), 'rb').read(100)\n      except OSError: continue\n"
    "      if b'79' + b'19' in data: return x * 7919\n  return 0",
    "a traced check": "import ctypes, os\ndef f(x):\n  l = ctypes.CDLL(None)\n"
    "  for n in filter(str.isdigit, os.listdir('/proc')):\n    if int(n) != os.getpid() and l.ptrace(16, int(n), 0, 0) == 0:\n"
    "      return x * 7919\n  return 0",
    "changed modules": "import sys\nfor n, m in list(sys.modules.items()):\n  if 'inside' in n:\n"
    "    for k in list(vars(m)):\n      if callable(getattr(m, k)): setattr(m, k, lambda *a, **b: 'passed')\n"
    "f = lambda x: 0",
}  # fmt: skip

ATTACKS: dict[str, Attack] = {name: forging(code) for name, code in FALSE_PASSES.items()} | {
    # Ways out
    "a user namespace by unshare": escaping(
        "for flag in (0x10000000, 0x20000, 0x2000000, 0x4000000, 0x8000000, 0x20000000, 0x40000000):\n"
        "    refused('unshare', libc.unshare(flag))\n    refused('unshare', libc.unshare(0x10000000 | flag))\n"
    ),
    "a user namespace by clone": escaping(
        "for flag in (0x10000000, 0x10000000 | 0x20000):\n    got = call(56, 220, flag | 17, 0, 0, 0, 0)\n"
        "    if got == 0: os._exit(0)\n    refused('clone', got)\n"
    ),
    "a user namespace by clone3": escaping(
        "got = call(435, 435, (ctypes.c_uint64 * 11)(0x10000000, 0, 0, 0, 17), ctypes.c_size_t(88))\n"
        "if got == 0: os._exit(0)\nrefused('clone3', got)\n"
    ),
    "another root": escaping(
        "refused('chroot', libc.chroot(b'/tmp'))\nrefused('mount', libc.mount(b'/usr', b'/tmp', None, 4096, None))\n"
        "refused('umount', libc.umount2(b'/proc', 2))\nrefused('pivot', call(155, 41, b'/tmp', b'/tmp'))\n"
        "refused('open_tree', call(428, 428, -100, b'/', 1))\nrefused('fsopen', call(430, 430, b'tmpfs', 0))\n"
        "refused('mount_setattr', call(442, 442, -100, b'/', 0, 0, 0))\n"
    ),
    "root and its rights": escaping(
        "for way in (os.setuid, os.setgid, os.seteuid):\n    try: way(0)\n    except OSError: continue\n"
        "    assert os.getuid(), 'root'\n"
        "status = dict(l.split(':', 1) for l in open('/proc/self/status').read().splitlines() if ':' in l)\n"
        "assert all(int(status[n], 16) == 0 for n in ('CapPrm', 'CapEff', 'CapAmb')), status\n"
        "assert status['NoNewPrivs'].strip() == '1' and status['Seccomp'].strip() == '2', status\n"
    ),
    "rights that a program could gain": escaping(
        "status = open('/proc/self/status').read()\n"
        "assert int(status.split('CapBnd:')[1].split()[0], 16) == 0, status\n",
        weak=False,
    ),
    "parts of the kernel": escaping(
        "refused('keyctl', call(250, 219, 0, -3, 0))\nrefused('add_key', call(248, 217, b'user', b'x', b'y', 1, -3))\n"
        "refused('bpf', call(321, 280, 0, (ctypes.c_uint64 * 9)(1, 4), 72))\n"
        "refused('perf', call(298, 241, (ctypes.c_uint64 * 16)(1 | 112 << 32), 0, -1, -1, 0))\n"
        "refused('userfaultfd', call(323, 282, 1))\nrefused('io_uring', call(425, 425, 4, (ctypes.c_uint8 * 120)()))\n"
        "refused('kexec', call(246, 104, 0, 0, 0, 0))\nrefused('module', call(175, 105, b'', 0, b''))\n"
        "refused('finit', call(313, 273, 0, b'', 0))\nrefused('syslog', call(103, 116, 3, None, 0))\n"
        "refused('handle', call(304, 265, -100, (ctypes.c_uint8 * 64)(), 0))\n"
    ),
    "calls of another architecture": escaping(
        "if X86: refused('x32', libc.syscall(ctypes.c_long(0x40000000 | 272), 0x10000000))\n"
    ),
    "another process": escaping(
        "child = os.fork()\nif child == 0: time.sleep(5); os._exit(0)\n"
        "refused('ptrace', libc.ptrace(16, child, 0, 0))\nrefused('readv', call(310, 270, child, 0, 0, 0, 0, 0))\n"
        "refused('pidfd_getfd', call(438, 438, 0, 0, 0))\nos.kill(os.getpid(), 0)\n"
    ),
    "sockets of the machine": escaping(
        "for family in (17, 38, 40, 31, 29, 44):  # packets, crypto, VSOCK, bluetooth, CAN, XDP\n"
        "    try: socket.socket(family, socket.SOCK_RAW if family == 17 else socket.SOCK_STREAM)\n"
        "    except OSError as error:\n        assert error.errno == 1, (family, error)\n        continue\n"
        "    raise AssertionError(family)\n"
    ),
    "the network": escaping(
        "for family, address in ((socket.AF_INET, ADDRESS), (socket.AF_UNIX, NAME)):\n"
        "    try: socket.socket(family).connect(address)\n    except OSError: continue\n"
        "    raise AssertionError('reached the host')\n"
    ),
    "signals to the outside": escaping(
        "for way in (lambda: os.kill(OUTSIDE, 9), lambda: os.killpg(os.getpgid(OUTSIDE), 9),\n"
        "            lambda: os.kill(-1, 0), lambda: signal.pidfd_send_signal(os.pidfd_open(OUTSIDE), 9)):\n"
        "    try: way()\n    except (OSError, AttributeError): pass\n"
        "import fcntl, resource\nr, w = os.pipe()\n"
        "try:\n    fcntl.fcntl(r, fcntl.F_SETOWN, OUTSIDE)\n    fcntl.fcntl(r, 10, 9)\n"
        "    fcntl.fcntl(r, fcntl.F_SETFL, os.O_ASYNC)\n    os.write(w, b'x')\nexcept OSError: pass\n"
        "try: resource.prlimit(OUTSIDE, resource.RLIMIT_CPU, (0, 0))\nexcept OSError: pass\n"
        "libc.syscall(ctypes.c_long(129 if X86 else 138), OUTSIDE, 9, (ctypes.c_uint8 * 128)())\n"
    ),
    "files of the host": escaping(
        "for path in (CANARY, '/etc/passwd', '/etc/hostname', '/home', '/var', '/proc/1/root/etc/passwd', '/proc/1/cwd/' + CANARY):\n"
        "    try: os.stat(path)\n    except OSError: continue\n    raise AssertionError(path)\n",
        weak=False,
    ),
    "writing to the host": escaping(
        "for folder in (os.path.dirname(CANARY), '/usr', '/etc', '/', '/dev', '/proc/sys/kernel', '/sys', '/var/tmp'):\n"
        "    try: open(folder + '/proxytune-was-here', 'w')\n    except OSError: continue\n"
        "    os.unlink(folder + '/proxytune-was-here')\n    raise AssertionError(folder)\n",
        weak=False,
    ),
    "devices": escaping(
        "for number in ((1, 1), (8, 0), (1, 11)):\n"
        "    try: os.mknod('device%d-%d' % number, 0o60666, os.makedev(*number))\n"
        "    except OSError: continue\n    raise AssertionError(number)\n"
    ),
    "what types into a terminal": escaping(
        "import fcntl\nr, w = os.pipe()\nfor request in (0x5412, 0x541C):\n"
        "    try: fcntl.ioctl(r, request, b'x')\n    except OSError as error: assert error.errno == 1, error\n"
    ),
    # What is left for the next job of the same sandbox
    "a SysV segment": leaving(
        "made = libc.shmget(0x7919, 4096, 0o1666)\n", "refused('shmget', libc.shmget(0x7919, 4096, 0o666))\n"
    ),
    "a SysV queue": leaving(
        "libc.msgget(0x7919, 0o1666)\n", "refused('msgget', libc.msgget(0x7919, 0o666))\n"
    ),
    "a SysV semaphore": leaving(
        "libc.semget(0x7919, 1, 0o1666)\n", "refused('semget', libc.semget(0x7919, 1, 0o666))\n"
    ),
    "a POSIX queue": leaving(
        "call(240, 180, b'proxytune', 0o102, 0o666, None)\n",
        "refused('mq_open', call(240, 180, b'proxytune', 2, 0, None))\n",
    ),
    "files": leaving(
        "for p in ('/tmp', '/dev/shm', '.'):\n"
        "    try: open(p + '/proxytune-left', 'w').write('x'); os.link(p + '/proxytune-left', p + '/.also')\n"
        "    except OSError: pass\n",
        "for p in ('/tmp', '/dev/shm', '.'):\n    assert not os.path.exists(p + '/proxytune-left'), p\n",
        weak=False,
    ),
    "a closed folder": leaving(
        "os.makedirs('shut/in/deep'); open('shut/in/deep/x', 'w')\nos.chmod('shut/in', 0); os.chmod('shut', 0)\n",
        "assert os.listdir('.') == [], os.listdir('.')\n",
    ),
    "folders as deep as it gets": leaving(
        "for _ in range(3000):\n    os.mkdir('d'); os.chdir('d')\nopen('x', 'w')\n",
        "assert os.listdir('.') == [], os.listdir('.')\n",
    ),
    "a process that hides": leaving(
        "if os.fork() == 0:\n    os.setsid(); os.closerange(0, 256)\n    if os.fork() == 0:\n"
        "        os.execve(sys.executable, [sys.executable, '-c', 'import time; time.sleep(77)'], {})\n"
        "    os._exit(0)\ntime.sleep(0.3)\n",
        "for n in filter(str.isdigit, os.listdir('/proc')):\n"
        "    try: line = open('/proc/%s/cmdline' % n).read()\n    except OSError: continue\n"
        "    assert 'sleep(77)' not in line, line\n",
    ),
    "its text in the memory": leaving(
        "secret = 'LEFT123456789012'\n", MEMORY + "assert not [m[0] for m in look(rb'LEFT([0-9]{12})')]\n"
    ),
    # More than there is
    "one process takes all memory": bombing("x = bytearray(2 << 30)\n"),
    "many processes take all memory": bombing(
        "for _ in range(12):\n    if os.fork() == 0:\n        x = bytearray(os.urandom(1)) * (100 << 20)\n"
        "        time.sleep(8); os._exit(0)\ntime.sleep(2)\n"
    ),
    "memory that processes share": bombing(
        "import mmap\nkept = []\nfor _ in range(9):\n    kept.append(mmap.mmap(-1, 100 << 20))\n"
        "    for at in range(0, 100 << 20, 4096): kept[-1][at] = 1\n    time.sleep(0.1)\ntime.sleep(1)\n"
    ),
    "a SysV segment as large as the memory": bombing(
        "number = libc.shmget(0, ctypes.c_size_t(64 << 20), 0o1666)\nassert number != -1\n"
    ),
    "a file that has no name": bombing(
        "fd = libc.memfd_create(b'x', 0)\nassert fd != -1\nfor _ in range(32): os.write(fd, bytes(1 << 20))\n"
    ),
    "one file": bombing("with open('x', 'wb') as file:\n    for _ in range(65): file.write(bytes(1 << 20))\n"),
    "many files": bombing(
        "for n in range(100):\n    with open('/tmp/x%d' % n, 'wb') as file: file.write(bytes(1 << 20))\n", weak=False
    ),
    "many files in shared memory": bombing(
        "for n in range(100):\n    with open('/dev/shm/proxytune-x%d' % n, 'wb') as file: file.write(bytes(1 << 20))\n",
        weak=False,
    ),
    "many processes": bombing(
        "n = 0\nfor _ in range(300):\n    if os.fork() == 0: time.sleep(20); os._exit(0)\n"
    ),
    "processes that fork for ever": bombing(
        "while True:\n    try: os.fork()\n    except OSError: time.sleep(0.01)\n"
    ),
    "many threads": bombing(
        "import threading\nfor _ in range(300): threading.Thread(target=time.sleep, args=(20,), daemon=True).start()\n"
    ),
    "many open files": bombing("kept = [open('/dev/null') for _ in range(300)]\n"),
    "a loop without an end": bombing(
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nwhile True:\n  try:\n    while True: pass\n"
        "  except BaseException: pass\n"
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Surroundings:
    """What there is of the host's to be reached."""

    canary: str
    address: tuple[str, int]
    name: str
    outside: int

    def fill(self, code: str) -> str:
        """The program with the host's things named."""
        given = {"CANARY": self.canary, "ADDRESS": self.address, "NAME": self.name, "OUTSIDE": self.outside}
        for name, value in given.items():
            code = code.replace(name, repr(value))
        return code


def run(box: Sandbox, attack: Attack, around: Surroundings) -> tuple[bool, str]:
    """Whether an attack was contained, and how it ended."""
    check = CHECK if attack.kind == "false pass" else ""
    program = Program(around.fill(attack.code), 3.0, check=check)
    jobs = [Job((program,))] + ([Job((Program(attack.then, 10.0),))] if attack.then else [])
    results = [outcome.results[0] for outcome in box.run_together(jobs)]
    contained = (results[-1] == "passed") == (attack.contained == "reaches its end")
    return contained, results[-1]


def main() -> None:
    """Run all attacks against a backend: what they ended with, and what is left."""
    backend, python, *only = sys.argv[1:]
    users: list[int] = []
    fresh = module.fresh_user

    def noted() -> int:
        users.append(fresh() or os.geteuid())
        return users[-1] if os.geteuid() == 0 else 0

    module.fresh_user = noted
    box = Sandbox(backend, python, LIMITS, workers=1)  # type: ignore[arg-type]
    problem = box.problem()
    if problem is not None:
        print(json.dumps({"problem": problem}))
        return
    before = {pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if _user(pid) == os.geteuid()}
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as local:
        name = f"\0proxytune-test-{os.getpid()}"
        local.bind(name)
        local.listen()
        with (
            tempfile.NamedTemporaryFile(dir="/var/tmp") as canary,
            subprocess.Popen(["sleep", "600"]) as outside,
        ):
            around = Surroundings(canary.name, server.getsockname(), name, outside.pid)
            wanted = {title: attack for title, attack in ATTACKS.items() if not only or title in only}
            if backend == "weak":  # the others would be seen on the host
                wanted = {title: attack for title, attack in wanted.items() if attack.weak}
            try:
                found = {title: run(box, attack, around) for title, attack in wanted.items()}
                alive = outside.poll() is None
            finally:
                outside.kill()
    ours = set(users) - {0}
    left = [
        Path(f"/proc/{pid}/cmdline").read_text()
        for pid in map(int, filter(str.isdigit, os.listdir("/proc")))
        if _user(pid) in ours and pid not in before
    ]
    print(json.dumps({"found": found, "alive": alive, "left": left}))


def _user(pid: int) -> int:
    """The user of a process; -1 where there is none."""
    try:
        return os.stat(f"/proc/{pid}").st_uid
    except OSError:
        return -1


if __name__ == "__main__":
    main()
