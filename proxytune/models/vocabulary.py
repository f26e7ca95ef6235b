"""Vocabularies aligned by token identity: logits may only be added where the same id means the same token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from proxytune import token_texts
from proxytune.engine.runners import VocabMap
from proxytune.errors import UserError

Tokenizer = Any
"""A Hugging Face tokenizer (transformers has no public type for it)."""


def size_of(tokenizer: Tokenizer, logits: int) -> int:
    """Ids that a model can generate: its tokenizer's, without the padding rows of its head (Qwen)."""
    return min(int(max(tokenizer.get_vocab().values())) + 1, logits)


def align(
    base: Tokenizer,
    size: int,
    other: Tokenizer,
    other_logits: int,
    name: str,
    mode: Literal["strict", "intersect"],
) -> VocabMap:
    """The map from the base's first `size` ids to those of the model called `name`, which has `other_logits`
    logits.

    strict: every base token must have the same id in the other; tokens that only the other has are cut.
    intersect: tokens of which the other has none with the same text are unshared (combine leaves them at
    the base's logits).
    Raises UserError that names the first ids that differ.
    """
    mine, theirs = _up_to(base, size), _up_to(other, other_logits)
    if all(theirs.get(token) == index for token, index in mine.items()):
        return VocabMap(size)
    if mode == "strict":
        raise UserError(str(_difference(mine, theirs, name)))
    shared = counterparts(base, mine, other, theirs)
    if not shared:
        raise UserError(f"the vocabularies of the base and the {name} have no token in common")
    return _intersection(base, size, other, mine, shared)


def difference(
    base: Tokenizer, size: int, other: Tokenizer, other_logits: int, name: str
) -> Difference | None:
    """Where the base's first `size` ids mean something else in the model called `name`; None if nowhere."""
    found = _difference(_up_to(base, size), _up_to(other, other_logits), name)
    return found if found.ids else None


def _up_to(tokenizer: Tokenizer, size: int) -> dict[str, int]:
    return {token: index for token, index in tokenizer.get_vocab().items() if index < size}


@dataclass(frozen=True)
class Difference:
    """Where two vocabularies differ."""

    name: str
    """The model that is compared with the base."""
    ids: tuple[int, ...]
    """The base's ids that mean something else there, in order."""
    of: int
    """How many tokens the base has."""
    first: tuple[tuple[int, str, str | None], ...]
    """The first of these ids: the token of the base, and the one there."""

    def __str__(self) -> str:
        shown = ", ".join(f"{i}: {token!r} is {other or 'nothing'!r} there" for i, token, other in self.first)
        return (
            f"the vocabularies of the base and the {self.name} differ at {len(self.ids)} of {self.of} ids "
            f"({shown}). Use models that share a tokenizer, or --vocab intersect to combine on the shared "
            "tokens only"
        )


def _difference(mine: Mapping[str, int], theirs: Mapping[str, int], name: str) -> Difference:
    differing = sorted((index, token) for token, index in mine.items() if theirs.get(token) != index)
    token_at = {index: token for token, index in theirs.items()}
    first = tuple((index, token, token_at.get(index)) for index, token in differing[:3])
    return Difference(name, tuple(index for index, _ in differing), len(mine), first)


def counterparts(
    base: Tokenizer, mine: Mapping[str, int], other: Tokenizer, theirs: Mapping[str, int]
) -> dict[str, int]:
    """Tokens of the base by their names -> the id of the other's token with the same text.

    Ordinary tokens are the same where they write the same bytes, however their vocabularies spell them
    (`Ġthe`, `▁the`); special ones by their names. Of several with one text, only one of each side counts:
    the one of the same name, or the first that is not a single byte's (`<0x0A>`). Where the base has no
    token of the name with which the other ends a text, it ends one with its own (`<eos>`, `<|im_end|>`)."""
    own, others = _ordinary(base, mine), _ordinary(other, theirs)
    special = {token: theirs[token] for token in mine.keys() & theirs.keys() - own.keys() - others.keys()}
    same = {token: theirs[token] for token, text in own.items() if others.get(token) == text}
    taken, at = {own[token] for token in same}, _first(others)
    rest = {
        token: theirs[at[text]] for text, token in _first(own).items() if text in at and text not in taken
    }
    return special | same | rest | _end(base, mine, other, theirs)


def _end(
    base: Tokenizer, mine: Mapping[str, int], other: Tokenizer, theirs: Mapping[str, int]
) -> dict[str, int]:
    """The base's end-of-sequence token -> the other's, where the base has none of that name."""
    if base.eos_token not in mine or other.eos_token not in theirs or other.eos_token in mine:
        return {}
    return {base.eos_token: theirs[other.eos_token]}


def _ordinary(tokenizer: Tokenizer, vocabulary: Mapping[str, int]) -> dict[str, bytes]:
    """Tokens that are not special -> their bytes, in the order of their ids."""
    spell = token_texts.speller(tokenizer)
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    special = {token.content for token in added if token.special}
    names = sorted(vocabulary.keys() - special, key=vocabulary.__getitem__)
    return {name: spell(name) for name in names}


def _first(texts: Mapping[str, bytes]) -> dict[bytes, str]:
    """Text -> the first token that writes it; a token for a single byte only where there is no other."""
    found: dict[bytes, str] = {}
    for token in sorted(texts, key=lambda token: token in token_texts.FALLBACK):
        found.setdefault(texts[token], token)
    return found


def _intersection(
    base: Tokenizer, size: int, other: Tokenizer, mine: Mapping[str, int], shared_with: Mapping[str, int]
) -> VocabMap:
    columns = torch.zeros(size, dtype=torch.long)
    shared = torch.zeros(size, dtype=torch.bool)
    spelled: list[tuple[int, ...]] = [(0,)] * size
    for token, index in mine.items():
        if token in shared_with:
            columns[index], shared[index] = shared_with[token], True
            spelled[index] = (shared_with[token],)
        else:
            text = base.convert_tokens_to_string([token]) or base.decode([index])
            # a token without text (a special one) is fed as id 0, which stands for "something unknown" in
            # most
            spelled[index] = tuple(other.encode(text, add_special_tokens=False)) or (0,)
    return VocabMap(size, columns, shared, tuple(spelled))
