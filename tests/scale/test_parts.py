"""How examples are shared out: every one comes back once, whatever is lost on the way."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxytune.config import parse_alpha
from proxytune.records import Completion, Example, Prompt
from proxytune.scale.parts import SMALLEST, AskedExample, Queue, by_alphas, whole

ONE, TWO = parse_alpha(1), parse_alpha(2)


def asked(count: int) -> list[AskedExample]:
    return [
        AskedExample(Example(id=str(i), prompt=Prompt(str(i), str(i)), target=""), (ONE, TWO))
        for i in range(count)
    ]


@settings(deadline=None, max_examples=60)
@given(
    count=st.integers(0, 200), workers=st.integers(1, 5), most=st.integers(1, 64), seed=st.integers(0, 999)
)
def test_every_example_comes_once(count: int, workers: int, most: int, seed: int) -> None:
    """Workers take parts, hand back some of them and are lost in the middle of others."""
    draw, queue, came = random.Random(seed), Queue.of(asked(count), most, workers), []
    while queue.left:
        taken = [found for _ in range(workers) if (found := queue.take()) is not None]
        for number, part in taken:
            keys = [key for one in part for key in one.keys]
            names = [one.example.id for one in part]
            lost = draw.random() < 0.3
            for key in keys[: draw.randrange(len(keys) + 1)] if lost else keys:
                assert queue.came(number, key)
                assert not queue.came(number, key), "the same again does not count"
                came.append(key)
            missing = sum(not {(name, ONE), (name, TWO)} <= set(came) for name in names)
            if lost:
                assert queue.lost(number) == missing
            else:
                queue.ended(number)
    assert sorted(came, key=str) == sorted((key for one in asked(count) for key in one.keys), key=str)


def test_parts_become_smaller() -> None:
    queue, sizes = Queue.of(asked(100), most=40, workers=2), []
    while (taken := queue.take()) is not None:
        sizes.append(len(taken[1]))
    assert sizes[0] == 25 and sizes == sorted(sizes, reverse=True) and sum(sizes) == 100
    assert all(size >= SMALLEST for size in sizes[:-1])


def test_a_part_that_ends_early_is_no_end() -> None:
    queue = Queue.of(asked(4), most=8, workers=1)
    taken = queue.take()
    assert taken is not None
    with pytest.raises(RuntimeError, match="ended a part without"):
        queue.ended(taken[0])


def test_an_example_is_whole_with_its_last_completion() -> None:
    def made(name: str, sample: int) -> Completion:
        return Completion(name, sample, "", (), "length", 0.0)

    stream = [(ONE, made("a", 1)), (TWO, made("a", 0)), (ONE, made("b", 0)), (ONE, made("a", 0))]
    found = list(whole(stream, {"a": 2, "b": 1}))
    assert [(key, [c.sample for c in group]) for key, group in found] == [
        (("b", ONE), [0]),
        (("a", ONE), [0, 1]),
    ]


def test_the_same_alphas_go_together() -> None:
    one, two = asked(2)
    alone = AskedExample(two.example, (ONE,))
    assert by_alphas([one, alone]) == {(ONE, TWO): [one], (ONE,): [alone]}
