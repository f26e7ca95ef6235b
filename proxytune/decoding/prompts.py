"""From text to ids and back: chat templates, every role's context, stop strings, streaming text.

Base and antiexpert see the plain prompt. A chat model's context has two forms, both as the paper's code makes
them (reference: its eval/templates.py and modeling/dexperts.py): `direct`, when it is evaluated as itself, is
made from the user's message; `in_ensemble`, the expert inside the proxy, is made from the plain prompt with
the response prefix taken out."""

from __future__ import annotations

import hashlib
from typing import Literal

from proxytune.config import Chat, ModelSpec, Role
from proxytune.errors import UserError
from proxytune.models import Tokenizer
from proxytune.records import Prompt

Form = Literal["direct", "in_ensemble"]


def text_for(chat: Chat, form: Form, prompt: Prompt, tokenizer: Tokenizer = None) -> str:
    """The text of one role's context."""
    if chat == "none":
        return prompt.plain
    message = prompt.user if form == "direct" else bare(prompt)
    if chat == "llama2":
        text = _llama2(form, message, prompt.system)
        return f"{text} {prompt.response_prefix}" if prompt.response_prefix else text
    messages = [{"role": "system", "content": prompt.system}] if prompt.system else []
    messages.append({"role": "user", "content": message})
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            "chat: tokenizer needs a chat template in the checkpoint: set `chat: llama2` or `chat: none`"
        )
    templated: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return templated + prompt.response_prefix


def bare(prompt: Prompt) -> str:
    """The plain prompt without its response prefix: every occurrence goes, as in the paper's code."""
    if not prompt.response_prefix:
        return prompt.plain.rstrip()
    return prompt.plain.replace(prompt.response_prefix, "").rstrip()


def _llama2(form: Form, message: str, system: str | None) -> str:
    if not system:
        return f"[INST] {message} [/INST]"
    if form == "direct":
        return f"[INST] <<SYS>>\n{system}\n<</SYS>>\n\n{message} [/INST]"
    return f"[INST]<<SYS>>\n{system}\n<</SYS>>\n\n {message} [/INST]"  # the published runs' whitespace


def context(spec: ModelSpec, tokenizer: Tokenizer, form: Form, prompt: Prompt) -> tuple[int, ...]:
    """The ids that a role sees before the response. A chat template of the tokenizer brings its own special
    tokens."""
    text = text_for(spec.chat, form, prompt, tokenizer)
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
