"""Answers in OpenAI's shapes, as plain dicts: the types of the `openai` package describe them (app.py), and
tests read them with these types. Beside them stands `proxytune_trace`, where it was asked for."""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from proxytune.decoding.open_batch import OpenBatch, Piece, ScoredText, SeenToken
from proxytune.server.answers.calls import PromptHead, ServedCall
from proxytune.server.answers.protocol import ChatBody, CompletionBody, ResponseBody
from proxytune.server.faults import RequestFault

Json = dict[str, Any]
TRACE_TOP = 5
"""Most probable tokens per role in a trace."""
LEAST = -9999.0
"""A log-probability of minus infinity, which JSON has not: OpenAI writes it so."""
COMBINATION = "proxy"
"""How a trace names what decodes."""


@dataclass
class Usage:
    """Tokens of an answer."""

    prompt: int = 0
    generated: int = 0

    @property
    def json(self) -> Json:
        """As it is sent."""
        total = self.prompt + self.generated
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.generated,
            "total_tokens": total,
        }


@dataclass
class TokenNames:
    """The texts of tokens, each made once."""

    batch: OpenBatch
    known: dict[int, str] = field(default_factory=dict)

    def __call__(self, token: int) -> str:
        """The text of one token, or its name where it has none."""
        if token not in self.known:
            self.known[token] = self.batch.token_text(token)
        return self.known[token]


@dataclass
class TokenLogprobs:
    """`logprobs` of a choice of /v1/completions: four lists of the same length."""

    tokens: list[str] = field(default_factory=list)
    token_logprobs: list[float | None] = field(default_factory=list)
    top_logprobs: list[dict[str, float] | None] = field(default_factory=list)
    text_offset: list[int] = field(default_factory=list)

    def add(self, text: str, logprob: float | None, top: dict[str, float] | None, offset: int) -> None:
        """One token more."""
        self.tokens.append(text)
        self.token_logprobs.append(logprob)
        self.top_logprobs.append(top)
        self.text_offset.append(offset)


