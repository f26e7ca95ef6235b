"""Calls from a check to the program that it judges, in another process: `serve` there, `Calls` here.

The check holds the test and what it expects, and decides. The program gets arguments and answers with plain
data, so nothing of the program's runs where the verdict is made.
"""

from __future__ import annotations

import builtins
import os
import struct
from typing import Any

from proxytune.sandbox.inside.plain import NOT_APART, dumps, loads

MOST_BYTES = 256 << 20
"""The longest message: above it, the sender is at fault."""
_LENGTH = struct.Struct("!I")
GONE = "it ended itself before its last line"


class ProgramError(BaseException):
    """The program cannot be called; the text is the result. No test that expects an error catches it."""


def send(fd: int, data: bytes) -> None:
    """One message."""
    view = memoryview(_LENGTH.pack(len(data)) + data)
    while view:
        view = view[os.write(fd, view) :]


def receive(fd: int) -> bytes:
    """One message; EOFError where the other side is gone."""
    size = _LENGTH.unpack(read_exactly(fd, _LENGTH.size))[0]
    if size > MOST_BYTES:
        raise EOFError
    return read_exactly(fd, size)


def read_exactly(fd: int, size: int) -> bytes:
    """So many bytes; EOFError where there are fewer."""
    pieces = []
    while size > 0:
        piece = os.read(fd, min(size, 1 << 20))
        if not piece:
            raise EOFError
        pieces.append(piece)
        size -= len(piece)
    return b"".join(pieces)


def serve(requests: int, answers: int, names: dict[str, Any], failure: str) -> None:
    """In the program's process: answer calls until there are no more. `failure` is how its text ended, or
    `passed`."""
    send(answers, dumps(failure))
    while failure == "passed":
        try:
            request = receive(requests)
        except EOFError:
            return
        name, given, named = loads(request)
        arguments = [given, named]
        before = dumps(arguments)
        try:
            if name not in names:
                raise NameError(f"name {name!r} is not defined")
            answer = ("returned", names[name](*given, **named))
            packed = dumps((*answer, arguments if dumps(arguments) != before else None))
        except BaseException as error:
            packed = dumps(("raised", _described(error), arguments if dumps(arguments) != before else None))
        send(answers, packed)


def _described(error: BaseException) -> tuple[str, Any, str]:
    """An exception as plain data."""
    try:
        text = str(error)
    except BaseException:
        text = "an error that cannot be shown"
    return type(error).__name__, list(error.args), text


class Calls:
    """In the check's process: what gives the functions of the program."""

    def __init__(self, requests: int, answers: int) -> None:
        self.requests, self.answers, self.begun = requests, answers, False

    def __call__(self, name: str) -> Any:
        """The function of that name."""

        def function(*given: Any, **named: Any) -> Any:
            return self._call(name, given, named)

        function.__name__ = name
        return function

    def begin(self) -> None:
        """Have the program's text run, and wait for how that ends."""
        send(self.requests, b"begin")
        failure = self._receive()
        if failure != "passed":
            told = isinstance(failure, str) and failure.startswith("failed: ") and failure != NOT_APART
            raise ProgramError(failure[:400] if told else f"failed: {GONE}")  # only a check says NOT_APART

    def _call(self, name: str, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """One call. What it did to its arguments is done to ours, as within one process."""
        try:
            send(self.requests, dumps((name, list(given), named), strict=True))
        except OSError:
            raise ProgramError(f"failed: {GONE}") from None
        how, what, after = self._receive()
        changed: tuple[list[Any], dict[str, Any]] = after or ([], {})
        for ours, theirs in zip(given, changed[0], strict=False):
            _overwrite(ours, theirs)
        for key in named.keys() & changed[1].keys():
            _overwrite(named[key], changed[1][key])
        if how == "returned":
            return what
        raise _error(*what)

    def _receive(self) -> Any:
        """What the program sent."""
        try:
            return loads(receive(self.answers))
        except EOFError:
            raise ProgramError(f"failed: {GONE}") from None


def _overwrite(ours: Any, theirs: Any) -> None:
    """Give an argument that can change the content that it has in the program."""
    if type(ours) is not type(theirs):
        return
    if isinstance(ours, (list, bytearray)):
        ours[:] = theirs
    elif isinstance(ours, (dict, set)):
        ours.clear()
        ours.update(theirs)


def _error(kind: str, arguments: list[Any], text: str) -> BaseException:
    """The exception that a call raised: the built-in one of that name, or one that is called so. The end of
    an iteration is none: it would end a loop of the check before its last test."""
    known: Any = getattr(builtins, kind, None)
    if isinstance(known, type) and issubclass(known, BaseException):
        if issubclass(known, (StopIteration, StopAsyncIteration, GeneratorExit)):
            return RuntimeError(f"it raised {kind}")
        try:
            made: BaseException = known(*arguments)
        except Exception:
            pass
        else:
            return made
    named: BaseException = type(kind, (Exception,), {})(text)
    return named
