"""What lm-eval asks, as proxytune knows it: the contexts of every model, and how tokens are chosen.

lm-eval hands over texts and expects its own rules: how a text is split into context and continuation, what an
empty context is, what is cut where a window is too short."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.utils import normalize_gen_kwargs
from pydantic import ValidationError

from proxytune.config import Role, Sampling
from proxytune.decoding import Conversation, opened
from proxytune.errors import UserError
from proxytune.models import Loaded, Tokenizer
from proxytune.schema import explain

Ids = tuple[int, ...]
NEW_TOKENS = 256
"""Length of a response where the task has none: lm-eval's own."""
SETTINGS = ("do_sample", "max_gen_toks", "min_p", "seed", "temperature", "top_k", "top_p", "until")
"""What `generation_kwargs` of a task, or --gen_kwargs, may hold. lm-eval has other names for max_gen_toks."""
BIG_SEED = 1 << 63


class ChatContext(str):
    """A context that lm-eval made by a chat template: the text that the first model sees, and the
    conversation, which every model gets in its own format."""

    conversation: Conversation

    @classmethod
    def of(cls, text: str, conversation: Conversation) -> ChatContext:
        """The text and the conversation together."""
        made = cls(text)
        made.conversation = conversation
        return made


def sampling_of(given: Mapping[str, Any], eos: str | None) -> Sampling:
    """How tokens are chosen, by the generation settings of a request; UserError for one that we do not know.

    The seed is torch's, which lm-eval sets by --seed."""
    settings: dict[str, Any] = dict(normalize_gen_kwargs(dict(given), NEW_TOKENS))
    if settings.pop("num_beams", 1) != 1:
        raise UserError(f"generation setting num_beams={given['num_beams']}: beams are not supported, only 1")
    if unknown := sorted(settings.keys() - set(SETTINGS)):
        known = ", ".join(SETTINGS)
        raise UserError(f"generation setting '{unknown[0]}' is not supported; supported: {known}")
    until = [str(text) for text in (*settings["until"], eos) if text]
    drawn = bool(settings["do_sample"])
    temperature = float(settings.get("temperature", 1.0)) if drawn else 0.0
    cuts = {name: settings[name] for name in ("top_k", "top_p", "min_p") if drawn and name in settings}
    seed = int(settings.get("seed", torch.initial_seed() % BIG_SEED)) if temperature > 0 else 0
    made: dict[str, Any] = {"max_new_tokens": settings["max_gen_toks"], "temperature": temperature}
    try:
        return Sampling.model_validate({**made, **cuts, "seed": seed, "stop": tuple(dict.fromkeys(until))})
    except ValidationError as error:
        raise UserError(f"generation settings: {explain(error)}") from None


def prefix_of(tokenizer: Tokenizer) -> int:
    """What stands for an empty context: the beginning of sequence, or its end where there is none."""
    found = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if found is None:
        raise UserError("the tokenizer has neither a beginning nor an end of sequence to put before a text")
    return int(found)


@dataclass
class ContextReader:
    """Makes ids of lm-eval's texts, for every model of a decoder; the first is the one that decodes."""

    models: Sequence[Loaded]
    role: Role
    say: Callable[[str], None]
    """Hears what was done to prompts that a reader of the figures should know."""
    _known: dict[tuple[str, str, type[str]], Ids] = field(default_factory=dict)

    def context(self, context: str) -> dict[str, Ids]:
        """What every model sees before a response."""
        return {model.name: self._ids(model, self._text(model, context), context) for model in self.models}

    def pair(self, context: str, continuation: str) -> tuple[dict[str, Ids], Ids]:
        """What every model sees before a continuation, and the continuation in the first model's ids.

        As in lm-eval, white space at the end of the context belongs to the continuation, and both are
        tokenised as one text."""
        head, *others = self.models
        if context == "":
            ids, prefix = self._encode(head.tokenizer, continuation), prefix_of(head.tokenizer)
            if ids and ids[0] == prefix:
                ids = ids[1:]
            return {model.name: (prefix_of(model.tokenizer),) for model in self.models}, ids
        moved = context[len(context.rstrip()) :]
        before = context.removesuffix(moved)
        contexts = {head.name: self._ids(head, before, context)}
        whole = self._tokens(head, f"{context}{continuation}", context)
        for model in others:
            own = self._text(model, context).removesuffix(moved)
            contexts[model.name] = self._ids(model, own, context)
        return contexts, whole[len(self._tokens(head, before, context)) :]

    def forget(self) -> None:
        """Drop the ids of contexts that were read."""
        self._known.clear()

    def _text(self, model: Loaded, context: str) -> str:
        """The text that a model sees for a context."""
        if not isinstance(context, ChatContext):
            return context
        if model is self.models[0]:
            return str(context)
        return context.conversation.text_for(model.name, self.role, model.spec, model.tokenizer, self.say)

    def _ids(self, model: Loaded, text: str, context: str) -> Ids:
        """The ids of a context's text, never none."""
        key = (model.name, text, type(context))
        if key not in self._known:
            ids = self._tokens(model, text, context) or (prefix_of(model.tokenizer),)
            model.require_rows(ids)
            self._known[key] = ids
        return self._known[key]

    def _tokens(self, model: Loaded, text: str, context: str) -> Ids:
        """The ids of a text. A chat template brings its own special tokens."""
        if isinstance(context, ChatContext) and model.spec.chat == "tokenizer":
            return self._encode(model.tokenizer, text)
        return tuple(opened(model.tokenizer, text))

    def _encode(self, tokenizer: Tokenizer, text: str) -> Ids:
        return tuple(tokenizer.encode(text, add_special_tokens=False))


def names_of(requests: Sequence[Instance]) -> list[str]:
    """A name for every request, by its task, document and repetition: it decides the sampling noise."""
    seen = Counter[tuple[str, object, int]]()
    names = []
    for request in requests:
        key = (request.task_name or "", request.doc_id, request.idx)
        names.append("/".join(map(str, (*key, seen[key]))))
        seen[key] += 1
    return names
