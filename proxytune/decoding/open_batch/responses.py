"""Responses of an open batch: what becomes of each from step to step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from proxytune.decoding.completions import token_text
from proxytune.decoding.stop_strings import StopStrings
from proxytune.decoding.streaming import TextStream
from proxytune.engine import Chosen
from proxytune.records import FinishReason


@dataclass(frozen=True)
class SeenToken:
    """A token of a response with its text, its log-probability and, where asked for, its trace."""

    id: int
    text: str
    """Its name where it has no text, or a part of a letter."""
    offset: int
    """Where its text begins in the response."""
    logprob: float
    end: bool = False
    """Whether it is the end of sequence, which is in no text."""
    alpha: float | None = None
    probability: Mapping[str, float] = field(default_factory=dict)
    """Model -> probability of the token; `proxy` is the combination."""
    ranked: Mapping[str, Sequence[tuple[int, float]]] = field(default_factory=dict)
    """Model -> its most probable tokens with their natural log-probabilities."""


@dataclass(frozen=True)
class Piece:
    """What became of a response in a step."""

    ticket: int
    text: str
    """New text, which is never taken back. All pieces together are the response."""
    tokens: tuple[SeenToken, ...]
    """Tokens whose text is shown with this piece or before. Those of a stop string are left out."""
    generated: int
    """Tokens so far, all counted."""
    finish_reason: FinishReason | Literal["fault"] | None = None
    """Set in the last piece; `fault`: its text could not be read."""
    remark: str | None = None
    """Why a response ended that is none."""


class GrowingResponse:
    """A response under way: its text, and the tokens whose text is not shown yet."""

    def __init__(self, stops: StopStrings, eos: frozenset[int]) -> None:
        self.generated = 0
        self.fault: str | None = None
        """What broke while its text was read."""
        self._stream, self._eos = TextStream(stops), eos
        self._text_of = stops.text_of
        self._shown = 0
        self._text = list[str]()
        self._pending = list[tuple[int, SeenToken]]()  # where the token's text ends, and the token

    def hear(self, chosen: Chosen) -> None:
        """One token more."""
        self.generated += 1
        start, end = self._shown + self._stream.held, chosen.token in self._eos
        if not end:
            self._show(self._stream.push(chosen.token))
        trace = chosen.trace
        token = SeenToken(
            id=chosen.token,
            text=token_text(self._text_of, chosen.token),
            offset=start,
            logprob=chosen.logprob,
            end=end,
            alpha=None if trace is None else trace.alpha,
            probability={} if trace is None else trace.probability,
            ranked={} if trace is None else trace.ranked,
        )
        self._pending.append((self._shown + self._stream.held, token))

    def _show(self, text: str) -> None:
        self._shown += len(text)
        self._text.append(text)

    def finish(self) -> None:
        """No token comes any more."""
        self._show(self._stream.finish())

    def taken(self) -> tuple[str, tuple[SeenToken, ...]]:
        """The text and the tokens since the last call."""
        text, ready = "".join(self._text), list[SeenToken]()
        self._text.clear()
        while self._pending:
            end, token = self._pending[0]
            if not (token.offset < self._shown or (end <= self._shown and not self._stream.ended)):
                break
            ready.append(token)
            del self._pending[0]
        return text, tuple(ready)