class Writer:
    """Writes the answer of one call, piece by piece."""

    def __init__(self, body: ResponseBody, call: ServedCall, batch: OpenBatch) -> None:
        self.body, self.call, self.name = body, call, TokenNames(batch)
        self.chat = isinstance(body, ChatBody)
        kind = "chatcmpl" if self.chat else "cmpl"
        self.id, self.created = f"{kind}-{secrets.token_hex(12)}", int(time.time())
        self.usage = Usage(prompt=sum(head.tokens for head in call.heads))
        self.alone = call.job.role != "proxy"
        self.ranked = self._asked_ranked(body)
        self._generated: dict[int, int] = {}

    @staticmethod
    def _asked_ranked(body: ResponseBody) -> int | None:
        if isinstance(body, CompletionBody):
            return body.logprobs
        assert isinstance(body, ChatBody)
        return (body.top_logprobs or 0) if body.logprobs else None

    def finish_reason(self, piece: Piece) -> str | None:
        """OpenAI's word for it. RequestFault where a response failed."""
        match piece.finish_reason:
            case None:
                return None
            case "eos" | "stop":
                return "stop"
            case "length":
                return "length"
        raise RequestFault(
            500, piece.remark or "the response failed", kind="server_error", code="model_error"
        )

    def count(self, place: int, piece: Piece) -> None:
        """Count what a piece brings."""
        self.usage.generated += piece.generated - self._generated.get(place, 0)
        self._generated[place] = piece.generated

    def envelope(self, choices: list[Json], *, chunk: bool) -> Json:
        """An answer, or a chunk of one."""
        kind = ("chat.completion.chunk" if chunk else "chat.completion") if self.chat else "text_completion"
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.body.model,
            "choices": choices,
        }

    # Tokens

    def logprobs(self, tokens: Sequence[SeenToken], before: int) -> Json | None:
        """`logprobs` of these tokens; the response begins `before` characters into the text. None where they
        were not asked for."""
        if self.ranked is None:
            return None
        if self.chat:
            return {
                "content": [self._chat_token(token) for token in tokens if not token.end],
                "refusal": None,
            }
        found = TokenLogprobs()
        for token in tokens:
            top = self.top(token.ranked.get(COMBINATION, ()), token.id, token.logprob)
            found.add(token.text, token.logprob, top, before + token.offset)
        return vars(found)

    def top(self, ranked: Sequence[tuple[int, float]], token: int, logprob: float) -> dict[str, float]:
        """The most probable tokens by text, and the chosen one. Of tokens that share a text the more probable
        one is shown."""
        found: dict[str, float] = {}
        for other, value in ranked[: self.ranked]:
            found.setdefault(self.name(other), logprob if other == token else finite(value))
        found.setdefault(self.name(token), finite(logprob))
        return found

    def _chat_token(self, token: SeenToken) -> Json:
        ranked = token.ranked.get(COMBINATION, ())[: self.ranked]
        return {
            **_spelt(token.text, token.logprob),
            "top_logprobs": [
                _spelt(self.name(other), token.logprob if other == token.id else value)
                for other, value in ranked
            ],
        }

    def trace(self, tokens: Sequence[SeenToken]) -> list[Json] | None:
        """`proxytune_trace` of these tokens; None where it was not asked for."""
        if not self.body.proxytune_trace:
            return None
        return [
            {
                "text": token.text,
                "id": token.id,
                "offset": token.offset,
                "end": token.end,
                "alpha": None if self.alone else token.alpha,
                "probability": {
                    role: value for role, value in token.probability.items() if self._shown(role)
                },
                "top": {
                    role: [
                        {"text": self.name(other), "id": other, "probability": math.exp(value)}
                        for other, value in ranked[:TRACE_TOP]
                    ]
                    for role, ranked in token.ranked.items()
                    if self._shown(role)
                },
            }
            for token in tokens
        ]

    def _shown(self, role: str) -> bool:
        """A model alone is its own combination."""
        return not (self.alone and role == COMBINATION)

    # The prompt that is given back

    def echoed(self, head: PromptHead, scored: ScoredText | None) -> tuple[str, TokenLogprobs | None]:
        """The prompt, and its scored tokens. RequestFault where its logits are no numbers."""
        if scored is None:
            return head.text, None
        if scored.fault is not None:
            raise RequestFault(500, scored.fault, kind="server_error", code="model_error")
        found, offset = TokenLogprobs(), 0
        for place, token in enumerate(head.ids):
            if place == 0:
                found.add(self.name(token), None, None, 0)
            else:
                logprob = scored.logprobs[place - 1]
                top = self.top(scored.ranked[place - 1], token, logprob)
                found.add(self.name(token), finite(logprob), top, offset)
            hidden = token in self.name.batch.decoder.text_of.hidden
            offset = min(len(head.text), offset + (0 if hidden else len(self.name(token))))
        return head.text, found

    def next_token(self, scored: ScoredText) -> Piece:
        """The greedy response of one token, which the scored prompt knows."""
        token, logprob = scored.ranked[-1][0]
        end = token in self.name.batch.decoder.eos
        text = "" if end else self.name.batch.decoder.text_of([token])
        ranked = {COMBINATION: scored.ranked[-1]}
        seen = SeenToken(token, self.name(token), 0, logprob, end, ranked=ranked)
        return Piece(0, text, (seen,), 1, "eos" if end else "length")


def finite(logprob: float) -> float:
    """A log-probability that JSON can hold."""
    return logprob if math.isfinite(logprob) else LEAST


def _spelt(text: str, logprob: float) -> Json:
    """A token of a chat's `logprobs`."""
    return {"token": text, "logprob": finite(logprob), "bytes": list(text.encode("utf-8", "replace"))}
