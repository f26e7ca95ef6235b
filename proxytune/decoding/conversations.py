"""A conversation as every role sees it: in the chat format of its own, or as plain text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from proxytune.config import ModelSpec, Role
from proxytune.decoding.prompts import NO_SYSTEM, Form, Say, context, conversed, form_of, ids_of, llama2_turn
from proxytune.decoding.templates import Message, TemplateFault
from proxytune.models import Tokenizer
from proxytune.records import Prompt


@dataclass(frozen=True)
class Conversation:
    """Messages, and the text with which the answer to them is to begin."""

    messages: tuple[tuple[str, str], ...]
    """Who speaks (`system`, `user`, `assistant`), and what; the last one is not the assistant's."""
    begun: str = ""
    """The answer as far as it is given."""

    @classmethod
    def of(cls, messages: Sequence[Mapping[str, str]], *, begun: bool = False) -> Conversation:
        """The conversation of messages with `role` and `content`; `begun`: the last one is the beginning of
        the answer."""
        pairs = [(message["role"], message["content"]) for message in messages]
        return cls(tuple(pairs[:-1]), pairs[-1][1]) if begun else cls(tuple(pairs))

    @property
    def prompt(self) -> Prompt:
        """It as a prompt: every model of a decoder gets it in its own format."""
        return Prompt(self.plain, self.messages[-1][1], response_prefix=self.begun, messages=self.messages)

    def text_for(
        self, name: str, role: Role, spec: ModelSpec, tokenizer: Tokenizer, say: Say | None = None
    ) -> str:
        """What the model called `name` sees where `role` is what decodes. TemplateFault, which names the
        model, where the tokenizer's chat template has no text."""
        if spec.chat == "none":
            return self.plain
        if spec.chat == "llama2":
            return _joined(self._llama2(form_of(name, role)), self.begun, " ")
        messages: list[Message] = [{"role": who, "content": content} for who, content in self.messages]
        template = f"the chat template of the {name}"
        try:
            text, system_refused = conversed(tokenizer, messages)
        except TemplateFault as fault:
            message = f"{template} fails: {fault}"
            raise TemplateFault(message, of_these_texts=fault.of_these_texts) from None
        if system_refused and say is not None:
            say(f"{template} {NO_SYSTEM}")
        return text + self.begun

    @property
    def plain(self) -> str:
        """Without any format: answers follow their questions after a space, questions after an empty line,
        unless there is white space."""
        text = ""
        for role, content in (*self.messages, ("assistant", self.begun)):
            text = _joined(text, content, " " if role == "assistant" else "\n\n")
        return text

    def _llama2(self, form: Form) -> str:
        """Turns as Llama 2's chat models were tuned on them; the system message is in the first."""
        system: str | None = None
        text = ""
        for role, content in self.messages:
            if role == "system":
                system = _joined(system or "", content, "\n\n")
            elif role == "assistant":
                text = f"{text} {content} </s><s>"
            else:
                text, system = text + llama2_turn(form, content, system), None
        return text


def _joined(text: str, more: str, gap: str) -> str:
    """Two texts with a gap where they would touch."""
    touch = text and more and not text[-1].isspace() and not more[0].isspace()
    return f"{text}{gap if touch else ''}{more}"


def ids_seen(
    name: str, role: Role, spec: ModelSpec, tokenizer: Tokenizer, prompt: Prompt, say: Say, of: str = ""
) -> tuple[int, ...]:
    """The ids that a model of a role sees of a prompt without ids of its own. TemplateFault, which names the
    model and what the prompt is `of`, where a chat template fails."""
    if prompt.messages:
        spoken = Conversation(prompt.messages, prompt.response_prefix)
        return ids_of(spec, tokenizer, spoken.text_for(name, role, spec, tokenizer, say))
    template = f"the chat template of the {name}"
    try:
        return context(spec, tokenizer, form_of(name, role), prompt, partial(say, template))
    except TemplateFault as fault:
        message = f"{template} fails{of and f' on {of}'}: {fault}"
        raise TemplateFault(message, of_these_texts=fault.of_these_texts) from None
