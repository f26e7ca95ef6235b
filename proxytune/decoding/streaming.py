"""Text as it grows: what is shown is never taken back, and a stop string is found at the token that ends
it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from proxytune.decoding.response_text import GrowingText
from proxytune.decoding.stop_strings import StopStrings, cut


class TextStream:
    """The text of one response: pieces that later tokens cannot change, and never the beginning of a stop
    string. All pieces together are `final_text` of the tokens."""

    def __init__(self, stops: StopStrings) -> None:
        self.ended = False
        """Whether the text has come to a stop string."""
        self._stops, self._text = stops, GrowingText(stops.text_of, stops.marks)
        self._held = ""  # what may become a stop string

    @property
    def held(self) -> int:
        """Characters that are known and not shown yet: they may be the beginning of a stop string."""
        return 0 if self.ended else len(self._stops.plain(self._held))

    def push(self, token: int) -> str:
        """The new text that is safe to show."""
        if self.ended:
            return ""
        self._held += self._text.push(token)
        at = self._stops.find(self._held + self._text.open)
        if at is not None:
            self.ended = True
            return self._stops.plain(self._held)[:at]
        safe = self._stops.begun(self._held)
        piece, self._held = self._stops.plain(self._held[:safe]), self._held[safe:]
        return piece

    def finish(self) -> str:
        """What is left at the end."""
        return "" if self.ended else self._stops.plain(self._held) + self._text.open


def final_text(stops: StopStrings, tokens: Sequence[int]) -> str:
    """The text of a finished response, before the first stop string."""
    if stops.marks.keys().isdisjoint(tokens):
        return cut(stops.text_of(tokens), stops.stops)
    stream = TextStream(stops)
    return "".join([*map(stream.push, tokens), stream.finish()])


def stop_predicate(stops: StopStrings) -> Callable[[Sequence[int]], bool] | None:
    """Whether the tokens of one response, which grows from call to call, have come to a stop string."""
    if not stops.stops:
        return None
    stream, read = TextStream(stops), 0

    def ended(tokens: Sequence[int]) -> bool:
        nonlocal stream, read
        if len(tokens) <= read:  # begun anew
            stream, read = TextStream(stops), 0
        for token in tokens[read:]:
            stream.push(token)
        read = len(tokens)
        return stream.ended

    return ended
