"""One request to /v1/completions or /v1/chat/completions, from its body to its answer, whole or streamed."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from starlette.responses import Response
from starlette.types import Receive

from proxytune.decoding.open_batch import Piece, ScoredText, SeenToken
from proxytune.server.answers.calls import CallReader, ServedCall
from proxytune.server.answers.protocol import ChatBody, CompletionBody, ResponseBody
from proxytune.server.answers.streams import DONE, EventStream, JsonAnswer, attended, event
from proxytune.server.answers.writing import Json, Writer
from proxytune.server.faults import RequestFault, broken
from proxytune.server.work.service import ServedAnswer, Service


@dataclass(frozen=True)
class ChoicePiece:
    """What is new of one choice."""

    index: int
    text: str
    tokens: tuple[SeenToken, ...] = ()
    finish_reason: str | None = None
    echo: ScoredText | None = None
    """The scored prompt, with the piece that gives it back."""
    begins: bool = False
    """Whether the prompt is given back with it."""


@dataclass
class WholeChoice:
    """A choice of an answer that is sent whole."""

    text: str = ""
    tokens: list[SeenToken] = field(default_factory=list)
    finish_reason: str | None = None
    echo: ScoredText | None = None


class ServedReply:
    """The answer to one call: its events in the order of an answer, and how they are written."""

    def __init__(self, body: ResponseBody, call: ServedCall, answer: ServedAnswer, writer: Writer) -> None:
        self.body, self.call, self.answer, self.writer = body, call, answer, writer
        self.echo = isinstance(body, CompletionBody) and bool(body.echo)
        self._n = call.sampling.n
        self._scored: dict[int, ScoredText] = {}
        self._held: dict[int, list[Piece]] = {}
        self._begun: set[int] = set()

    async def pieces(self) -> AsyncIterator[ChoicePiece]:
        """What is new of every choice. The pieces of a prompt that is to be scored wait for that."""
        if self._silent and not self.call.job.texts:
            for prompt in range(len(self.call.heads)):
                for piece in self._without_response(prompt, None):
                    yield piece
        async for place, what in self.answer.events():
            if isinstance(what, ScoredText):
                prompt = place
                self._scored[prompt] = what
                if self._silent:
                    for piece in self._without_response(prompt, what):
                        yield piece
                for sample in range(self._n):
                    for held in self._held.pop(prompt * self._n + sample, []):
                        yield self._piece(prompt * self._n + sample, held)
            elif isinstance(what, Piece):
                if self.call.job.texts and place // self._n not in self._scored:
                    self._held.setdefault(place, []).append(what)
                else:
                    yield self._piece(place, what)

    @property
    def _silent(self) -> bool:
        """Whether nothing is decoded."""
        return not self.call.job.responses

    def _without_response(self, prompt: int, scored: ScoredText | None) -> list[ChoicePiece]:
        """The choices of a prompt for which nothing is decoded."""
        if self.call.next_from_score and scored is not None:
            return [self._piece(prompt, self.writer.next_token(scored))]
        return [
            ChoicePiece(prompt * self._n + sample, "", (), "length", scored, begins=True)
            for sample in range(self._n)
        ]

    def _piece(self, place: int, piece: Piece) -> ChoicePiece:
        self.writer.count(place, piece)
        reason = self.writer.finish_reason(piece)
        begins = place not in self._begun
        self._begun.add(place)
        scored = self._scored.get(place // self._n) if begins else None
        return ChoicePiece(place, piece.text, piece.tokens, reason, scored, begins=begins and self.echo)

    # Whole

    async def whole(self) -> Json:
        """The answer, once all of it is there."""
        choices: dict[int, WholeChoice] = {}
        async for piece in self.pieces():
            choice = choices.setdefault(piece.index, WholeChoice())
            choice.text += piece.text
            choice.tokens += piece.tokens
            choice.finish_reason = piece.finish_reason
            choice.echo = piece.echo or choice.echo
        written = [self._whole_choice(index, choice) for index, choice in sorted(choices.items())]
        return {**self.writer.envelope(written, chunk=False), "usage": self.writer.usage.json}

    def _whole_choice(self, index: int, choice: WholeChoice) -> Json:
        made = ChoicePiece(
            index, choice.text, tuple(choice.tokens), choice.finish_reason, choice.echo, begins=self.echo
        )
        if not isinstance(self.body, ChatBody):
            return self._text_choice(made)
        message = {"role": "assistant", "content": choice.text, "refusal": None}
        return {
            "index": index,
            "message": message,
            "logprobs": self.writer.logprobs(made.tokens, 0),
            "finish_reason": choice.finish_reason,
            **self._trace(made),
        }

    def _text_choice(self, piece: ChoicePiece) -> Json:
        """A choice of /v1/completions, or a part of one."""
        text, head = piece.text, self.call.heads[piece.index // self._n]
        before = len(head.text) if self.echo else 0
        logprobs = self.writer.logprobs(piece.tokens, before)
        if piece.begins:
            shown, scored = self.writer.echoed(head, piece.echo)
            text = shown + text
            if scored is not None and logprobs is not None:
                logprobs = {name: own + logprobs[name] for name, own in vars(scored).items()}
        return {
            "index": piece.index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": piece.finish_reason,
            **self._trace(piece),
        }

    def _trace(self, piece: ChoicePiece) -> Json:
        found = self.writer.trace(piece.tokens)
        return {} if found is None else {"proxytune_trace": found}

    # Streamed

    async def stream(self) -> AsyncIterator[bytes]:
        """The answer as events; those that are there at the same time go out together. A fault after the
        first is an event too, and the last one but [DONE]."""
        with_usage = bool(self.body.stream_options and self.body.stream_options.include_usage)
        rest = {"usage": None} if with_usage else {}
        spoken, there = set[int](), bytearray()
        try:
            async for piece in self.pieces():
                choice = self._delta(piece, spoken) if self.writer.chat else self._text_choice(piece)
                there += event({**self.writer.envelope([choice], chunk=True), **rest})
                if self.answer.waiting():
                    yield bytes(there)
                    there.clear()
            if with_usage:
                last = self.writer.envelope([], chunk=True)
                there += event({**last, "usage": self.writer.usage.json})
        except RequestFault as fault:
            if not spoken and not self._begun:
                raise
            there += event(fault.body)
        yield bytes(there) + DONE

    def _delta(self, piece: ChoicePiece, spoken: set[int]) -> Json:
        role = {} if piece.index in spoken else {"role": "assistant"}
        spoken.add(piece.index)
        return {
            "index": piece.index,
            "delta": {**role, "content": piece.text},
            "logprobs": self.writer.logprobs(piece.tokens, 0),
            "finish_reason": piece.finish_reason,
            **self._trace(piece),
        }


async def respond(
    service: Service, reader: CallReader, body: CompletionBody | ChatBody, receive: Receive
) -> Response:
    """Answer a request. RequestFault where there is no answer; ClientGone where nobody waits for it."""
    began = time.monotonic()
    calls = list[ServedCall]()

    def make() -> ServedCall:
        return reader.chat(body) if isinstance(body, ChatBody) else reader.completion(body)

    async def ask() -> ServedAnswer:
        count = reader.count(body)
        answer = await service.ask(count, lambda: _kept(calls, make()).job)
        return answer

    answer = await attended(receive, ask())
    reply = ServedReply(body, calls[0], answer, Writer(body, calls[0], reader.batch))

    def close(complete: bool) -> None:
        answer.close()
        seconds = time.monotonic() - began
        if complete:
            service.took(seconds)
        else:
            service.meters.cancelled.inc()

    if not body.stream:
        complete = False
        try:
            content = await attended(receive, reply.whole())
            complete = True
        finally:
            close(complete)
        return JsonAnswer(content)
    events = reply.stream()
    try:  # what is wrong with the request is known by then: it gets a status of its own
        first = await attended(receive, anext(events))
    except BaseException:
        close(False)
        raise
    service.meters.first.observe(time.monotonic() - began)
    return EventStream(_after(first, events), close)


def _kept(calls: list[ServedCall], call: ServedCall) -> ServedCall:
    calls.append(call)
    return call


async def _after(first: bytes, events: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Events, with the first of them that was taken already."""
    yield first
    try:
        async for one in events:
            yield one
    except RequestFault as fault:
        yield event(fault.body) + DONE
    except Exception as error:
        yield event(broken(f"this request failed: {type(error).__name__}").body) + DONE
        raise
