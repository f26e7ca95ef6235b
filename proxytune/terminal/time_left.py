"""How long the rest of a call takes, from what is known of its sequences: the finished ones, and those that
are under way."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class WorkSoFar:
    """What is known of the sequences of one call: responses, or texts that are scored."""

    finished: int = 0
    finished_tokens: int = 0
    """Generated in those."""
    open: tuple[tuple[int, int], ...] = ()
    """For every response that is not finished: its tokens so far, and how many it may have."""
    unread: int = 0
    """Sequences whose prompts, or texts, were not computed yet."""
    decode_seconds: float = 0.0
    prefill_seconds: float = 0.0
    """Where texts are scored, all of the time."""
    scoring: bool = False
    spent: str = ""
    """What calls to a base behind an API have taken."""

    @property
    def tokens(self) -> int:
        """Generated so far."""
        return self.finished_tokens + sum(tokens for tokens, _ in self.open)

    @property
    def tokens_per_second(self) -> float | None:
        """While decoding; None before anything was generated."""
        return self.tokens / self.decode_seconds if self.tokens and self.decode_seconds else None

    def seconds_left(self) -> float | None:
        """An estimate; None before anything is known.

        A response ends with every token as likely as responses have so far: one for as many tokens as were
        generated per finished response, those of unfinished ones included. (Their mean length alone would be
        that of the short ones, which finish first.)"""
        read, speed = self.finished + len(self.open) - self.unread, self.tokens_per_second
        if self.scoring:
            read = self.finished
        if (self.unread and not read) or (self.open and speed is None):
            return None
        seconds = self.prefill_seconds / read * self.unread if self.unread else 0.0
        if self.open and speed is not None:
            ending = self.finished / self.tokens
            seconds += sum(_expected(limit - tokens, ending) for tokens, limit in self.open) / speed
        return seconds


def _expected(most: int, ending: float) -> float:
    """Tokens on average where each ends the response with the chance `ending`, and the last one in any
    case."""
    return float(most) if ending <= 0 else (1 - (1 - min(ending, 1.0)) ** most) / ending
