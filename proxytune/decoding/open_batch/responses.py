"""Responses of an open batch: what becomes of each from step to step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from proxytune.decoding.completions import token_text
from proxytune.decoding.stop_strings import StopStrings
from proxytune.decoding.streaming import TextStream, final_text
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
    """Of a traced response, tokens whose text is shown with this piece or before. Those of a stop string are
    left out."""
    generated: int
    """Tokens so far, all counted."""
    finish_reason: FinishReason | Literal["fault"] | None = None
    """Set in the last piece; `fault`: its text could not be read."""
    remark: str | None = None
    """Why a response ended that is none."""


class GrowingResponse:
    """A response under way: its text, and, where it is traced, the tokens whose text is not shown yet.

    Text token by token costs a decoding of each. A response that is not traced and comes as a whole is
    decoded once, at its end."""

    def __init__(self, stops: StopStrings, eos: frozenset[int], *, traced: bool, whole: bool) -> None:
        self.generated = 0
        self.whole = whole
        """Whether it is taken at its end only."""
        self.fault: str | None = None
        """What broke while its text was read."""
        self._stops, self._eos, self._traced = stops, eos, traced
        self._stream = TextStream(stops)
        self._shown = 0
        self._text = list[str]()
        self._pending = list[tuple[int, SeenToken]]()  # where the token's text ends, and the token

    def hear(self, chosen: Chosen) -> None:
        """One token more."""
        self.generated += 1
        if self.whole and not self._traced:
            return
        start, end = self._shown + self._stream.held, chosen.token in self._eos
        if not end:
            self._show(self._stream.push(chosen.token))
        if self._traced:
            self._see(chosen, start, end)

    def _see(self, chosen: Chosen, start: int, end: bool) -> None:
        trace = chosen.trace
        token = SeenToken(
            id=chosen.token,
            text=token_text(self._stops.text_of, chosen.token),
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

    def finish(self, tokens: Sequence[int]) -> None:
        """No token comes any more; these were all of them."""
        if not self.whole or self._traced:
            self._show(self._stream.finish())
            return
        ends = bool(tokens) and tokens[-1] in self._eos
        self._show(final_text(self._stops, tokens[:-1] if ends else tokens))

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
