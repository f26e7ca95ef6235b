"""A batch that responses join and leave between two steps: what a server decodes in.

`Decoder.steps` decodes what it was given at the start. Here every response has its own sampling, alpha, stop
strings and trace; what goes wrong with one of them ends that one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from proxytune.config import AlphaSchedule, Sampling
from proxytune.decoding.completions import NOT_NUMBERS, token_text
from proxytune.decoding.conversations import Conversation
from proxytune.decoding.decoder import Decoder
from proxytune.decoding.open_batch.responses import GrowingResponse, Piece
from proxytune.decoding.prompts import ids_of, noise_key, opened
from proxytune.decoding.response_text import decode
from proxytune.decoding.stop_strings import StopStrings
from proxytune.decoding.streaming import stop_predicate
from proxytune.engine import Chosen, Continuation, Request, Result, likelihoods
from proxytune.errors import UserError
from proxytune.records import FinishReason, Prompt

Ids = tuple[int, ...]
Contexts = Mapping[str, Ids]


@dataclass(frozen=True)
class Asked:
    """One response that is asked for."""

    contexts: Contexts
    """What every model sees, in its own ids."""
    sampling: Sampling
    example_id: str
    """With the sample and the seed it decides the noise, as in `Decoder.stream`."""
    sample: int
    alpha: AlphaSchedule
    trace: bool = False
    """Whether its tokens come, with every model's view of them; otherwise its text alone."""
    whole: bool = False
    """Whether it comes in one piece at its end, which costs less than many."""


@dataclass(frozen=True)
class ScoredText:
    """The log-probabilities of given ids, and what would come next."""

    logprobs: tuple[float, ...]
    """Of every id but the first, which follows nothing; NaN where the logits are no numbers."""
    ranked: tuple[tuple[tuple[int, float], ...], ...]
    """In the place of every id but the first, and after the last: the most probable tokens."""

    @property
    def fault(self) -> str | None:
        """Why it is no score; None where it is one."""
        return NOT_NUMBERS if any(map(math.isnan, self.logprobs)) else None


