"""The text of generated ids."""

from __future__ import annotations

from collections.abc import Sequence

from proxytune.models import Tokenizer


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
