"""The tokens of the experts by their bytes: how a base's tokens are found among them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from proxytune import token_texts
from proxytune.black_box.visible import VisiblePosition, VisibleToken
from proxytune.models import Tokenizer


@dataclass(frozen=True)
class TokenBytes:
    """The bytes of every token that a response can have, and the ids of equal ones."""

    data: Sequence[bytes]
    special: frozenset[int]
    eos: int | None
    ids: dict[bytes, list[int]] = field(default_factory=dict)
    """Ordinary tokens before special ones."""

    @classmethod
    def of(cls, tokenizer: Tokenizer, size: int) -> TokenBytes:
        """Those of a tokenizer's first `size` ids."""
        names = tokenizer.convert_ids_to_tokens(list(range(size)))
        added = {index: token for index, token in tokenizer.added_tokens_decoder.items() if index < size}
        spell = token_texts.speller(tokenizer)
        data = [spell(name or "") for name in names]
        special = frozenset(index for index, token in added.items() if token.special)
        found = cls(data, special, tokenizer.eos_token_id)
        for index in sorted(range(size), key=lambda index: index in special):
            found.ids.setdefault(data[index], []).append(index)
        return found

    def text(self, tokens: Iterable[int]) -> bytes:
        """The bytes of generated tokens in a row."""
        return b"".join(self.data[token] for token in tokens)

    def find(self, token: VisibleToken, *, same_ids: bool = False) -> list[int]:
        """The ids of a base's token. Of several with the same bytes, the one that has the base's id counts
        alone. Where the bytes are not known (a part of a letter), or hidden (llama.cpp shows special tokens
        as an empty text), the id is taken if ids are known to mean the same. Without ids, an empty text is
        the end of the sequence."""
        if not token.data:
            if same_ids and token.id is not None and token.id < len(self.data):
                return [token.id]
            return [] if token.data is None or self.eos is None else [self.eos]
        found = self.ids.get(token.data, [])
        return [token.id] if token.id in found else found

    def same_ids(self, position: VisiblePosition) -> bool:
        """Whether the ids of a position mean the same here: of every token with an id and bytes, and of one
        at least."""
        known = [t for t in position.tokens if t.id is not None and t.data]
        return bool(known) and all(token.id in self.ids.get(token.data or b"", []) for token in known)
