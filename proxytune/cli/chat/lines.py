"""Where messages come from: a person at a terminal, with a history and completion, or a pipe."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Protocol

from proxytune.errors import UserError
from proxytune.terminal import say, write_data

PROMPT, MORE = "you> ", "...> "


class Lines(Protocol):
    """Messages, one after the other."""

    interactive: bool
    """Whether somebody is there who reads what went wrong, and tries again."""

    def next(self) -> str | None:
        """The next message, or None at the end. A backslash at the end of a line goes on in the next one."""
        ...


class TerminalLines:
    """Lines that are typed. The arrow keys edit them and bring back earlier ones."""

    interactive = True

    def __init__(self, words: Sequence[str]) -> None:
        """`words` are what the tab key completes."""
        with suppress(ImportError):  # a Python without it still reads lines
            _edit_lines(words)

    def next(self) -> str | None:
        """See `Lines`. Ctrl-C begins the line anew."""
        text, prompt = "", PROMPT
        while True:
            try:
                line = input(prompt)
            except EOFError:
                write_data("\n")
                return None
            except KeyboardInterrupt:
                write_data("\n")
                say("Ctrl-D or /quit ends")
                text, prompt = "", PROMPT
                continue
            except UnicodeDecodeError as error:
                say(f"error: the message is no {error.encoding} text: {error.reason}")
                text, prompt = "", PROMPT
                continue
            if not line.endswith("\\"):
                return text + line
            text, prompt = f"{text}{line[:-1]}\n", MORE


class PipedLines:
    """Lines of a file or a pipe."""

    interactive = False

    def next(self) -> str | None:
        """See `Lines`. UserError for bytes that are no text."""
        text, line = "", self._line()
        while line.endswith("\\\n"):
            text, line = f"{text}{line[:-2]}\n", self._line()
        return f"{text}{line}".rstrip("\n") if text or line else None

    def _line(self) -> str:
        try:
            return sys.stdin.readline()
        except UnicodeDecodeError as error:
            raise UserError(f"a message on stdin is no {error.encoding} text: {error.reason}") from None


def _edit_lines(words: Sequence[str]) -> None:
    """Have `input` edit lines, keep a history for this session, and complete the words."""
    import readline

    def complete(begun: str, number: int) -> str | None:
        found = [word for word in words if word.startswith(begun)] if begun.startswith("/") else []
        return f"{found[number]} " if number < len(found) else None

    readline.set_completer(complete)
    readline.set_completer_delims(" ")
    readline.parse_and_bind("tab: complete")


def lines(words: Sequence[str]) -> Lines:
    """Lines of whatever stdin is."""
    typed = sys.stdin.isatty() and sys.stdout.isatty()
    return TerminalLines(words) if typed else PipedLines()
