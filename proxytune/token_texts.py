"""What a token's name in a vocabulary stands for: the bytes that it writes."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

SPACE = "\u2581"
"""How SentencePiece writes a space."""
FALLBACK = {f"<0x{value:02X}>": bytes([value]) for value in range(256)}
"""SentencePiece's tokens for single bytes, with which it spells what it has no token for."""


def speller(tokenizer: Any) -> Callable[[str], bytes]:
    """The function from a token's name to its bytes: `Ġthe` of a vocabulary like GPT-2's and `▁the` of
    SentencePiece's are both " the". The name of a token that was added to a vocabulary is its text."""
    added = {token.content for token in getattr(tokenizer, "added_tokens_decoder", {}).values()}
    if _spells_bytes(tokenizer):
        letters = {letter: bytes([value]) for value, letter in _byte_letters().items()}
        return lambda name: (
            name.encode()
            if name in added
            else b"".join(letters.get(letter) or letter.encode() for letter in name)
        )
    return lambda name: (
        name.encode() if name in added else FALLBACK.get(name) or name.replace(SPACE, " ").encode()
    )


def _spells_bytes(tokenizer: Any) -> bool:
    """Whether the vocabulary is written in letters that stand for bytes, as GPT-2's."""
    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    if decoder is None:
        return False
    written = json.loads(decoder.__getstate__())
    return any(part["type"] == "ByteLevel" for part in (written, *written.get("decoders", [])))


def _byte_letters() -> dict[int, str]:
    """Byte -> the letter that stands for it in GPT-2's vocabulary."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [value for value in range(256) if value not in plain]
    return {value: chr(value) for value in plain} | {
        value: chr(256 + place) for place, value in enumerate(others)
    }
