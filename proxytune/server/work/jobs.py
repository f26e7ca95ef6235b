"""What handlers hand to the engine thread, and what comes back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from proxytune.config import AlphaSchedule, Role
from proxytune.decoding.open_batch import Asked


@dataclass(frozen=True)
class TextToScore:
    """A prompt whose tokens are to be scored."""

    ids: tuple[int, ...]
    """In the ids of the model that decodes."""
    alpha: AlphaSchedule
    ranked: int
    """Most probable tokens that are wanted in the place of each."""


@dataclass(frozen=True)
class JobFault:
    """Why a job, or one response of it, has no result."""

    message: str
    wrong: bool = False
    """Whether the request was wrong; else something failed here."""
    leaving: bool = False
    """Whether it was under way when the server had to end."""


@dataclass(eq=False)
class ServedJob:
    """What one request asks of the engine. Its events carry the place of a response, or of a text, in it."""

    role: Role
    responses: Sequence[Asked] = ()
    texts: Sequence[TextToScore] = ()
    tickets: dict[int, int] = field(default_factory=dict)
    """Ticket -> place, of the responses under way: the engine thread's own."""
    cancelled: bool = False
    """Set by whoever no longer waits for it: nothing more is computed."""
