"""A server's batch without a model, and an application without a socket."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from types import SimpleNamespace
from typing import Any

from proxytune.config import AlphaSchedule
from proxytune.decoding.open_batch import Piece, ScoredText
from proxytune.engine.ensemble import Ensemble
from proxytune.errors import UserError


class LetterTexts:
    """The text of tokens, of which one is shown nowhere."""

    hidden = frozenset({1})

    def __call__(self, ids: list[int]) -> str:
        """Says of what."""
        return f"text of {ids}"


class LetterBatch:
    """An open batch in which a letter is a token. It does what it is told to, and nothing by itself."""

    def __init__(self, virtual: tuple[int, ...] = (), rows: int = 3) -> None:
        runners: Any = {"base": SimpleNamespace(window=90), "expert": SimpleNamespace(window=80)}
        self.decoder = SimpleNamespace(
            target="base", loaded={"base": SimpleNamespace(virtual_ids=virtual)}, max_batch=rows,
            eos=frozenset({9}), text_of=LetterTexts(), ensemble=Ensemble(runners, "base"),
        )  # fmt: skip
        self.virtual, self.submitted, self.cancelled = virtual, list[Any](), list[int]()
        self.next: list[Piece] | Exception = []
        self.scored: ScoredText | Exception = ScoredText((), ())
        self.busy, self.running, self.waiting = True, 4, 5

    def of_text(self, text: str) -> dict[str, tuple[int, ...]]:
        """As it is."""
        return {"base": (*self.virtual, *map(ord, text))}

    def of_prompt(self, text: str) -> dict[str, tuple[int, ...]]:
        """In the format of a role: after a question mark."""
        return self.of_text(f"?{text}")

    def of_ids(self, ids: list[int]) -> dict[str, tuple[int, ...]]:
        """Ids as they are."""
        return {"base": (*self.virtual, *ids)}

    def of_conversation(self, conversation: Any) -> dict[str, tuple[int, ...]]:
        """Its plain text."""
        return self.of_text(conversation.plain)

    def text_of(self, ids: tuple[int, ...]) -> str:
        """Of ids."""
        return "".join(map(chr, ids))

    def token_text(self, token: int) -> str:
        """Tokens 7 and 8 have one text."""
        return {7: "xy", 8: "xy", 1: "<s>"}.get(token, f"t{token}")

    def room(self, context: Mapping[str, tuple[int, ...]]) -> int:
        """Of a window of 20."""
        return 20 - len(context["base"])

    def submit(self, asked: Any) -> int:
        """Tickets from 10 on."""
        if asked == "bad":
            raise UserError("it does not fit")
        if asked == "broken":
            raise RuntimeError("inside")
        self.submitted.append(asked)
        return 9 + len(self.submitted)

    def step(self) -> list[Piece]:
        """What was laid out."""
        if isinstance(self.next, Exception):
            raise self.next
        return self.next

    def cancel(self, ticket: int) -> None:
        """Remember it."""
        self.cancelled.append(ticket)

    def close(self) -> None:
        """Nothing is left."""
        self.busy = False

    def score(self, ids: tuple[int, ...], alpha: AlphaSchedule, ranked: int) -> ScoredText:
        """What was laid out."""
        if isinstance(self.scored, Exception):
            raise self.scored
        return self.scored

    def kv(self) -> list[tuple[str, int, int]]:
        """Of two caches."""
        return [("base", 6, 60), ("expert", 7, 70)]

    def counts(self) -> dict[str, int]:
        """All different."""
        return {"generated_tokens": 11, "prompt_tokens": 12, "drafted": 13, "examined": 14, "accepted": 15}


def sent(application: Callable[..., Awaitable[None]], *received: Any, **scope: Any) -> list[Any]:
    """What an application sends on what it receives."""
    found, left = list[Any](), list(received)

    async def receive() -> Any:
        if not left:
            await asyncio.sleep(3600)
        return left.pop(0)

    async def send(message: Any) -> None:
        found.append(message)

    whole = {"type": "http", "path": "/v1/models", "method": "GET", "headers": [], **scope}
    asyncio.run(application(whole, receive, send))
    return found
