"""Text as it grows: what is shown is never taken back."""

from __future__ import annotations

from collections.abc import Sequence

from proxytune.decoding.response_text import ResponseText
from proxytune.decoding.stop_strings import cut


class TextStream:
    """Text as it grows: pieces that later tokens cannot change, and never the beginning of a stop string."""

    def __init__(self, text_of: ResponseText, stops: Sequence[str]) -> None:
        self.text_of, self.stops = text_of, stops
        self._ids: list[int] = []
        self._streamed = 0

    def push(self, token: int) -> str:
        """The new text that is safe to show."""
        self._ids.append(token)
        text = self.text_of(self._ids)
        if text.endswith("\ufffd"):  # in the middle of a letter
            return ""
        return self._next_piece(self._safe(text))

    def finish(self) -> str:
        """What is left at the end."""
        return self._next_piece(cut(self.text_of(self._ids), self.stops))

    def _safe(self, text: str) -> str:
        """The text before a stop string, or before what may become one."""
        if any(stop in text for stop in self.stops):
            return cut(text, self.stops)
        begun = (size for stop in self.stops for size in range(1, len(stop)) if text.endswith(stop[:size]))
        return text[: len(text) - max(begun, default=0)]

    def _next_piece(self, safe: str) -> str:
        piece = safe[self._streamed :]
        self._streamed = max(self._streamed, len(safe))
        return piece
