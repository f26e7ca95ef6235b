"""From the body of a request to a job: prompts in every model's ids, sampling, alpha, and what to write."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from proxytune.config import MIN_TEMPERATURE, AlphaSchedule, Role, Sampling, parse_alpha
from proxytune.decoding import Conversation
from proxytune.decoding.open_batch import Asked, OpenBatch
from proxytune.errors import UserError
from proxytune.options import ServeOptions
from proxytune.records import named_by_content
from proxytune.server.answers.protocol import ChatBody, CompletionBody, MessageBody, ResponseBody
from proxytune.server.faults import RequestFault
from proxytune.server.work.jobs import ServedJob, TextToScore

UNLIMITED = 1 << 30
"""More tokens than any window has."""
LONGEST_STOP = 1000
"""Characters of a stop string."""
Contexts = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class PromptHead:
    """A prompt of a request as its answer shows it."""

    text: str
    """What `echo` gives back."""
    ids: tuple[int, ...]
    """Of the model that decodes."""
    tokens: int
    """What the answer counts."""


@dataclass(frozen=True)
class ServedCall:
    """A request that was read: what its answer is written by."""

    job: ServedJob
    heads: tuple[PromptHead, ...]
    sampling: Sampling
    next_from_score: bool = False
    """Whether the one token of every response is read off the scored prompt."""


@dataclass(frozen=True)
class CallReader:
    """Reads requests to one role."""

    batch: OpenBatch
    role: Role
    options: ServeOptions
    allow_negative_alpha: bool
    system_alpha: AlphaSchedule

    def count(self, body: ResponseBody) -> int:
        """Responses and texts that a request asks for. RequestFault where they are too many."""
        prompts = len(_prompts(body)) if isinstance(body, CompletionBody) else 1
        asked = prompts * (body.n or 1)
        if asked > self.options.max_choices:
            raise RequestFault(
                400,
                f"the request asks for {asked} responses ({prompts} prompts, n = {body.n or 1}): at most "
                f"{self.options.max_choices} are allowed",
                param="n",
            )
        scored = isinstance(body, CompletionBody) and body.echo and body.logprobs is not None
        return asked + (prompts if scored else 0)

    def completion(self, body: CompletionBody) -> ServedCall:
        """A request of /v1/completions. UserError for bad input; it reads texts and takes a while."""
        prompts = _prompts(body)
        if body.max_tokens == 0 and not body.echo:
            raise UserError("max_tokens = 0 gives nothing: use it with echo, or ask for 1 at least")
        sampling, alpha = self._sampling(body, body.max_tokens), self._alpha(body)
        trace = body.proxytune_trace or (body.logprobs is not None)
        scored = bool(body.echo) and body.logprobs is not None
        by_score = scored and not body.proxytune_trace and _one_greedy_token(body, sampling)
        in_roles = body.proxytune_format == "roles"
        if in_roles and (scored or not all(isinstance(prompt, str) for prompt in prompts)):
            raise UserError("proxytune_format 'roles' is of texts, and without echo of logprobs: use 'plain'")
        contexts = [self._context(prompt, in_roles) for prompt in prompts]
        target, virtual = self.batch.decoder.target, self._virtual
        ids = [context[target][virtual:] for context in contexts]
        texts = [
            prompt if isinstance(prompt, str) else self.batch.text_of(own)
            for prompt, own in zip(prompts, ids, strict=True)
        ]
        heads = tuple(PromptHead(text, own, len(own)) for text, own in zip(texts, ids, strict=True))
        names = [example.id for example in named_by_content(texts)]
        silent = by_score or body.max_tokens == 0
        responses = [
            Asked(
                context,
                self._fitting(sampling, context, body.max_tokens),
                name,
                sample,
                alpha,
                trace,
                whole=not body.stream,
            )
            for context, name in zip(contexts, names, strict=True)
            for sample in range(0 if silent else sampling.n)
        ]
        to_score = [TextToScore(own, alpha, body.logprobs or 0) for own in ids] if scored else []
        return ServedCall(ServedJob(self.role, responses, to_score), heads, sampling, by_score)

    def chat(self, body: ChatBody) -> ServedCall:
        """A request of /v1/chat/completions."""
        if body.top_logprobs is not None and not body.logprobs:
            raise UserError("top_logprobs needs logprobs: true")
        limit = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        sampling, alpha = self._sampling(body, limit), self._alpha(body)
        conversation = conversation_of(body)
        context = dict(self.batch.of_conversation(conversation))
        ids = context[self.batch.decoder.target]
        [example] = named_by_content([conversation.plain])
        trace = body.proxytune_trace or bool(body.logprobs)
        responses = [
            Asked(
                context,
                self._fitting(sampling, context, limit),
                example.id,
                sample,
                alpha,
                trace,
                whole=not body.stream,
            )
            for sample in range(sampling.n)
        ]
        head = PromptHead("", ids, len(ids) - self._virtual)
        return ServedCall(ServedJob(self.role, responses), (head,), sampling)

    @property
    def _virtual(self) -> int:
        """Ids of a soft prompt, which nobody sent."""
        return len(self.batch.decoder.loaded[self.batch.decoder.target].virtual_ids)

    def _context(self, prompt: str | list[int], in_roles: bool) -> Contexts:
        if not isinstance(prompt, str):
            return dict(self.batch.of_ids(prompt))
        return dict(self.batch.of_prompt(prompt) if in_roles else self.batch.of_text(prompt))

    def _fitting(self, sampling: Sampling, context: Contexts, limit: int | None) -> Sampling:
        """Without a limit, as many tokens as there is room for."""
        if limit is not None:
            return sampling
        return sampling.model_copy(update={"max_new_tokens": max(1, self.batch.room(context))})

    def _alpha(self, body: ResponseBody) -> AlphaSchedule:
        if body.alpha is None:
            return self.system_alpha
        if self.role != "proxy":
            raise UserError(f"alpha acts on the proxy only: leave it out for '{body.model}'")
        try:
            return parse_alpha(body.alpha).check(allow_negative=self.allow_negative_alpha)
        except UserError as error:
            said = str(error).replace(
                "add --allow-negative-alpha", "start the server with --allow-negative-alpha"
            )
            raise UserError(said) from None

    def _sampling(self, body: ResponseBody, limit: int | None) -> Sampling:
        stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
        if len(stop) > self.options.max_stops:
            raise UserError(f"stop has {len(stop)} strings: at most {self.options.max_stops} are allowed")
        if any(len(text) > LONGEST_STOP for text in stop):
            raise UserError(f"a stop string has more than {LONGEST_STOP} characters")
        temperature = 1.0 if body.temperature is None else body.temperature
        if 0 < temperature < MIN_TEMPERATURE:
            raise UserError(
                f"temperature {temperature:g} is below {MIN_TEMPERATURE:g}: use 0 for greedy decoding"
            )
        drawn = secrets.randbits(62) if temperature > 0 else 0
        return Sampling(
            max_new_tokens=max(1, UNLIMITED if limit is None else min(limit, UNLIMITED)),
            min_new_tokens=min(body.min_tokens or 0, UNLIMITED),
            temperature=temperature,
            top_k=max(0, min(body.top_k or 0, UNLIMITED)),
            top_p=1.0 if body.top_p is None else body.top_p,
            min_p=body.min_p or 0.0,
            n=body.n or 1,
            seed=drawn if body.seed is None else body.seed,
            stop=tuple(stop),
        )


def conversation_of(body: ChatBody) -> Conversation:
    """The messages of a request. UserError where there is nothing to answer."""
    last = body.messages[-1].role
    if body.continue_final_message and last != "assistant":
        raise UserError(f"continue_final_message: the last message is of the {last}, not of the assistant")
    if last == "assistant" and not body.continue_final_message:
        raise UserError(
            "the last message is the assistant's: end with a user's, or set continue_final_message to go on "
            "with it"
        )
    return conversation_of_messages(body.messages, begun=body.continue_final_message)


def conversation_of_messages(messages: Sequence[MessageBody], *, begun: bool = False) -> Conversation:
    """The turns of a conversation; `begun`: the last one is the beginning of the answer."""
    pairs = [
        {"role": "system" if turn.role == "developer" else turn.role, "content": turn.text}
        for turn in messages
    ]
    return Conversation.of(pairs, begun=begun)


def _prompts(body: CompletionBody) -> Sequence[str | list[int]]:
    """The prompts of a request, one by one. RequestFault where there is none."""
    prompt = body.prompt
    if isinstance(prompt, str):
        return [prompt]
    if not prompt or prompt == [[]]:
        raise RequestFault(400, "the prompt is an empty list", param="prompt")
    if isinstance(prompt[0], int):
        return [prompt]
    return prompt


def _one_greedy_token(body: CompletionBody, sampling: Sampling) -> bool:
    """Whether the response is the most probable token alone, which is known once the prompt is scored."""
    greedy = sampling.temperature == 0 and sampling.n == 1
    return greedy and body.max_tokens == 1 and not sampling.stop and sampling.min_new_tokens == 0
