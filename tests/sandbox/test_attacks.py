"""Every attack of tests/support/attacks.py against every backend, as the user of the tests and, under root,
as another one."""

from __future__ import annotations

import collections
import enum
import json
import os
import shutil
import subprocess
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from proxytune.sandbox.inside import seccomp
from proxytune.sandbox.inside.plain import Foreign, NotPlain, dumps, loads
from proxytune.sandbox.root import Interpreter, closed_folder
from tests.support.attacks import ATTACKS
from tests.support.checkout import ROOT
from tests.support.require import require_or_skip
from tests.support.sandboxes import SYSTEM_PYTHON
from tests.support.tiers import WHOLE

OTHER_USER = 65534
PARTS = ("proxytune/sandbox", "proxytune/errors.py", "tests/support/attacks.py")


@pytest.fixture(scope="module")
def alone() -> Any:
    """The sandbox and the attacks in a folder that everybody can read, for a bare interpreter."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        folder = Path(name)
        for part in PARTS:
            target = folder / part
            target.parent.mkdir(parents=True, exist_ok=True)
            copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
            copy(ROOT / part, target)
        for package in ("proxytune", "tests", "tests/support"):
            (folder / package / "__init__.py").touch()
        subprocess.run(["chmod", "-R", "a+rX", name], check=True)
        yield folder


def report(folder: Path, backend: str, other_user: bool) -> dict[str, Any]:
    """What a run of all attacks printed."""
    python, command = sys.executable, []
    if os.geteuid() == 0:
        if other_user or closed_folder(Interpreter.find(python), isolated=backend != "weak"):
            python = SYSTEM_PYTHON
        if other_user:
            command = ["setpriv", "--reuid", str(OTHER_USER), "--regid", str(OTHER_USER), "--clear-groups"]
            if shutil.which("setpriv") is None:
                require_or_skip("sandbox", "setpriv is not installed")
    elif other_user:
        pytest.skip("not root: the tests are of an ordinary user already")
    if not Path(python).exists():
        require_or_skip("sandbox", f"{python} is not there")
    command += [python, "-m", "tests.support.attacks", backend, python]
    given = {"HOME": "/nonexistent", "PATH": os.environ["PATH"]}
    done = subprocess.run(command, cwd=folder, env=given, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout)
    if "problem" in found:
        require_or_skip("sandbox", f"{backend}: {found['problem']}")
    return found


WALLS = [(backend, other) for other in (False, True) for backend in ("bubblewrap", "namespaces", "weak")]
"""Every backend, as the user who runs the tests and as another. Without PROXYTUNE_WHOLE=1 every second."""


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.xdist_group("attacks")  # one after another: what is left is found by its user, and they share it
@pytest.mark.parametrize(("backend", "other_user"), WALLS if WHOLE else WALLS[::2])
def test_attacks_are_contained(alone: Path, backend: str, other_user: bool) -> None:
    found = report(alone, backend, other_user)
    expected = {name for name, attack in ATTACKS.items() if backend != "weak" or attack.weak}
    assert found["found"].keys() == expected
    assert {name: ending for name, (contained, ending) in found["found"].items() if not contained} == {}
    assert found["alive"], "a process outside was killed"
    assert found["left"] == []


# The filter


def decided(code: bytes, audit: int, number: int, arguments: tuple[int, ...] = ()) -> int:
    """What a filter returns, by an interpreter of the few instructions that there are."""
    words = {0: number, 4: audit, **{16 + 8 * i: value & 0xFFFFFFFF for i, value in enumerate(arguments)}}
    at, value = 0, 0
    while True:
        operation, then, otherwise, operand = seccomp.struct.unpack_from("=HBBI", code, 8 * at)
        at += 1
        if operation == seccomp.LOAD:
            value = words.get(operand, 0)
        elif operation == seccomp.RETURN:
            return operand & 0xFFFF if operand != seccomp.ALLOW else 0
        else:
            tests = {
                seccomp.EQUAL: value == operand,
                seccomp.AT_LEAST: value >= operand,
                seccomp.ANY_BIT: bool(value & operand),
            }
            at += then if tests[operation] else otherwise


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_filter_refuses_by_number_and_argument(machine: str) -> None:
    audit, column = seccomp.ARCHITECTURES[machine]
    code = seccomp.filter_bytes(machine=machine)
    for name, numbers in seccomp.REFUSED.items():
        if numbers[column] is not None:
            assert decided(code, audit, numbers[column]) == seccomp.EPERM, name
    clone, socket = seccomp.CONDITIONAL["clone"][column], seccomp.CONDITIONAL["socket"][column]
    kill, write = seccomp.CONDITIONAL["kill"][column], {0: 1, 1: 64}[column]
    assert clone is not None and socket is not None and kill is not None
    assert decided(code, audit, clone, (17,)) == 0
    assert decided(code, audit, clone, (0x10000000 | 17,)) == seccomp.EPERM
    assert decided(code, audit, socket, (2,)) == 0 and decided(code, audit, socket, (40,)) == seccomp.EPERM
    assert decided(code, audit, 435) == seccomp.ENOSYS
    assert decided(code, audit, write) == 0 and decided(code, audit, kill, (1, 9)) == 0
    assert decided(code, audit + 1, write) == seccomp.ENOSYS
    own = seccomp.filter_bytes(77, machine)
    assert decided(own, audit, kill, (77, 9)) == 0
    for other in (0, 1, 76, 0xFFFFFFFF):
        assert decided(own, audit, kill, (other, 9)) == seccomp.EPERM
    assert decided(own, audit, socket, (2,)) == seccomp.EPERM


def test_another_machine_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from proxytune.sandbox import Sandbox

    monkeypatch.setattr(seccomp.platform, "machine", lambda: "riscv64")
    for backend in ("bubblewrap", "namespaces", "weak"):
        problem = Sandbox(
            backend, SYSTEM_PYTHON if os.path.exists(SYSTEM_PYTHON) else sys.executable
        ).problem()  # type: ignore[arg-type]
        assert problem == "no filter of system calls for 'riscv64' (only x86_64, aarch64)"


# Plain data


@pytest.mark.parametrize(
    "value",
    [
        None, True, 0, -1, 1 << 9000, 0.1, -0.0, float("inf"), 1j, "a\ud800\0", b"\xff", bytearray(b"x"),
        [1, [2.0, "x"]], (1,), (), {1, "a"}, frozenset([1]), {1: [2], (1, 2): {"x"}}, range(1, 9, 2),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_plain_data_arrives_as_it_is(value: Any) -> None:
    found = loads(dumps(value, strict=True))
    assert found == value and type(found) is type(value) and repr(found) == repr(value)


@pytest.mark.parametrize(
    ("value", "base"),
    [
        (collections.Counter("aab"), {"a": 2, "b": 1}),
        (collections.OrderedDict(a=1), {"a": 1}),
        (collections.defaultdict(list, a=[1]), {"a": [1]}),
        (collections.namedtuple("Point", "x y")(1, 2), (1, 2)),
        (types.new_class("Lines", (list,))(["a"]), ["a"]),
        (types.new_class("Names", (frozenset,))("a"), frozenset("a")),
        (types.new_class("Text", (str,))("a"), "a"),
        (enum.IntEnum("Grade", "LOW HIGH")(2), 2),
        (np.float64(0.5), 0.5),
        (np.int32(3), 3),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_value_of_a_subclass_arrives_as_its_base(value: Any, base: Any) -> None:
    """A function may well return a Counter where its test expects a dict."""
    found = loads(dumps(value))
    assert found == base and type(found) is type(base)


def test_what_is_not_plain_arrives_as_its_base_or_as_nothing_equal() -> None:
    class Same(int):
        def __eq__(self, other: object) -> bool:
            return True

        __hash__ = int.__hash__

    assert loads(dumps(Same(3))) == 3 and loads(dumps(Same(3))) != 4
    assert isinstance(loads(dumps(object())), Foreign) and loads(dumps(len)) != len
    assert list(loads(dumps(x * 2 for x in range(3)))) == [0, 2, 4]
    assert loads(dumps({1: 2}.keys())) == {1} and loads(dumps({1: 2}.items())) == {(1, 2)}
    with pytest.raises(NotPlain):
        dumps([lambda: None], strict=True)
    with pytest.raises(TypeError, match="no plain data"):
        dumps(loads(dumps(object())), strict=True)
