"""The conversation on a terminal: what is typed, and what becomes of it.

A line that begins with / is a command; everything else is a message. Answers are all that goes to stdout when
messages come from a pipe. What is wrong there ends the session; a person is told, and goes on."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from proxytune.cli import console
from proxytune.cli.chat.lines import Lines
from proxytune.cli.side_by_side import show_side_by_side
from proxytune.errors import UserError, did_you_mean
from proxytune.runs import Chat

Action = Callable[["ChatSession", str], None]


class ChatSession:
    """Messages in, answers out."""

    def __init__(self, chat: Chat, lines: Lines) -> None:
        self.chat, self.lines = chat, lines
        self.ended = False

    def run(self) -> None:
        """Until the messages end, or /quit. UserError for what is wrong in a pipe."""
        while not self.ended:
            text = self.lines.next()
            if text is None:
                return
            try:
                self._take(text)
            except UserError as error:
                if not self.lines.interactive:
                    raise
                console.say(f"error: {error}")
            except KeyboardInterrupt:
                if not self.lines.interactive:
                    raise
                console.write_data("\n")
                console.say("stopped")

    def _take(self, text: str) -> None:
        """One line, or several that belong together."""
        if not text.strip():
            return
        if not text.startswith("/"):
            return self._answer(text)
        if text.startswith("//"):
            return self._answer(text[1:])
        name, _, rest = text.partition(" ")
        if name not in COMMANDS:
            raise did_you_mean("command", name, COMMANDS)
        COMMANDS[name].act(self, rest.strip())

    def _answer(self, text: str) -> None:
        """Write an answer as it arrives."""
        with self.chat.ask(text) as answer, self._stoppable(answer.stop):
            if self.lines.interactive:
                console.write_label(f"{self.chat.as_}> ")
            for piece in answer:
                console.write_data(piece)
            console.write_data("\n")
        if answer.completion is None:
            console.say("stopped: what there is of the answer stays in the conversation")

    @contextmanager
    def _stoppable(self, stop: Callable[[], None]) -> Iterator[None]:
        """Have Ctrl-C stop an answer, between two steps. A second one, before that, does not wait for the
        step."""
        if not self.lines.interactive:
            yield
            return

        def hear(number: int, frame: FrameType | None) -> None:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            stop()

        before = signal.signal(signal.SIGINT, hear)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def say(self, text: str) -> None:
        """Something that was asked for about the session."""
        if self.lines.interactive:
            console.say(text)

    # Commands

    def set_alpha(self, text: str) -> None:
        """`/alpha A`."""
        if text:
            self.chat.alpha = text
        self.say(f"alpha {self.chat.alpha.text}" + ("" if self.chat.as_ == "proxy" else ", of the proxy"))

    def set_role(self, text: str) -> None:
        """`/as ROLE`."""
        if text == "all":
            raise UserError("one role answers at a time: /compare shows all of them side by side")
        if text:
            before = self.chat.as_
            self.chat.as_ = text
            try:
                self.chat.model.prepare(self.chat.as_)
            except BaseException:
                self.chat.as_ = before
                raise
        self.say(f"as {self.chat.as_}; the others: {', '.join(self._others())}")

    def _others(self) -> list[str]:
        return [role for role in self.chat.model.system.roles if role != self.chat.as_]

    def set_system(self, text: str) -> None:
        """`/system TEXT`, `/system -`."""
        if text:
            self.chat.system = None if text == "-" else text
        self.say(f"system message: {self.chat.system}" if self.chat.system else "no system message")

    def compare(self, text: str) -> None:
        """`/compare`, `/compare QUESTION`."""
        show_side_by_side(self.chat.compare(text or None))

    def reset(self, text: str) -> None:
        """`/reset`."""
        self.chat.reset()
        self.say("a new conversation")

    def help(self, text: str) -> None:
        """`/help`."""
        console.print_table(("command", "what it does"), [(c.shown, c.what) for c in COMMANDS.values()])
        console.show(
            "A line that ends in \\ goes on in the next one; // begins a message that begins with /. "
            "Ctrl-C stops an answer, Ctrl-D ends."
        )

    def quit(self, text: str) -> None:
        """`/quit`."""
        self.ended = True


@dataclass(frozen=True)
class Command:
    """What can be written beside messages."""

    shown: str
    what: str
    act: Action


COMMANDS: Mapping[str, Command] = {
    "/alpha": Command(
        "/alpha [A]",
        "the strength of the proxy: 0 to 10, or first:N, warmup:N, linear:FROM:TO:N",
        ChatSession.set_alpha,
    ),
    "/as": Command(
        "/as [ROLE]", "who answers: proxy, base, expert, antiexpert or tuned", ChatSession.set_role
    ),
    "/compare": Command(
        "/compare [QUESTION]",
        "all roles side by side, on the last question or a new one",
        ChatSession.compare,
    ),
    "/system": Command(
        "/system [TEXT]",
        "the system message of the conversation; /system - takes it out",
        ChatSession.set_system,
    ),
    "/reset": Command("/reset", "a new conversation; role, alpha and system message stay", ChatSession.reset),
    "/help": Command("/help", "this", ChatSession.help),
    "/quit": Command("/quit", "the end", ChatSession.quit),
}
