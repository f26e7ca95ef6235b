"""From text to ids and back: chat templates, every role's context, stop strings, streaming text.

Base and antiexpert see the plain prompt. A chat model's context has two forms, both as the paper's code makes
them (reference: its eval/templates.py and modeling/dexperts.py): `direct`, when it is evaluated as itself, is
made from the user's message; `in_ensemble`, the expert inside the proxy, is made from the plain prompt with
the response prefix taken out."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Literal

from proxytune.config import Chat, ModelSpec, Role
from proxytune.errors import UserError
from proxytune.models.vocabulary import Tokenizer
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
    return tuple(tokenizer.encode(text, add_special_tokens=spec.chat != "tokenizer"))


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


def decode(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """The text of generated ids, special tokens left out and spaces as they are."""
    text: str = tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text


class ResponseText:
    """Decodes responses as continuations: SentencePiece decoders drop a leading space that belongs to the
    response."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        anchor = tokenizer.encode("a", add_special_tokens=False)
        self._anchor, self._skip = anchor, len(decode(tokenizer, anchor))

    def __call__(self, ids: Sequence[int]) -> str:
        """The text that `ids` add after a prompt."""
        return decode(self.tokenizer, [*self._anchor, *ids])[self._skip :]


def cut(text: str, stops: Sequence[str]) -> str:
    """The text before the first stop string."""
    found = [at for stop in stops if (at := text.find(stop)) >= 0]
    return text[: min(found)] if found else text


def stop_predicate(text_of: ResponseText, stops: Sequence[str]) -> Callable[[Sequence[int]], bool] | None:
    """Whether a response contains a stop string, looked for in its text, however it was tokenised.

    Only as many last tokens are decoded as a stop string that ends in the newest one can span: a token stands
    for a byte at least, and a few more cover letters that a byte sequence is cut in."""
    if not stops:
        return None
    reach = max(len(stop.encode("utf-8")) for stop in stops) + 8

    def ended(tokens: Sequence[int]) -> bool:
        tail = text_of(tokens[-reach:])
        return any(stop in tail for stop in stops)

    return ended


def single_tokens(tokenizer: Tokenizer, texts: Sequence[str], size: int) -> frozenset[int]:
    """The ids that say exactly one of these texts, with or without a space before it. UserError if a text has
    none."""
    wanted = {text: False for text in texts}
    found = set()
    if wanted:
        for index in tokenizer.get_vocab().values():
            said = decode(tokenizer, [index])
            text = said.removeprefix(" ")
            if index < size and text in wanted:
                found.add(index)
                wanted[text] = True
    missing = [text for text, known in wanted.items() if not known]
    if missing:
        raise UserError(f"cannot ban {missing[0]!r}: it is no single token of this vocabulary")
    return frozenset(found)


class TextStream:
    """Text as it grows: pieces that later tokens cannot change, and never the beginning of a stop string."""

    def __init__(self, text_of: ResponseText, stops: Sequence[str]) -> None:
        self.text_of, self.stops = text_of, stops
        self._ids: list[int] = []
        self._told = 0

    def push(self, token: int) -> str:
        """The new text that is safe to show."""
        self._ids.append(token)
        text = self.text_of(self._ids)
        if text.endswith("\ufffd"):  # in the middle of a letter
            return ""
        return self._tell(self._safe(text))

    def finish(self) -> str:
        """What is left at the end."""
        return self._tell(cut(self.text_of(self._ids), self.stops))

    def _safe(self, text: str) -> str:
        """The text before a stop string, or before what may become one."""
        if any(stop in text for stop in self.stops):
            return cut(text, self.stops)
        begun = (size for stop in self.stops for size in range(1, len(stop)) if text.endswith(stop[:size]))
        return text[: len(text) - max(begun, default=0)]

    def _tell(self, safe: str) -> str:
        piece = safe[self._told :]
        self._told = max(self._told, len(safe))
        return piece
