"""`proxytune chat`: options, models, and the session."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from proxytune.cli import console
from proxytune.cli.options import (
    CONVERSATION,
    DECODING,
    Alpha,
    As,
    NegativeAlpha,
    RemoteCode,
    SystemName,
    Vocab,
    grouped,
)
from proxytune.config import Sampling
from proxytune.options import DecodeOptions


@grouped(sampling=CONVERSATION, decode=DECODING)
def chat(
    *,
    system: SystemName = "demo",
    as_: As = "proxy",
    alpha: Alpha = None,
    allow_negative_alpha: NegativeAlpha = False,
    system_message: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="The system message: what the conversation begins with."),
    ] = None,
    vocab: Vocab = None,
    trust_remote_code: RemoteCode = False,
    sampling: Sampling,
    decode: DecodeOptions,
) -> None:
    """Talk with a system. Every role gets the conversation in its own chat format.

    /help shows the commands: /alpha 0.5, /as base, /compare, /system TEXT, /reset, /quit. Messages may come
    from a pipe, one a line.

    Example: proxytune chat --system demo
    """
    from proxytune.cli.chat.lines import lines
    from proxytune.cli.chat.session import COMMANDS, ChatSession
    from proxytune.runs import Chat, load

    made = console.read_system(system, vocab)
    made.require_one_process("chat")
    with _notes_on_stderr(), load(made, decode=decode, trust_remote_code=trust_remote_code) as model:
        model.models.on_load = console.show_loading if sys.stderr.isatty() else None
        talk = Chat(
            model,
            system=system_message,
            as_=as_,
            alpha=alpha,
            sampling=sampling,
            allow_negative_alpha=allow_negative_alpha,
        )
        model.prepare(talk.as_)
        session = ChatSession(talk, lines(list(COMMANDS)))
        strength = f", alpha {talk.alpha.text}" if talk.as_ == "proxy" else ""
        session.say(f"{made.name} as {talk.as_}{strength}. /help shows the commands, Ctrl-D ends")
        session.run()


@contextmanager
def _notes_on_stderr() -> Iterator[None]:
    """What a reader of the answers should know, once each."""
    said = set[str]()

    def note(message: Warning | str, *_: object, **__: object) -> None:
        if str(message) not in said:
            said.add(str(message))
            console.say(f"note: {message}")

    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = note
        yield
