"""What an endpoint shows of a position: its most probable tokens. The forms that servers have are read here.

A token is known by its bytes. Servers write them as a text (with U+FFFD for a part of a letter), as a list of
bytes beside it, as `bytes:\\xe2\\x82`, or as `token_id:17`; some add the token's id."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from typing import Any

from proxytune.endpoints import endpoint

BROKEN = "\ufffd"
"""What a text has in the place of bytes that are no letter."""
NOWHERE = -9000.0
"""Log-probabilities below this stand for minus infinity: servers write -9999, -3.4e38 or null."""
ROUNDING = 1e-2
"""How far above 0 rounding may carry a log-probability."""

_BYTES = re.compile(r"bytes:((?:\\x[0-9a-fA-F]{2})+)")
_ID = re.compile(r"token_id:(\d{1,9})")


@dataclass(frozen=True)
class VisibleToken:
    """One token of a position."""

    logprob: float
    """Natural, of the base's whole distribution."""
    data: bytes | None
    """None where the server shows only that it is a part of a letter."""
    id: int | None = None
    """The server's own."""

    @property
    def shown(self) -> str:
        """As a message names it."""
        if self.data is None:
            return "a part of a letter" + ("" if self.id is None else f" (id {self.id})")
        return repr(self.data.decode("utf-8", "backslashreplace"))


@dataclass(frozen=True)
class VisiblePosition:
    """The tokens of one position, the most probable first, and the one that the endpoint went on with."""

    tokens: tuple[VisibleToken, ...]
    chosen: VisibleToken

    @property
    def top(self) -> float:
        """The probability of the most probable token."""
        return math.exp(self.tokens[0].logprob)

    @property
    def least(self) -> float:
        """The smallest log-probability that is shown: what is not shown has no larger one."""
        return self.tokens[-1].logprob


@dataclass(frozen=True)
class Continued:
    """What an endpoint went on with after a prompt."""

    text: str
    ended: bool
    """Whether it stopped by itself, and not at the limit of tokens."""
    positions: tuple[VisiblePosition, ...] = ()

    def stored(self) -> str:
        """As the cache has it."""
        positions = [[*map(_row, p.tokens), _row(p.chosen)] for p in self.positions]
        return json.dumps([self.text, self.ended, positions])

    @classmethod
    def read(cls, stored: str) -> Continued:
        """What `stored` wrote."""
        text, ended, positions = json.loads(stored)
        found = [[_token(row) for row in rows] for rows in positions]
        return cls(text, ended, tuple(VisiblePosition(tuple(rows[:-1]), rows[-1]) for rows in found))


def _row(token: VisibleToken) -> list[Any]:
    return [token.logprob, None if token.data is None else token.data.hex(), token.id]


def _token(row: list[Any]) -> VisibleToken:
    logprob, data, index = row
    return VisibleToken(logprob, None if data is None else bytes.fromhex(data), index)


def read_answer(answer: endpoint.Answer, *, logprobs: bool) -> Continued:
    """What is in a response of either route. CallFailed where the tokens are not there that were asked for,
    or cannot be read."""
    match answer.content:
        case {"choices": [{"text": str(text)} as choice, *_]}:
            pass
        case {"choices": [{"message": {"content": str() | None as said}} as choice, *_]}:
            text = said or ""
        case _:
            raise answer.unreadable("has no text in choices[0]")
    ended = choice.get("finish_reason") not in ("length", "max_tokens")
    if not logprobs:
        return Continued(text, ended)
    match choice.get("logprobs"):
        case {"content": list(content)}:
            positions = [_position(answer, entry) for entry in content]
        case {"tokens": list(tokens), "top_logprobs": list(tops)} if len(tokens) == len(tops):
            positions = [_by_name(answer, token, top) for token, top in zip(tokens, tops, strict=True)]
        case None if not text.strip(BROKEN):  # the end, or a part of a letter (llama.cpp shows nothing there)
            positions = []
        case None | {} as shown if not any((shown or {}).values()):
            raise endpoint.CallFailed(
                "it shows no log-probabilities: it does not know `logprobs`, or leaves them out for this "
                "model",
                again=False,
                paid=True,
            )
        case _:
            raise answer.unreadable("has log-probabilities in a form that is not known")
    return Continued(text, ended, tuple(positions))


def _position(answer: endpoint.Answer, entry: Any) -> VisiblePosition:
    """A position as chat completions have it."""
    match entry:
        case {"top_logprobs": list(tops)} if tops:
            found = [_visible(answer, top) for top in tops]
        case {"top_logprobs": _}:
            raise _none_shown()
        case _:
            raise answer.unreadable("has a position without `top_logprobs`")
    return _sorted(answer, found, _visible(answer, entry))


def _by_name(answer: endpoint.Answer, token: Any, tops: Any) -> VisiblePosition:
    """A position as the older completions have it: token -> log-probability."""
    if not isinstance(tops, dict) or not isinstance(token, str):
        raise answer.unreadable("has a position without `top_logprobs`")
    if not tops:
        raise _none_shown()
    found = [_named(answer, name, value, None, None) for name, value in tops.items()]
    chosen = _named(answer, token, tops.get(token), None, None)
    return _sorted(answer, found, chosen)


def _none_shown() -> endpoint.CallFailed:
    return endpoint.CallFailed(
        "it shows no token of a position: ask for some with `top_logprobs`", again=False, paid=True
    )


def _sorted(answer: endpoint.Answer, found: list[VisibleToken], chosen: VisibleToken) -> VisiblePosition:
    """The possible tokens, the most probable first; equals as the server has them."""
    possible = sorted((t for t in found if t.logprob > -math.inf), key=lambda token: -token.logprob)
    if not possible:
        raise answer.unreadable("has a position of which every token is impossible")
    return VisiblePosition(tuple(possible), chosen)


def _visible(answer: endpoint.Answer, entry: Any) -> VisibleToken:
    match entry:
        case {"token": str(text)}:
            index = entry.get("id")
            known = index if type(index) is int and index >= 0 else None
            return _named(answer, text, entry.get("logprob"), entry.get("bytes"), known)
        case _:
            raise answer.unreadable("has a token without a text")


def _named(answer: endpoint.Answer, text: str, value: Any, data: Any, index: int | None) -> VisibleToken:
    """A token by its text and, where the server gives them, its bytes and its id."""
    if type(value) not in (int, float, type(None)):
        raise answer.unreadable(f"has the log-probability {str(value)[:20]!r}, which is none")
    logprob = -math.inf if value is None or value <= NOWHERE else float(value)
    if math.isnan(logprob) or logprob > ROUNDING:
        raise answer.unreadable(f"has the log-probability {logprob:g}, which is none")
    logprob = min(logprob, 0.0)
    if isinstance(data, list) and data and all(type(byte) is int and 0 <= byte < 256 for byte in data):
        return VisibleToken(logprob, bytes(data), index)
    if (spelt := _BYTES.fullmatch(text)) is not None:
        return VisibleToken(logprob, bytes.fromhex(spelt[1].replace("\\x", "")), index)
    if (named := _ID.fullmatch(text)) is not None:
        return VisibleToken(logprob, None, int(named[1]))
    if BROKEN in text:
        return VisibleToken(logprob, None, index)
    return VisibleToken(logprob, text.encode("utf-8", "surrogatepass"), index)
