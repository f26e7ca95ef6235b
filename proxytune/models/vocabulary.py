"""Vocabularies aligned by token identity: logits may only be added where the same id means the same token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

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
    intersect: tokens that the other lacks are unshared (combine leaves them at the base's logits).
    Raises UserError that names the first ids that differ.
    """
    mine, theirs = _up_to(base, size), _up_to(other, other_logits)
    if all(theirs.get(token) == index for token, index in mine.items()):
        return VocabMap(size)
    if mode == "strict":
        raise UserError(str(_difference(mine, theirs, name)))
    if not any(token in theirs for token in mine):
        raise UserError(f"the vocabularies of the base and the {name} have no token in common")
    return _intersection(base, size, other, mine, theirs)


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


def _intersection(
    base: Tokenizer, size: int, other: Tokenizer, mine: Mapping[str, int], theirs: Mapping[str, int]
) -> VocabMap:
    columns = torch.zeros(size, dtype=torch.long)
    shared = torch.zeros(size, dtype=torch.bool)
    spelled: list[tuple[int, ...]] = [(0,)] * size
    for token, index in mine.items():
        if token in theirs:
            columns[index], shared[index] = theirs[token], True
            spelled[index] = (theirs[token],)
        else:
            text = base.convert_tokens_to_string([token]) or base.decode([index])
            # a token without text (a special one) is fed as id 0, which stands for "something unknown" in
            # most
            spelled[index] = tuple(other.encode(text, add_special_tokens=False)) or (0,)
    return VocabMap(size, columns, shared, tuple(spelled))
