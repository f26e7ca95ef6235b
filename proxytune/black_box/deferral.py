"""Deferral (nudging): the base writes, many tokens per request, and where its most probable token has less
than gamma, the expert writes one in its place.

That is another distribution than proxy-tuning: at every position one model alone decides. (Fei et al. 2024,
arXiv 2410.09300, let the small model write words; here it writes one token at a time.)"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from proxytune.black_box.client import Question
from proxytune.black_box.runner import ApiRunner
from proxytune.black_box.visible import Continued
from proxytune.config import Sampling
from proxytune.decoding import Decoder
from proxytune.engine import Engine, Ensemble, Request
from proxytune.errors import UserError
from proxytune.records import Completion, Example, FinishReason, Took
from proxytune.terminal import WorkSoFar

TOKENS = 16
"""Of one request: those after the first unsure one are paid for in vain."""


@dataclass
class Nudged:
    """One response under way."""

    example: Example
    context: tuple[int, ...]
    """What the expert sees before the response."""
    prompt: str
    item: int
    data: bytearray = field(default_factory=bytearray)
    ids: list[int] = field(default_factory=list)
    """The response so far, in the expert's ids."""
    tokens: int = 0
    by_expert: int = 0
    logprob: float = 0.0
    reason: FinishReason | None = None
    remark: str | None = None
    unsure: bool = False
    """Whether the expert is to speak next."""

    def text(self) -> str:
        """The response so far."""
        return self.data.decode("utf-8", "replace")

    @property
    def whole(self) -> bool:
        """Whether it ends with a whole letter, so that the base can be asked."""
        try:
            self.data.decode()
        except UnicodeDecodeError:
            return False
        return True


@dataclass
class Deferral:
    """Makes the responses of one call."""

    decoder: Decoder
    runner: ApiRunner
    gamma: float
    sampling: Sampling
    remarks: list[str] = field(default_factory=list)
    _finished: int = 0
    _tokens: int = 0
    _left: int = 0
    _seconds: float = 0.0

    def responses(self, examples: Sequence[Example]) -> Iterator[tuple[Example, Completion]]:
        """Every example with its response, as they finish."""
        waiting = [self._begun(example) for example in examples]
        self._left = len(waiting)
        rows: list[Nudged] = []
        most = self.runner.client.options.parallel
        while waiting or rows:
            while waiting and len(rows) < most:
                rows.append(waiting.pop(0))
            began = time.perf_counter()
            self._let_base_speak([row for row in rows if not row.unsure and row.reason is None])
            self._let_expert_speak([row for row in rows if row.unsure and row.reason is None])
            spent = time.perf_counter() - began
            self._seconds += spent
            ended = [row for row in rows if row.reason is not None]
            rows = [row for row in rows if row.reason is None]
            for row in ended:
                self._finished, self._left = self._finished + 1, self._left - 1
                self._tokens += row.tokens
                yield row.example, self._completion(row)

    def work(self) -> WorkSoFar:
        """What is known of them."""
        return WorkSoFar(
            finished=self._finished,
            finished_tokens=self._tokens,
            unread=self._left,
            decode_seconds=self._seconds,
        )

    def _begun(self, example: Example) -> Nudged:
        contexts = self.decoder.contexts_or_why(example, "")
        if isinstance(contexts, str):
            row = Nudged(example, (), "", 0, reason="template", remark=contexts)
            return row
        (number,) = contexts["base"]
        prompt = self.runner.prompts[number]
        return Nudged(example, contexts[self._expert], prompt.text, prompt.item)

    @property
    def _expert(self) -> str:
        terms = self.decoder.ensemble.terms
        if len(terms) != 1:
            raise UserError(f"--defer lets one expert speak, and the system has {len(terms)}")
        return terms[0].expert

    def _let_base_speak(self, rows: Sequence[Nudged]) -> None:
        """One request for each row: its tokens are taken up to the first of which the base is unsure."""
        questions = [
            Question(row.item, row.prompt + row.text(), min(TOKENS, self._room(row))) for row in rows
        ]
        for row, question, reply in zip(rows, questions, self.runner.client.ask(questions), strict=True):
            self._take(row, reply, question.max_tokens)

    def _room(self, row: Nudged) -> int:
        return self.sampling.max_new_tokens - row.tokens

    def _take(self, row: Nudged, reply: Continued, asked: int) -> None:
        for position in reply.positions:
            chosen = position.chosen
            ids = self.runner.tokens.find(chosen, same_ids=self.runner.tokens.same_ids(position))
            if position.top < self.gamma or chosen.data is None or chosen.data != position.tokens[0].data:
                row.unsure = True  # or a letter of several tokens, which some servers show as one
                return
            row.logprob += chosen.logprob
            row.tokens += 1
            data = chosen.data or (self.runner.tokens.data[ids[0]] if ids else b"")
            if not data or (ids and ids[0] in self._eos):
                row.reason = "eos"
                return
            row.data += data
            row.ids += ids[:1] or self.decoder.continued(data.decode("utf-8", "replace"))
            if self._stop(row) or row.tokens >= self.sampling.max_new_tokens:
                return
        if reply.ended:
            row.reason = "eos"
        elif len(reply.positions) < asked:
            row.unsure = True  # of a part of a letter some servers show nothing

    def _let_expert_speak(self, rows: Sequence[Nudged]) -> None:
        """One token of the expert for each row."""
        if not rows:
            return
        name = self._expert
        alone = Ensemble({name: self.decoder.ensemble.runners[name]}, name)
        engine = Engine(alone, max_rows=len(rows))
        by_ticket = {
            engine.submit(
                Request(
                    contexts={name: (*row.context, *row.ids)},
                    key=0,
                    sampling=Sampling(),
                    max_new_tokens=1,
                    eos=self._eos,
                    tag=row.example.id,
                )
            ): row
            for row in rows
        }
        by_id = {row.example.id: row for row in by_ticket.values()}
        try:
            while engine.busy:
                for result in engine.step():
                    self._said(by_id[str(result.request.tag)], result.tokens, result.logprob)
        finally:
            engine.close()

    def _said(self, row: Nudged, tokens: tuple[int, ...], logprob: float) -> None:
        """The expert's token, after which the base is asked again, unless it is a part of a letter."""
        if not tokens:
            row.reason = "nan"
            return
        row.tokens, row.by_expert, row.logprob = row.tokens + 1, row.by_expert + 1, row.logprob + logprob
        if tokens[0] in self._eos:
            row.reason = "eos"
            return
        row.ids.append(tokens[0])
        row.data += self.runner.tokens.data[tokens[0]]
        if not self._stop(row):
            row.unsure = not row.whole

    def _stop(self, row: Nudged) -> bool:
        """Whether the response ends here, by a stop string or by its length."""
        text = row.text()
        if any(stop in text for stop in self.sampling.stop):
            row.reason = "stop"
        elif row.tokens >= self.sampling.max_new_tokens:
            row.reason = "length"
        return row.reason is not None

    @property
    def _eos(self) -> frozenset[int]:
        return self.decoder.eos

    def _completion(self, row: Nudged) -> Completion:
        assert row.reason is not None
        text = row.text()
        found = [at for stop in self.sampling.stop if (at := text.find(stop)) >= 0]
        if row.tokens:
            self.remarks[:] = [f"deferral below {self.gamma:g}: another distribution than proxy-tuning"]
        return Completion(
            row.example.id,
            0,
            text[: min(found)] if found else text,
            tuple(row.ids),
            row.reason,
            row.logprob,
            remark=row.remark,
            took=Took(generated_tokens=row.tokens, deferred=row.by_expert),
        )
