"""The base of a system behind an API, or the proxy on it: examples in, completions out, as with a decoder of
models that are all here.

Three ways, by what is asked: multiple choice through one position, free generation token by token through the
visible tokens, and deferral. As itself, the base writes its responses alone."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace

from proxytune.black_box.client import ApiClient, Question
from proxytune.black_box.deferral import Deferral
from proxytune.black_box.options_seen import SeenOptions, Shifts, option_forms, several_tokens, shifts_of
from proxytune.black_box.runner import ApiRunner
from proxytune.black_box.token_bytes import TokenBytes
from proxytune.config import AlphaSchedule, Role, Sampling, TraceKind
from proxytune.decoding import Decoder, SteppedDecoder, opened
from proxytune.engine.runners import Runner
from proxytune.engine.speculative import Speculation
from proxytune.errors import UserError
from proxytune.models import Loaded, Models
from proxytune.options import DecodeOptions
from proxytune.records import (
    Completion,
    Example,
    FinishReason,
    Prompt,
    RoleMemory,
    Took,
)
from proxytune.terminal import WorkSoFar

OnText = Callable[[str, int, str], None]
BLOCK = 4
"""Items whose answers are asked for before the experts see them, per request at a time."""
STOPS = 4
"""Stop strings that endpoints take."""

Finished = list[tuple[AlphaSchedule, Completion]]


@dataclass
class ApiBase:
    """The base as the decoder of the experts knows it."""

    client: ApiClient
    expert: str
    lenient: bool
    made: ApiRunner | None = None
    head: Loaded | None = None

    def runner(self, head: Loaded) -> Runner:
        """The endpoint as a model of the engine."""
        tokens = TokenBytes.of(head.tokenizer, head.size)
        self.head = head
        self.made = ApiRunner(self.client, tokens, self.expert, self.lenient, head.device)
        return self.made

    def context(self, prompt: Prompt) -> tuple[int, ...]:
        """The number of the plain prompt."""
        assert self.made is not None and self.head is not None
        if prompt.ids is not None:
            raise UserError("a base behind an API is asked in text: token ids alone are no prompt for it")
        ids = opened(self.head.tokenizer, prompt.plain) if self.client.spec.prompt_as == "ids" else []
        return (self.made.prompt(prompt.plain, tuple(ids)),)


@dataclass
class BlackBoxDecoder(SteppedDecoder):
    """Decodes as the base behind an API, or as the proxy on it."""

    models: Models
    role: Role
    options: DecodeOptions
    client: ApiClient
    defer: float | None = None
    remarks: list[str] = field(default_factory=list)
    """What a reader of the responses should know; it comes as they are made."""
    _inner: Decoder | None = None
    _api: ApiBase | None = None
    _progress: WorkSoFar = field(default_factory=WorkSoFar)
    _going: bool = False

    def __post_init__(self) -> None:
        """Load the experts, where the role needs them."""
        self.client.check()
        if self.role == "base":
            return
        how = self.options
        if how.draft_length or how.drafter is not None:
            raise UserError("an endpoint verifies no drafts: leave --speculate and --drafter out")
        if how.batch is None:
            how = how.model_copy(update={"batch": self.client.options.parallel})
        system = self.models.system
        self._api = ApiBase(self.client, self.models.names("proxy")[0], system.vocab == "intersect")
        self._inner = Decoder(self.models, "proxy", how, speculation=Speculation(k=0), remote=self._api)

    @property
    def inner(self) -> Decoder:
        """The decoder of the experts."""
        assert self._inner is not None, "the base alone needs none"
        return self._inner

    @property
    def memory(self) -> dict[str, RoleMemory]:
        """Bytes per model that runs here."""
        return {} if self._inner is None else self._inner.memory

    def notes(self) -> list[str]:
        """What a user should know about how the models are run."""
        spec = self.client.spec
        own = f"the base is {spec}, of which {spec.top_logprobs} tokens of a position are asked for"
        return [own, *([] if self._inner is None else self._inner.notes())]

    def work(self) -> WorkSoFar:
        """What is known of the call that is going on, and what it has spent."""
        found = self._inner.work() if self._going and self._inner is not None else self._progress
        return replace(found, spent=self.client.spent())

    def cancel(self, example_id: str, sample: int | None = None) -> bool:
        """End a response of the stream that is going on; -> False where none was left to end."""
        return self._going and self._inner is not None and self._inner.cancel(example_id, sample)

    def _say(self, *remarks: str) -> None:
        self.remarks += [remark for remark in remarks if remark not in self.remarks]

    # Free generation

    def steps(
        self,
        asked: Sequence[tuple[Example, Sequence[AlphaSchedule]]],
        sampling: Sampling,
        *,
        task: str = "",
        trace: TraceKind = "off",
        forced: str | None = None,
        on_text: OnText | None = None,
    ) -> Generator[Finished, None, None]:
        """As `Decoder.steps`."""
        if forced is not None:
            raise UserError("a forced opener is of models that are here: the base is behind an API")
        if trace != "off" and (self.role == "base" or self.defer is not None):
            raise UserError("--trace needs a distribution for every token, as --as proxy has one")
        if self.role == "base":
            yield from self._alone(asked, sampling, on_text)
            return
        self._require_prefix()
        if self.defer is not None:
            yield from self._deferred(asked, sampling, on_text)
            return
        inner = self.inner
        self._going = True
        try:
            with closing(inner.steps(asked, sampling, task=task, trace=trace, on_text=on_text)) as steps:
                prompts = {example.id: example.prompt for example, _ in asked}
                for finished in steps:
                    yield [(alpha, self._finished(one, prompts[one.example_id])) for alpha, one in finished]
        finally:
            self._going = False

    def _finished(self, completion: Completion, prompt: Prompt) -> Completion:
        """A response with what its calls took, and with its own reason where the endpoint was one."""
        assert self._api is not None and self._api.made is not None
        runner = self._api.made
        self._say(*self.inner.remarks, *sorted(runner.remarks))
        if completion.finish_reason == "template":
            return completion
        (number,) = self._api.context(prompt)
        called = self.client.took(runner.prompts[number].item)
        fault = runner.faults.get((number, *completion.token_ids))
        if completion.finish_reason == "nan" and fault is not None:
            completion = replace(completion, finish_reason="unseen", remark=fault)
        return replace(completion, took=_with_calls(completion.took, called))

    def _require_prefix(self) -> None:
        if self.client.spec.route == "chat":
            raise UserError(
                "a chat endpoint answers messages and cannot go on with a response token by token: set "
                "`route: completions` where the endpoint has it, or use --mode choices, or --as base"
            )

    def _alone(
        self,
        asked: Sequence[tuple[Example, Sequence[AlphaSchedule]]],
        sampling: Sampling,
        on_text: OnText | None,
    ) -> Iterator[Finished]:
        """The base's own responses: one request each."""
        _require_greedy(sampling, "the base behind an API")
        stop = sampling.stop[:STOPS] if len(sampling.stop) <= STOPS else ()
        questions = [
            Question(
                self.client.item(example.prompt.plain),
                example.prompt.plain,
                max_tokens=sampling.max_new_tokens,
                visible=False,
                stop=stop,
            )
            for example, _ in asked
        ]
        began, done = time.perf_counter(), 0
        for place, reply in self.client.replies(questions):
            example, alphas = asked[place]
            text, stopped = _before(reply.text, sampling.stop)
            reason: FinishReason = (
                "stop" if stopped or (reply.ended and stop) else "eos" if reply.ended else "length"
            )
            called = self.client.took(questions[place].item)
            seconds, began, done = time.perf_counter() - began, time.perf_counter(), done + 1
            took = Took(
                seconds=seconds,
                prompt_tokens=called.api_prompt_tokens,
                generated_tokens=called.api_completion_tokens,
            )
            self._progress = WorkSoFar(finished=done, unread=len(questions) - done, prefill_seconds=0.0)
            if on_text is not None:
                on_text(example.id, 0, text)
            completion = Completion(
                example.id,
                0,
                text,
                (),
                reason,
                0.0,
                took=_with_calls(took, called),
            )
            yield [(alpha, completion) for alpha in alphas]

    def _deferred(
        self,
        asked: Sequence[tuple[Example, Sequence[AlphaSchedule]]],
        sampling: Sampling,
        on_text: OnText | None,
    ) -> Iterator[Finished]:
        """Responses of the base, and of the expert where the base is unsure."""
        _require_greedy(sampling, "deferral")
        assert self._api is not None and self._api.made is not None and self.defer is not None
        deferral = Deferral(self.inner, self._api.made, self.defer, sampling)
        for example, completion in deferral.responses([example for example, _ in asked]):
            self._say(*self.inner.remarks, *deferral.remarks)
            self._progress = deferral.work()
            if on_text is not None:
                on_text(example.id, 0, completion.text)
            (number,) = self._api.context(example.prompt)
            called = self.client.took(self._api.made.prompts[number].item)
            completion = replace(completion, took=_with_calls(completion.took, called))
            alphas = next(alphas for one, alphas in asked if one.id == example.id)
            yield [(alpha, completion) for alpha in alphas]

    # Multiple choice

    def likelihood_sweep(
        self,
        examples: Sequence[Example],
        texts: Callable[[Example], Sequence[str]],
        alphas: Sequence[AlphaSchedule],
        task: str = "",
    ) -> Generator[tuple[AlphaSchedule, Completion], None, None]:
        """The log-probabilities of each example's options under all alphas, from one request per example."""
        if self.defer is not None:
            raise UserError("--defer is of responses: multiple choice compares the options of one position")
        block, done = BLOCK * self.client.options.parallel, 0
        seconds = 0.0
        self._progress = WorkSoFar(unread=len(examples), scoring=True)
        for start in range(0, len(examples), block):
            part = examples[start : start + block]
            began = time.perf_counter()
            found = list(self._block(part, texts, alphas, task))
            spent = time.perf_counter() - began
            seconds, done = seconds + spent, done + len(part)
            left = len(examples) - done
            self._progress = WorkSoFar(finished=done, unread=left, prefill_seconds=seconds, scoring=True)
            for alpha, completion in found:
                yield (
                    alpha,
                    replace(completion, took=replace(completion.took, seconds=spent / max(len(found), 1))),
                )

    def _block(
        self,
        examples: Sequence[Example],
        texts: Callable[[Example], Sequence[str]],
        alphas: Sequence[AlphaSchedule],
        task: str,
    ) -> Iterator[tuple[AlphaSchedule, Completion]]:
        """Some examples: what the endpoint shows of all of them, then what the experts say to that."""
        options = [list(texts(example)) for example in examples]
        contexts = [{} if self._inner is None else self._inner.contexts_or_why(e, task) for e in examples]
        asked = [place for place, context in enumerate(contexts) if not isinstance(context, str)]
        forms = self._forms([options[place] for place in asked])
        questions = [
            Question(self.client.item(examples[place].prompt.plain), examples[place].prompt.plain)
            for place in asked
        ]
        seen = [
            SeenOptions.of(reply, options[place], self.client.spec)
            for place, reply in zip(asked, self.client.ask(questions), strict=True)
        ]
        moved: Iterator[Shifts] = iter([[0.0] * len(options[place]) for place in asked])
        if self._inner is not None:
            moved = shifts_of(self._inner, [contexts[place] for place in asked], forms)  # type: ignore[misc]
            self._say(*self._inner.remarks)
        for place, own, shifts, question in zip(asked, seen, moved, questions, strict=True):
            called = self.client.took(question.item)
            yield from self._scored(examples[place], options[place], own, shifts, alphas, called)
        for place in set(range(len(examples))) - set(asked):
            for alpha in alphas:
                for number, text in enumerate(options[place]):
                    why = str(contexts[place])
                    yield (
                        alpha,
                        Completion(examples[place].id, number, text, (), "template", math.nan, remark=why),
                    )

    def _forms(self, options: Sequence[Sequence[str]]) -> list[list[list[int]]]:
        """The experts' tokens of every item's options. UserError for one that is no single token."""
        if self._inner is not None:
            return [option_forms(self._inner, own, self.client.spec) for own in options]
        for text in (text for own in options for text in own):
            if len(text.split()) > 1:
                raise several_tokens(text)
        return []

    def _scored(
        self,
        example: Example,
        options: Sequence[str],
        seen: SeenOptions | None,
        shifts: Shifts,
        alphas: Sequence[AlphaSchedule],
        called: Took,
    ) -> Iterator[tuple[AlphaSchedule, Completion]]:
        """The options of one example under every alpha; what the call took goes with the first."""
        shown = self.client.spec.top_logprobs
        why = f"none of the options is among the {shown} tokens that the endpoint shows"
        for alpha in alphas:
            scores = [math.nan] * len(options)
            if seen is not None:
                scores = seen.scores(shifts, 0.0 if self.role == "base" else alpha.at(0))
            for number, (text, score) in enumerate(zip(options, scores, strict=True)):
                took = Took(prompt_tokens=called.api_prompt_tokens) if number == 0 else Took()
                yield (
                    alpha,
                    Completion(
                        example.id,
                        number,
                        text,
                        (),
                        "length" if seen is not None else "unseen",
                        score,
                        remark=None if seen is not None else why,
                        bounded=None if seen is None else seen.bounded[number],
                        took=_with_calls(took, called) if number == 0 else took,
                    ),
                )
            called = Took()


def _with_calls(took: Took, called: Took) -> Took:
    """What a response took, with its calls."""
    return replace(
        took,
        api_calls=called.api_calls,
        api_prompt_tokens=called.api_prompt_tokens,
        api_completion_tokens=called.api_completion_tokens,
    )


def _require_greedy(sampling: Sampling, who: str) -> None:
    """UserError for settings that need a distribution at every token."""
    if sampling.temperature > 0 or sampling.n > 1:
        raise UserError(f"{who} answers greedily: leave temperature and n out, or sample as --as proxy does")
    if sampling.ban or sampling.ban_first or sampling.min_new_tokens:
        raise UserError(f"{who} knows no bans and no minimum: leave ban, ban_first, min_new_tokens out")


def _before(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """The text before the first stop string, and whether there was one."""
    found = [at for stop in stops if (at := text.find(stop)) >= 0]
    return (text[: min(found)], True) if found else (text, False)
