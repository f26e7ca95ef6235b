"""Prompt lookup: the host's, and the same in tensors."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from proxytune.engine.speculative.prompt_lookup import NGRAM, PromptLookup, continuations


def by_definition(ids: list[int], count: int) -> list[int]:
    """Token by token: what followed the latest earlier occurrence of the last n-gram, over and over."""
    for at in range(len(ids) - 1, NGRAM - 1, -1):
        if ids[at - NGRAM : at] == ids[-NGRAM:]:
            found = list(ids)
            for ahead in range(count):
                found.append(found[at + ahead])
            return found[len(ids) :]
    return []


@given(
    rows=st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=24), min_size=1, max_size=5),
    count=st.integers(1, 8),
    waste=st.integers(0, 4),
)
def test_host_and_device_say_what_followed(rows: list[list[int]], count: int, waste: int) -> None:
    """In small alphabets everything recurs; what lies beyond the ids that count is not looked at."""
    longest = max(NGRAM + 1, *map(len, rows)) + waste
    history = torch.tensor([[*ids, *([1] * (longest - len(ids)))] for ids in rows])
    found = continuations(history, torch.tensor([len(ids) for ids in rows]), count).tolist()
    for ids, on_device in zip(rows, found, strict=True):
        want, lookup = by_definition(ids, count), PromptLookup()
        for token in ids:
            lookup.extend([token])
        assert lookup.continuation(count) == want
        assert on_device == (want or [-1] * count)


def test_examples() -> None:
    p = PromptLookup()
    p.extend([1, 2, 3, 4, 5, 1, 2])
    assert p.continuation(3) == []
    p.extend([3])
    assert p.continuation(3) == [4, 5, 1]
    assert p.continuation(7) == [4, 5, 1, 2, 3, 4, 5], "it goes on as it began"
    p.extend([9, 1, 2, 3])
    assert p.continuation(2) == [9, 1], "the last occurrence counts"
    assert PromptLookup().continuation(3) == []
