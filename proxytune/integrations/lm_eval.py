"""A system as a model of lm-eval: `simple_evaluate(model=ProxyTunedLM("demo"))`, `proxytune lm-eval`.

Weights are loaded with the first request, so that a task that is wrong or not at hand costs nothing."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, simple_parse_args_string
from tqdm import tqdm

from proxytune.config import AlphaSchedule, Sampling, System, load_system, parse_alpha
from proxytune.decoding import Conversation, Decoder
from proxytune.engine import Continuation, likelihoods
from proxytune.errors import UserError
from proxytune.integrations.lm_eval_requests import (
    ChatContext,
    ContextReader,
    Ids,
    names_of,
    prefix_of,
    sampling_of,
)
from proxytune.integrations.lm_eval_system import ModelArguments, SystemLM, say_what_loads
from proxytune.models import Models, process_peak
from proxytune.options import DecodeOptions
from proxytune.records import Example, Prompt


class ProxyTunedLM(SystemLM):
    """One role of a system, answering lm-eval's requests through proxytune's engine."""

    def __init__(
        self,
        system: System | str | Path,
        role: str = "proxy",
        *,
        alpha: AlphaSchedule | float | str | None = None,
        decode: DecodeOptions | None = None,
        models: Models | None = None,
        max_length: int | None = None,
        allow_negative_alpha: bool = False,
    ) -> None:
        """`models`: those of the system, where they are loaded already. UserError, before anything is loaded,
        for what is wrong with the system, the role or alpha."""
        made = system if isinstance(system, System) else load_system(system)
        asked = made.require(role)
        schedule = made.alpha if alpha is None else parse_alpha(alpha)
        schedule.check(allow_negative=allow_negative_alpha)
        given = models or Models(made, on_load=say_what_loads)
        given.check(given.names(asked))
        super().__init__(given, asked, schedule)
        self.system = made  # `models` may be those of a system that shares them
        self.options = decode or DecodeOptions()
        self._max_length = max_length
        self._too_long = Counter[str]()

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> ProxyTunedLM:
        """The model of --model_args."""
        given = ModelArguments.read(arg_dict, additional_config or {})
        system = given.system()
        return cls(
            system,
            given.role,
            alpha=given.alpha,
            decode=given.part(DecodeOptions),
            models=given.models(system),
            max_length=given.max_length,
            allow_negative_alpha=given.allow_negative_alpha,
        )

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: dict[str, Any] | None = None
    ) -> ProxyTunedLM:
        """The model of --model_args, as one text."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    # What is loaded

    @cached_property
    def decoder(self) -> Decoder:
        """The models of the role, loaded when they are first needed."""
        made = Decoder(self.models, self.role, self.options)
        for note in made.notes():
            self._note(note)
        return made

    @cached_property
    def _reader(self) -> ContextReader:
        return ContextReader(list(self.decoder.loaded.values()), self.role, self._note)

    @cached_property
    def max_length(self) -> int:
        """Tokens that every model can see."""
        runners = self.decoder.ensemble.runners
        room = [runners[m.name].window - len(m.virtual_ids) for m in self.decoder.loaded.values()]
        return min([*room, *([self._max_length] if self._max_length else [])])

    # Chat templates

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """What the first model sees of a conversation; every other model gets it in its own format later."""
        self._require_chat()
        name = self.names[0]
        conversation = Conversation.of(chat_history, begun=not add_generation_prompt)
        text = conversation.text_for(
            name, self.role, self.models.spec(name), self.models.tokenizer(name), self._note
        )
        return ChatContext.of(text, conversation)

    def _require_chat(self) -> None:
        """UserError unless a model of the system has a chat format. The others see a conversation as plain
        text."""
        system = self.system
        alone = [
            spec
            for spec in (system.local_base("lm-eval"), system.antiexpert, system.tuned)
            if spec is not None
        ]
        if all(spec.chat == "none" for spec in (*alone, *system.expert_specs)):
            raise UserError(
                f"--apply_chat_template: no model of system '{system.name}' has a chat format: set "
                "`chat: tokenizer` or `chat: llama2` in its file, or leave the option out"
            )

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The formats of all models, as lm-eval stores them."""
        if chat_template is False or chat_template is None:
            return None
        if isinstance(chat_template, str):
            raise UserError(
                f"--apply_chat_template '{chat_template}': a model has one chat format, which its system "
                "names: give the option without a value"
            )
        self._require_chat()
        return "\n".join(f"{name}: {format_}" for name, format_ in self._formats())

    # Likelihoods

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """The log-probability of every continuation, and whether greedy decoding would give it."""
        self._begin(requests)
        items = [self._continuation(*request.args[:2]) for request in requests]
        self._reader.forget()

        def hear(place: int, answer: tuple[float, bool]) -> None:
            self.cache_hook.add_partial("loglikelihood", requests[place].args, answer)

        return self._score(items, disable_tqdm, hear)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of every text, in windows that are as long as the models allow."""
        self._begin([])
        windows = list[tuple[None, list[int], list[int]]]()
        owners = list[int]()
        for place, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            pairs = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1)
            own = [(None, *make_disjoint_window(pair)) for pair in pairs]
            windows += own
            owners += [place] * len(own)
        totals = [0.0] * len(requests)
        answers = self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm)
        for place, (logprob, _) in zip(owners, answers, strict=True):
            totals[place] += logprob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        **_: object,
    ) -> list[tuple[float, bool]]:
        """As `loglikelihood`, of ids of the first model."""
        items = []
        for _text, context, continuation in requests:
            contexts: dict[str, Ids] = {}
            for name, runner in self.decoder.ensemble.runners.items():
                if context == [self.prefix_token_id]:
                    contexts[name] = (prefix_of(self.decoder.loaded[name].tokenizer),)
                else:
                    contexts[name] = tuple(own for token in context for own in runner.alignment.spell(token))
            items.append(self._fitted(contexts, tuple(continuation)))
        return self._score(items, disable_tqdm, lambda place, answer: None)

    def _continuation(self, context: str, continuation: str) -> Continuation:
        contexts, ids = self._reader.pair(context, continuation)
        if not ids:
            raise UserError(
                f"a continuation has no tokens of its own: {continuation!r} after {context[-40:]!r}"
            )
        return self._fitted(contexts, ids)

    def _fitted(self, contexts: Mapping[str, Ids], ids: Ids) -> Continuation:
        """A continuation after contexts that are cut on the left to what the models can see."""
        fitted = {}
        for name, runner in self.decoder.ensemble.runners.items():
            room = self.max_length - sum(len(runner.alignment.spell(token)) for token in ids[:-1])
            if room < 1:
                raise UserError(
                    f"a continuation of {len(ids)} tokens is longer than the {self.max_length} that the "
                    "models can see"
                )
            fitted[name] = (*self.decoder.loaded[name].virtual_ids, *self._cut(name, contexts[name], room))
        return Continuation(fitted, ids, tag="a request of lm-eval")

    def _cut(self, name: str, ids: Ids, room: int) -> Ids:
        """The last `room` ids of a context: lm-eval truncates on the left."""
        if len(ids) > room:
            self._too_long[name] += 1
        return ids[-room:]

    def _score(
        self,
        items: Sequence[Continuation],
        disable_tqdm: bool,
        hear: Callable[[int, tuple[float, bool]], None],
    ) -> list[tuple[float, bool]]:
        """Score continuations: those with the same context, or the same beginning, one after the other."""
        target = self.decoder.target
        order = sorted(range(len(items)), key=lambda place: items[place].contexts[target])
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(items)
        stats, before = self.decoder.stats, None
        began = time.perf_counter()
        found = likelihoods(self.decoder.ensemble, [items[place] for place in order], [self.alpha])
        shown = tqdm(found, "likelihoods", len(items), disable=disable_tqdm or not self.options.progress)
        for place, result in zip(order, shown, strict=True):
            answers[place] = float(result.logprobs[0].double().sum()), bool(result.greedy[0])
            hear(place, answers[place])
            context = result.continuation.contexts[target]
            stats.prompt_tokens += 0 if context == before else len(context)
            stats.generated_tokens += len(result.continuation.ids)
            before = context
        stats.seconds += time.perf_counter() - began
        self._end(sum(logprob != logprob for logprob, _ in answers), len(items))
        return answers

    # Responses

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """A response to every context, cut before the first of its stop strings."""
        eos = self.tokenizer.eos_token
        groups: dict[Sampling, list[int]] = {}
        for place, request in enumerate(requests):
            groups.setdefault(sampling_of(request.args[1], eos), []).append(place)
        self._begin(requests)
        names = names_of(requests)
        answers = [""] * len(requests)
        faults = 0
        with tqdm(
            total=len(requests), desc="responses", disable=disable_tqdm or not self.options.progress
        ) as bar:
            for sampling, places in groups.items():
                examples = {names[at]: self._example(names[at], requests[at], sampling) for at in places}
                place_of = dict(zip(examples, places, strict=True))
                for completion in self.decoder.stream(list(examples.values()), sampling, alpha=self.alpha):
                    place = place_of[completion.example_id]
                    answers[place] = completion.text
                    faults += completion.fault is not None
                    self.cache_hook.add_partial("generate_until", requests[place].args, completion.text)
                    bar.update()
        self._reader.forget()
        self._end(faults, len(requests))
        return answers

    def _example(self, name: str, request: Instance, sampling: Sampling) -> Example:
        """A request whose context is cut on the left to leave room for the response."""
        room = self.max_length - sampling.max_new_tokens
        if room < 1:
            raise UserError(
                f"{sampling.max_new_tokens} new tokens leave no room for a context in the {self.max_length} "
                "tokens that the models can see: --gen_kwargs max_gen_toks=N"
            )
        context = request.args[0]
        ids = {model: self._cut(model, own, room) for model, own in self._reader.context(context).items()}
        return Example(name, Prompt(plain=context, user=context, ids=ids))

    # What is said about a run

    def _begin(self, requests: Sequence[Instance]) -> None:
        """Requests come, each with its context."""
        self._too_long = Counter()
        chats = {name: spec.chat for name, spec in self._specs.items() if spec.chat != "none"}
        if chats and any(r.args[0] and not isinstance(r.args[0], ChatContext) for r in requests):
            named = " and ".join(f"the {name} (chat: {chat})" for name, chat in chats.items())
            self._note(
                f"{named} got plain texts, as all models did: --apply_chat_template gives it its format"
            )

    def _end(self, faults: int, n: int) -> None:
        """All requests of a call are answered."""
        if self._too_long:
            name, most = self._too_long.most_common(1)[0]
            self._note(
                f"{most} of {n} contexts were cut on the left for the {name}: models see {self.max_length} "
                "tokens"
            )
        if faults:
            self._note(f"{faults} of {n} answers have no sound logits (NaN or infinite)")
        for remark in self.decoder.remarks:
            self._note(remark)

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval stores beside its settings: the system, and what answering took."""
        found = super().get_model_info()
        if "decoder" in self.__dict__:
            memory = {name: one.model_dump() for name, one in self.decoder.memory.items()}
            cost = {**vars(self.decoder.stats), "memory": memory, "process_peak": process_peak()}
            found["proxytune"]["cost"] = cost
        return found
