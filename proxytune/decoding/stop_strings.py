"""Strings that end a response, and strings that it may not contain."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from proxytune.decoding.response_text import ResponseText, decode
from proxytune.errors import UserError
from proxytune.models import Tokenizer


def cut(text: str, stops: Sequence[str]) -> str:
    """The text before the first stop string."""
    found = [at for stop in stops if (at := text.find(stop)) >= 0]
    return text[: min(found)] if found else text


def stop_predicate(text_of: ResponseText, stops: Sequence[str]) -> Callable[[Sequence[int]], bool] | None:
    """Whether a response ends in a stop string: in its text, however it was tokenised, or as a special token,
    which the text does not show.

    Only as many last tokens are decoded as a stop string that ends in the newest one can span: a token with
    text is at least a byte. The first of them begins a letter: decoders that spell letters in bytes lose a
    whole run of bytes that begins within one."""
    if not stops:
        return None
    tokenizer = text_of.tokenizer
    reach = max(len(stop.encode("utf-8")) for stop in stops)
    hidden = {
        index: token.content for index, token in tokenizer.added_tokens_decoder.items() if token.special
    }
    ends = {index for index, text in hidden.items() if text in stops}

    def ended(tokens: Sequence[int]) -> bool:
        start, left = len(tokens), reach
        while start > 0 and left > 0:
            start -= 1
            left -= tokens[start] not in hidden
        tail = text_of(tokens[start:])
        if start > 0 and "\ufffd" in tail:
            while start > 0 and "\ufffd" in decode(tokenizer, tokens[start : start + 1]):
                start -= 1
            tail = text_of(tokens[start:])
        return tokens[-1] in ends or any(stop in tail for stop in stops)

    return ended


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
