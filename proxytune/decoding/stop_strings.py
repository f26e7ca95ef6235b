"""Strings that end a response, and strings that it may not contain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from proxytune.decoding.response_text import ResponseText, decode
from proxytune.errors import UserError
from proxytune.models import Loaded, Tokenizer

FIRST_MARK = 0xD800
"""Special tokens are looked for as lone surrogates: no decoded text has any."""


def cut(text: str, stops: Sequence[str]) -> str:
    """The text before the first stop string."""
    found = [at for stop in stops if (at := text.find(stop)) >= 0]
    return text[: min(found)] if found else text


class StopStrings:
    """The stop strings of a call. They are found in the text of a response, however it was tokenised, and
    across special tokens, which the text does not show. A stop string that names special tokens
    (`<|im_end|>`, `</s> Question:`) is also found where these tokens are.

    For that a text is given with marks: a character for each special token that a stop string names."""

    def __init__(self, text_of: ResponseText, stops: Sequence[str]) -> None:
        self.text_of, self.stops = text_of, tuple(stops)
        named = {
            index: content
            for index, content in text_of.hidden.items()
            if content and any(content in stop for stop in stops)
        }
        self.marks = {index: chr(FIRST_MARK + place) for place, index in enumerate(named)}
        self._unmark = dict.fromkeys(map(ord, self.marks.values()))
        longest_first = sorted(named, key=lambda index: -len(named[index]))
        marked = []
        for stop in stops:
            for index in longest_first:
                stop = stop.replace(named[index], self.marks[index])
            marked.append(stop)
        self._marked = tuple(stop for stop in marked if stop not in self.stops)

    def plain(self, text: str) -> str:
        """A text without its marks."""
        return text.translate(self._unmark) if self._unmark else text

    def find(self, text: str) -> int | None:
        """Where in the plain form of a marked text the first stop string begins; None where there is none."""
        plain = self.plain(text)
        found = [at for stop in self.stops if (at := plain.find(stop)) >= 0]
        found += [len(self.plain(text[:at])) for stop in self._marked if (at := text.find(stop)) >= 0]
        return min(found, default=None)

    def begun(self, text: str) -> int:
        """How much of a marked text cannot be the beginning of a stop string."""
        plain = self.plain(text)
        held = max((_begun(plain, stop) for stop in self.stops), default=0)
        held_marked = max((_begun(text, stop) for stop in self._marked), default=0)
        return min(_before_last(text, held, self._unmark), len(text) - held_marked)


def _begun(text: str, stop: str) -> int:
    """Length of the longest end of a text with which a stop string begins."""
    sizes = range(min(len(stop) - 1, len(text)), 0, -1)
    return next((size for size in sizes if text.endswith(stop[:size])), 0)


def _before_last(text: str, count: int, marks: Mapping[int, None]) -> int:
    """Where the last `count` characters of a text begin, marks not counted."""
    at = len(text)
    while count:
        at -= 1
        count -= ord(text[at]) not in marks
    return at


def single_tokens(tokenizer: Tokenizer, texts: Sequence[str], size: int) -> frozenset[int]:
    """The ids whose text is exactly one of these texts, with or without a space before it. UserError if a
    text has none."""
    wanted = {text: False for text in texts}
    found = set()
    if wanted:
        for index in tokenizer.get_vocab().values():
            text = decode(tokenizer, [index]).removeprefix(" ")
            if index < size and text in wanted:
                found.add(index)
                wanted[text] = True
    missing = [text for text, known in wanted.items() if not known]
    if missing:
        raise UserError(f"cannot ban {missing[0]!r}: it is no single token of this vocabulary")
    return frozenset(found)


def own_eos(model: Loaded) -> set[int]:
    """A model's end-of-sequence ids: its tokenizer's, and those of its generation settings."""
    return ending_ids(getattr(model.module.generation_config, "eos_token_id", None), model.tokenizer)


def ending_ids(settings: list[int] | int | None, tokenizer: Tokenizer) -> set[int]:
    """The end-of-sequence ids of generation settings, and the tokenizer's own."""
    listed = settings if isinstance(settings, list) else [] if settings is None else [settings]
    own = tokenizer.eos_token_id
    return {*listed, *([] if own is None else [own])}
