"""The text of generated ids: of a whole response, and of one that still grows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby

from proxytune.models import Tokenizer
from proxytune.token_texts import FALLBACK

BROKEN = "\ufffd"
"""What stands for bytes that are no letter."""


def decode(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """The text of generated ids, special tokens left out and spaces as they are."""
    text: str = tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text


class ResponseText:
    """Decodes responses as continuations: SentencePiece decoders drop a leading space that belongs to the
    response.

    Bytes that are no letter are shown as U+FFFD each part, and the letters beside them are kept. Decoders
    with byte fallback would lose the whole run of bytes, so their bytes are joined here."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.hidden: Mapping[int, str] = {
            index: token.content for index, token in tokenizer.added_tokens_decoder.items() if token.special
        }
        """Special tokens, which the text does not show."""
        anchor = tokenizer.encode("a", add_special_tokens=False)
        self._anchor, self._skip = anchor, len(decode(tokenizer, anchor))
        self._bytes = self._fallback()

    def __call__(self, ids: Sequence[int]) -> str:
        """The text that `ids` add after a prompt."""
        if not self._bytes:
            return self._after_anchor(ids)
        shown = (index for index in ids if index not in self.hidden)
        parts = ((spelt, list(group)) for spelt, group in groupby(shown, self._bytes.__contains__))
        return "".join(
            bytes(self._bytes[index] for index in group).decode("utf-8", "replace")
            if spelt
            else self._after_anchor(group)
            for spelt, group in parts
        )

    def _after_anchor(self, ids: Sequence[int]) -> str:
        return decode(self.tokenizer, [*self._anchor, *ids])[self._skip :]

    def _fallback(self) -> dict[int, int]:
        """Tokens that stand for one byte each where letters are spelt in bytes (`<0xE2>`): id -> byte."""
        ids = self.tokenizer.convert_tokens_to_ids(list(FALLBACK))
        found = {
            index: byte[0]
            for (name, byte), index in zip(FALLBACK.items(), ids, strict=True)
            if index is not None and self.tokenizer.convert_ids_to_tokens(index) == name
        }
        letter = [index for value in "€".encode() for index, own in found.items() if own == value]
        return found if self._after_anchor(letter) == "€" else {}


KEPT = 8
"""Last tokens that are decoded anew with the next one: more than a letter has bytes."""


class GrowingText:
    """The text of a response token by token, at a cost that does not grow with it. Pieces add up to the text
    of all tokens; none is ever taken back."""

    def __init__(self, text_of: ResponseText, marks: Mapping[int, str]) -> None:
        """`marks`: special tokens that are shown, as these texts."""
        self.open = ""
        """A last letter that later tokens may still change."""
        self._text_of, self._marks = text_of, marks
        self._ids: list[int] = []
        self._given = 0  # characters of their text

    def push(self, token: int) -> str:
        """What a token adds to the text."""
        if token in self._text_of.hidden:
            return self._marks.get(token, "")
        self._ids.append(token)
        text = self._text_of(self._ids)
        self.open = BROKEN if text.endswith(BROKEN) else ""
        piece = text[self._given : len(text) - len(self.open)]
        self._given += len(piece)
        if len(self._ids) > 2 * KEPT:
            self._forget(len(text) - self._given)
        return piece

    def _forget(self, rest: int) -> None:
        """Go on with the last tokens alone. Their text ends as that of all does, once it is longer than the
        parts of one letter."""
        text = self._text_of(self._ids[-KEPT:])
        if len(text) > 3 or rest == 0:
            del self._ids[:-KEPT]
            self._given = len(text) - rest