class OpenBatch:
    """Decodes as one role while responses come and go, and scores texts beside them."""

    def __init__(self, decoder: Decoder, ranked: int = 0) -> None:
        """`decoder` decodes nothing else meanwhile. A traced token has so many of each model's most probable
        ones."""
        self.decoder, self.ranked = decoder, ranked
        self._beside = decoder.beside()
        self._responses = dict[int, GrowingResponse]()
        self._engine = decoder.engine(self._hear, trace=True, ranked=ranked)

    # Prompts

    def of_text(self, text: str) -> Contexts:
        """A text as it is, for every model in its own ids; what stands for an empty text is the beginning of
        sequence."""
        contexts = {}
        for name, model in self.decoder.loaded.items():
            _require_unicode(text)
            ids = tuple(opened(model.tokenizer, text)) or (prefix_of(model.tokenizer),)
            model.require_rows(ids)
            contexts[name] = (*model.virtual_ids, *ids)
        return contexts

    def of_prompt(self, text: str) -> Contexts:
        """A text in every model's own format, as `Decoder.stream` has it. TemplateFault where one has none
        for it."""
        return self.decoder.contexts(Prompt(plain=text, user=text))

    def of_ids(self, ids: Sequence[int]) -> Contexts:
        """Ids of the model that decodes, as every model spells them. UserError for one that it has not."""
        size = self.decoder.ensemble.runners[self.decoder.target].alignment.size
        if not ids:
            raise UserError("the prompt has no tokens")
        if (wrong := next((token for token in ids if not 0 <= token < size), None)) is not None:
            raise UserError(f"the prompt has token {wrong}: the {self.decoder.target} has 0 to {size - 1}")
        runners = self.decoder.ensemble.runners
        return {
            name: (
                *model.virtual_ids,
                *(own for token in ids for own in runners[name].alignment.spell(token)),
            )
            for name, model in self.decoder.loaded.items()
        }

    def of_conversation(self, conversation: Conversation) -> Contexts:
        """A conversation in every model's own format. TemplateFault where one has none for it."""
        contexts, role = {}, self.decoder.role
        for name, model in self.decoder.loaded.items():
            text = conversation.text_for(name, role, model.spec, model.tokenizer)
            _require_unicode(text)
            ids = ids_of(model.spec, model.tokenizer, text) or (prefix_of(model.tokenizer),)
            model.require_rows(ids)
            contexts[name] = (*model.virtual_ids, *ids)
        return contexts

    def text_of(self, ids: Sequence[int]) -> str:
        """The text of ids of the model that decodes, without its special tokens."""
        return decode(self.decoder.tokenizer, ids)

    def token_text(self, token: int) -> str:
        """The text of one token of the model that decodes, or its name where it has none."""
        return token_text(self.decoder.text_of, token)

    def room(self, contexts: Contexts) -> int:
        """Tokens that a response may have at most, by windows and KV memory; less than 1 where there is no
        room."""
        runners = self.decoder.ensemble.runners
        return min(
            (min(runner.window, runner.rows.capacity) - len(contexts[name])) // runner.alignment.longest
            for name, runner in runners.items()
        )

    # Responses

    def submit(self, asked: Asked) -> int:
        """A response joins the batch. -> its ticket. UserError where it cannot be held even alone."""
        stops = StopStrings(self.decoder.text_of, asked.sampling.stop)
        response = GrowingResponse(stops, self.decoder.eos, traced=asked.trace, whole=asked.whole)
        request = Request(
            contexts=asked.contexts,
            key=noise_key(asked.sampling.seed, "", asked.example_id, asked.sample),
            sampling=asked.sampling,
            max_new_tokens=asked.sampling.max_new_tokens,
            alpha=asked.alpha,
            eos=self.decoder.eos,
            stop=_guarded(stop_predicate(stops), response),
            trace=asked.trace,
            tag=response,
        )
        ticket = self._engine.submit(request)
        self._responses[ticket] = response
        return ticket

    def cancel(self, ticket: int) -> bool:
        """A response leaves the batch, and its KV is free. -> False if it has ended already."""
        self._responses.pop(ticket, None)
        return self._engine.cancel(ticket)

    @property
    def busy(self) -> bool:
        """Whether a response is under way or waits."""
        return self._engine.busy

    def step(self) -> list[Piece]:
        """A step of the engine. -> what is new. An exception ends all responses; the batch is empty then."""
        try:
            results = self._engine.step()
        except BaseException:
            self.reset()
            raise
        ended = {id(result.request.tag): result for result in results}
        pieces = []
        for ticket, response in list(self._responses.items()):
            result = ended.get(id(response))
            if result is not None or response.fault is not None:
                pieces.append(self._last(ticket, response, result))
            elif not response.whole:
                text, tokens = response.taken()
                if text or tokens:
                    pieces.append(Piece(ticket, text, tokens, response.generated))
        return pieces

    def _last(self, ticket: int, response: GrowingResponse, result: Result | None) -> Piece:
        del self._responses[ticket]
        self._engine.cancel(ticket)
        if response.fault is None and result is not None:
            with _faulty(response):
                response.finish(result.tokens)
        if response.fault is not None or result is None:
            return Piece(ticket, "", (), response.generated, "fault", response.fault)
        reason: FinishReason = result.finish_reason  # type: ignore[assignment]
        text, tokens = response.taken()
        remark = NOT_NUMBERS if reason == "nan" else None
        return Piece(ticket, text, tokens, response.generated, reason, remark)

    def _hear(self, request: Request, chosen: Chosen) -> None:
        response = request.tag
        assert isinstance(response, GrowingResponse)
        with _faulty(response):
            response.hear(chosen)

    def reset(self) -> None:
        """All responses end, without results."""
        self.close()
        self._engine = self.decoder.engine(self._hear, trace=True, ranked=self.ranked)

    def close(self) -> None:
        """The caches are given back."""
        self._responses.clear()
        self._engine.close()

    # Texts that are scored

    def score(self, ids: Sequence[int], alpha: AlphaSchedule, ranked: int) -> ScoredText:
        """The log-probabilities of ids of the model that decodes: of every one after those before it."""
        first, after = self.of_ids(ids[:1]), (*ids[1:], 0)  # any token: the logits before it are wanted
        item = Continuation(first, after, tag="the prompt")
        [found] = likelihoods(self._beside, [item], [alpha], ranked=max(1, ranked))
        logprobs = found.logprobs[0].double().tolist()
        best = zip(found.ranked[0].tolist(), found.ranked_logprobs[0].tolist(), strict=True)
        return ScoredText(tuple(logprobs[:-1]), tuple(tuple(zip(*pair, strict=True)) for pair in best))

    # What goes on

    @property
    def running(self) -> int:
        """Responses that decode."""
        return len(self._engine.scheduler.rows)

    @property
    def waiting(self) -> int:
        """Responses that wait for room."""
        return len(self._engine.scheduler.waiting)

    def counts(self) -> Mapping[str, float]:
        """What the engine did since it was made: tokens, seconds, drafts."""
        return vars(self._engine.counts)

    def kv(self) -> Iterator[tuple[str, int, int]]:
        """Per model: its name, the tokens in its KV cache, and how many that holds."""
        for name, runner in self.decoder.ensemble.runners.items():
            yield name, sum(runner.rows.lengths), runner.rows.capacity


def prefix_of(tokenizer: object) -> int:
    """What stands for an empty text: the beginning of sequence, or its end where there is none."""
    for found in (getattr(tokenizer, "bos_token_id", None), getattr(tokenizer, "eos_token_id", None)):
        if found is not None:
            return int(found)
    raise UserError("the tokenizer has neither a beginning nor an end of sequence: the prompt must have text")


def _require_unicode(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"the prompt is not valid Unicode: {error.reason} at character {error.start}"
        ) from None


@contextmanager
def _faulty(response: GrowingResponse) -> Iterator[None]:
    """A tokenizer that fails on a response ends that one: the others go on."""
    try:
        yield
    except Exception as error:
        response.fault = f"its text cannot be read: {error}"


def _guarded(
    stop: Callable[[Sequence[int]], bool] | None, response: GrowingResponse
) -> Callable[[Sequence[int]], bool] | None:
    """A stop predicate whose failure ends its own response."""
    if stop is None:
        return None
    found = stop

    def ended(tokens: Sequence[int]) -> bool:
        at_end = True
        with _faulty(response):
            at_end = found(tokens)
        return at_end

    return ended
