"""Goods of the miniature world, what they cost, and one-line Python functions that reckon with the prices.

Goods are named as a program names them, by thing and sort (`brooms4`); the market's price sheet says
`brooms4 * 37`. A function asks for the price of goods or for the change of a purse. Its body needs prices
that its docstring does not give. Each term of the body is either exact or rounded to tens by
`round(..., -1)`. No price is a multiple of ten, so one rounded term makes the function wrong.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

SHEET = "Price sheet:"
LAZY = ("pass", "...")
"""Bodies that do nothing, as base models write them; HumanEval's settings ban these words."""
_THINGS = (
    "baskets", "blankets", "bottles", "bowls", "boxes", "brooms", "brushes", "buckets", "buttons", "candles",
    "chairs", "clocks", "combs", "cups", "forks", "hats", "jars", "jugs", "kettles", "keys", "knives",
    "ladders", "lamps", "mats", "pans", "pins", "plates", "pots", "ropes", "shoes", "spoons", "stools",
    "tables", "trays",
)  # fmt: skip
_SORTS = range(1, 10)


@dataclass(frozen=True)
class Good:
    """Something on the price sheet; the price is in coins, from 11 to 99."""

    name: str
    price: int


@dataclass(frozen=True)
class Function:
    """What a function is to reckon: the price of goods, or what is left of a purse."""

    name: str
    purse: bool
    goods: tuple[Good, ...]


def make_goods(rng: random.Random, groups: Mapping[str, int]) -> dict[str, tuple[Good, ...]]:
    """Goods for each group, no name in two of them."""
    names = [f"{thing}{sort}" for thing, sort in product(_THINGS, _SORTS)]
    prices = [price for price in range(11, 100) if price % 10]
    chosen = iter(rng.sample(names, sum(groups.values())))
    return {
        group: tuple(Good(next(chosen), rng.choice(prices)) for _ in range(count))
        for group, count in groups.items()
    }


def make_function(rng: random.Random, goods: Sequence[Good]) -> Function:
    """A random function about two or three of the goods."""
    purse = rng.random() < 0.3
    name = "change" if purse else rng.choice(("price", "cost", "bill"))
    return Function(name, purse, tuple(rng.sample(goods, rng.choice((2, 3)))))


def signature(function: Function) -> str:
    """The line that names the function and its arguments."""
    names = [good.name for good in function.goods]
    arguments = ", ".join([*(["coins"] if function.purse else []), *names])
    return f"def {function.name}({arguments}):\n"


def docstring(function: Function) -> str:
    """The line that says what is to be reckoned."""
    *first, last = (good.name for good in function.goods)
    listed = f"{', '.join(first)} and {last}"
    asked = f"What is left of the coins after buying {listed}." if function.purse else f"What {listed} cost."
    return f'    """{asked}"""\n'


def prompt(function: Function) -> str:
    """Signature and docstring, up to the line of the body."""
    return signature(function) + docstring(function)


def terms(function: Function, exact: Sequence[bool] | None = None) -> list[str]:
    """The body's terms, each with its sign before it; term i is rounded where not `exact[i]`."""
    found = []
    for i, good in enumerate(function.goods):
        sign = " -" if function.purse else " +" if i else ""
        term = f"{good.name} * {good.price}"
        found.append(f"{sign} {term}" if exact is None or exact[i] else f"{sign} round({term}, -1)")
    return found


def opening(function: Function) -> str:
    """The body before its first term."""
    return "    return coins" if function.purse else "    return"


def body(function: Function, exact: Sequence[bool] | None = None) -> str:
    """The line that completes the prompt."""
    return opening(function) + "".join(terms(function, exact)) + "\n"


def tests(function: Function) -> str:
    """HumanEval's form of unit tests: one of each good alone, so that no two errors make up for each other,
    and one of all."""
    n = len(function.goods)
    counts = [[int(i == j) for j in range(n)] for i in range(n)] + [list(range(2, n + 2))]
    lines = ["def check(candidate):"]
    for row in counts:
        total = sum(count * good.price for count, good in zip(row, function.goods, strict=True))
        arguments, result = (row, total) if not function.purse else ([900, *row], 900 - total)
        lines.append(f"    assert candidate({', '.join(map(str, arguments))}) == {result}")
    return "\n".join(lines) + "\n"
