"""Word problems of the miniature world, with every value between 1 and 99, and their careful or careless
solutions.

Each step of a solution is either exact or rough (the result goes up to the next ten). Which of the two is a
choice made anew at every step. A rough step is always too high and no later step can undo it, so one rough
step spoils the answer.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

CAREFUL = "Exactly"
CARELESS = "Roughly"
LIMIT = 99

THINGS = (
    "nuts", "coins", "apples", "shells", "stones", "books", "cards", "eggs", "pears", "seeds",
    "beads", "stamps",
)  # fmt: skip
_PHRASES = {
    "+": ("{person} finds {n} more.", "{person} buys {n} more."),
    "-": ("{person} sells {n}.", "{person} loses {n}."),
    "*": ("Then the pile grows {n} times.",),
}


@dataclass(frozen=True)
class Problem:
    """A start value and two or three operations on it. Its numbers alone decide whether two problems are the
    same."""

    person: str
    things: str
    start: int
    steps: tuple[tuple[str, int], ...]
    phrases: tuple[str, ...]

    @property
    def key(self) -> tuple[int, tuple[tuple[str, int], ...]]:
        """What de-duplication compares: the numbers and operations, whatever the names and things."""
        return self.start, self.steps


@dataclass(frozen=True)
class Step:
    """One worked step: its expression, the result that it got, and whether it was exact."""

    expression: str
    result: int
    exact: bool


def apply(value: int, op: str, operand: int) -> int:
    """`value op operand`."""
    return value + operand if op == "+" else value - operand if op == "-" else value * operand


def roughly(value: int) -> int:
    """The next multiple of ten above `value`: never equal to it."""
    return (value // 10 + 1) * 10


def random_step(rng: random.Random, value: int) -> tuple[str, int]:
    """An operation that keeps the value between 1 and `LIMIT`."""
    options = []
    if value <= LIMIT - 2:
        options.append("+")
    if value >= 3:
        options.append("-")
    if value * 2 <= LIMIT:
        options.append("*")
    op = rng.choice(options)
    if op == "+":
        return op, rng.randint(2, LIMIT - value)
    if op == "-":
        return op, rng.randint(2, value - 1)
    return op, rng.randint(2, min(9, LIMIT // value))


def make_problem(rng: random.Random, persons: Sequence[str]) -> Problem:
    """One random problem of two or three steps."""
    value = start = rng.randint(2, LIMIT)
    steps: list[tuple[str, int]] = []
    for _ in range(rng.choice((2, 3))):
        op, operand = random_step(rng, value)
        steps.append((op, operand))
        value = apply(value, op, operand)
    phrases = tuple(rng.choice(_PHRASES[op]) for op, _ in steps)
    return Problem(rng.choice(persons), rng.choice(THINGS), start, tuple(steps), phrases)


def question(problem: Problem) -> str:
    """The problem as a short story that ends in its question."""
    sentences = [
        p.format(person=problem.person, n=n) for p, (_, n) in zip(problem.phrases, problem.steps, strict=True)
    ]
    opening = f"{problem.person} has {problem.start} {problem.things}."
    return " ".join([opening, *sentences, f"How many {problem.things} does {problem.person} have now?"])


def solve(problem: Problem, careful: Sequence[bool] | None = None) -> list[Step]:
    """The worked steps; step i is exact where `careful[i]` (everywhere by default). Each continues from what
    the last got."""
    value, worked = problem.start, []
    for i, (op, operand) in enumerate(problem.steps):
        exact = careful is None or careful[i]
        result = apply(value, op, operand)
        worked.append(Step(f"{value}{op}{operand}", result if exact else roughly(result), exact))
        value = worked[-1].result
    return worked
