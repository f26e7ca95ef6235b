"""From text to ids and back: chat templates, every role's context, stop strings, streaming text.

Base and antiexpert see the plain prompt. A chat model's context has two forms, both as the paper's code makes
them (reference: its eval/templates.py and modeling/dexperts.py): `direct`, when it is evaluated as itself, is
made from the user's message; `in_ensemble`, the expert inside the proxy, is made from the plain prompt with
the response prefix taken out."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Literal

from proxytune.config import Chat, ModelSpec, Role
from proxytune.decoding.templates import Message, TemplateFault, render
from proxytune.errors import UserError
from proxytune.models import Tokenizer
from proxytune.records import Prompt

Form = Literal["direct", "in_ensemble"]
Say = Callable[[str], None]
"""Hears what a chat template did that is worth knowing, as the end of a sentence about it."""

NO_SYSTEM = "takes no system message: the system text begins the first user message"


def text_for(
    chat: Chat, form: Form, prompt: Prompt, tokenizer: Tokenizer = None, say: Say | None = None
) -> str:
    """The text of one role's context. TemplateFault where the tokenizer's chat template gives none."""
    if chat == "none":
        return prompt.plain
    message = prompt.user if form == "direct" else bare(prompt)
    if chat == "llama2":
        text = llama2_turn(form, message, prompt.system)
        return f"{text} {prompt.response_prefix}" if prompt.response_prefix else text
    text, system_refused = templated(tokenizer, message, prompt.system)
    if system_refused and say is not None:
        say(NO_SYSTEM)
    return text + prompt.response_prefix


def templated(tokenizer: Tokenizer, message: str, system: str | None) -> tuple[str, bool]:
    """A user's message in the chat template of a tokenizer, as `conversed` gives it."""
    user: Message = {"role": "user", "content": message}
    return conversed(tokenizer, [{"role": "system", "content": system}, user] if system else [user])


def conversed(tokenizer: Tokenizer, messages: Sequence[Message]) -> tuple[str, bool]:
    """Messages in the chat template of a tokenizer, up to where the assistant speaks, and whether it refused
    the system message. Then the system text begins the first user message, as the family that refuses it
    (Gemma) was trained.

    TemplateFault where there is no text; it knows whether that depends on these texts."""
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            "chat: tokenizer needs a chat template in the checkpoint: set `chat: llama2` or `chat: none`"
        )
    try:
        return _conversed(tokenizer, messages)
    except TemplateFault as fault:
        others = _takes(tokenizer, [{**message, "content": "a"} for message in messages])
        raise TemplateFault(str(fault), of_these_texts=others) from None


def _conversed(tokenizer: Tokenizer, messages: Sequence[Message]) -> tuple[str, bool]:
    first, *others = messages
    if first["role"] != "system" or not others:
        return render(tokenizer, messages), False
    try:
        return render(tokenizer, messages), False
    except TemplateFault as fault:
        if not fault.refused:
            raise
        with suppress(TemplateFault):  # then it was not the system message: the first reason is the one
            joined = f"{first['content']}\n\n{others[0]['content']}"
            return render(tokenizer, [{**others[0], "content": joined}, *others[1:]]), True
        raise


def _takes(tokenizer: Tokenizer, messages: Sequence[Message]) -> bool:
    """Whether a chat template has a text for these."""
    try:
        _conversed(tokenizer, messages)
    except TemplateFault:
        return False
    return True


def bare(prompt: Prompt) -> str:
    """The plain prompt without its response prefix: every occurrence goes, as in the paper's code."""
    if not prompt.response_prefix:
        return prompt.plain.rstrip()
    return prompt.plain.replace(prompt.response_prefix, "").rstrip()


def llama2_turn(form: Form, message: str, system: str | None) -> str:
    """A user's message as Llama 2's chat models were tuned on it."""
    if not system:
        return f"[INST] {message} [/INST]"
    if form == "direct":
        return f"[INST] <<SYS>>\n{system}\n<</SYS>>\n\n{message} [/INST]"
    return f"[INST]<<SYS>>\n{system}\n<</SYS>>\n\n {message} [/INST]"  # the published runs' whitespace


def context(
    spec: ModelSpec, tokenizer: Tokenizer, form: Form, prompt: Prompt, say: Say | None = None
) -> tuple[int, ...]:
    """The ids that a role sees before the response."""
    return ids_of(spec, tokenizer, text_for(spec.chat, form, prompt, tokenizer, say))


def ids_of(spec: ModelSpec, tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    """The ids of the text of a context. A chat template of the tokenizer brings its own special tokens."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"a prompt is not valid Unicode: {error.reason} at character {error.start}") from None
    if spec.chat == "tokenizer":
        return tuple(tokenizer.encode(text, add_special_tokens=False))
    return tuple(opened(tokenizer, text))


def opened(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a text that a response is to follow, with the special tokens that the tokenizer puts before
    it. The beginning-of-sequence token is there once. An end-of-sequence token is not, unless the text has
    it: a tokenizer that was saved with `add_eos_token` puts one behind every text."""
    ids: list[int] = tokenizer.encode(text, add_special_tokens=True)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if bos is not None and ids[:2] == [bos, bos]:
        del ids[0]
    if eos is not None and ids[-1:] == [eos]:
        own = tokenizer.encode(text, add_special_tokens=False)[-1:] == [eos]
        while len(ids) > 1 and ids[-1] == eos:
            ids.pop()
        ids += [eos] * own
    return ids


def continued(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    """The ids of a text that goes on after other text: SentencePiece would add a space before it."""
    anchor = tokenizer.encode("a", add_special_tokens=False)
    ids = tokenizer.encode("a" + text, add_special_tokens=False)
    if ids[: len(anchor)] != anchor:  # the text's beginning melts into the anchor
        return tuple(tokenizer.encode(text, add_special_tokens=False))
    return tuple(ids[len(anchor) :])


def form_of(model: str, role: Role) -> Form:
    """Inside the proxy the experts see the ensemble form; whatever is evaluated as itself sees the direct
    one."""
    return "in_ensemble" if role == "proxy" and model.startswith("expert") else "direct"


def noise_key(seed: int, task: str, example_id: str, sample: int) -> int:
    """The 64-bit key of a response's noise, signed. Alpha and role are not in it, so that comparisons share
    noise."""
    content = "\x1f".join((str(seed), task, example_id, str(sample)))
    digest = hashlib.blake2b(content.encode("utf-8"), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
