"""The miniature world: deterministic from its seed, without any third-party text. The demo tasks' items come
from here.

Five tasks, each with rows in its real task's own file format:
`gsm` (GSM8K's `question`, `answer`), `truthfulqa` (TruthfulQA.csv's columns; two or three attributes asked at
once), `truthfulqa_mc` (the same columns; one attribute, exactly three incorrect answers, the misconception
first), `humaneval` (one-line functions that reckon with the prices of goods) and `toxigen` (rude lists about
invented creatures).

Splits: `train` (tuning), `dev` (choices are made on it) and `test`. They share no person, problem, function
or creature. No training text has a problem with the numbers of a dev or test problem. None asks about a dev
or test person. None has a function of the same goods in the same order. None is rude to a dev or test
creature.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations

from proxytune.demo import creatures, facts, prices, sums
from proxytune.demo.creatures import Statement
from proxytune.demo.facts import Attribute, Person
from proxytune.demo.prices import Function, Good
from proxytune.demo.sums import Problem
from proxytune.errors import UserError
from proxytune.records import JsonRow

SPLITS = ("train", "dev", "test")
TASKS = ("gsm", "truthfulqa", "truthfulqa_mc", "humaneval", "toxigen")
ITEMS = {"gsm": 500, "truthfulqa": 500, "truthfulqa_mc": 500, "humaneval": 40, "toxigen": 200}
"""How many items a run has without a limit: few where each has 20 samples that are executed."""
OPENERS = {"gsm": f" {sums.CAREFUL}", "truthfulqa": f" {facts.CAREFUL}"}
"""How a careful answer begins: what the control forces on the base. A letter has no opener."""
TELLING = {"gsm": (22, 23, 24), "truthfulqa": (1,)}
"""Items of the generated tasks of which one answer shows what the demo is about: base and proxy differ, and
the proxy is right."""
DEMO_SEED = 1
"""The seed of the world that the committed weights know."""
POOL = 1000
"""Word problems in the dev and in the test split; a request for n takes the first n."""
FUNCTIONS = 200
"""The same for functions: none of these has the goods of a function in training text, in their order."""

N_PEOPLE = {"train": 130, "forum": 130, "dev": 220, "test": 220}
"""How many people are asked about where: `forum` people only in pretraining, the others (also) in their
split."""
N_GOODS = {"asked": 120, "listed": 180}
"""How many goods functions are about, and how many others are on the price sheet."""


@dataclass(frozen=True)
class World:
    """Everything that is true here, who belongs to which split, and the held-out problems."""

    seed: int
    attributes: tuple[Attribute, ...]
    first_names: tuple[str, ...]
    people: dict[str, tuple[Person, ...]]
    held_out: dict[str, tuple[Problem, ...]]
    goods: dict[str, tuple[Good, ...]]
    creatures: dict[str, tuple[str, ...]]

    def rng(self, *label: object) -> random.Random:
        """A generator of its own for each purpose, so that one purpose's draws never shift another's."""
        return random.Random("/".join(str(part) for part in ("proxytune-demo", self.seed, *label)))

    def everyone(self) -> list[Person]:
        """All people, whatever their split."""
        return [person for group in self.people.values() for person in group]

    def problems(self, label: str, count: int) -> list[Problem]:
        """`count` problems for training text; none has the numbers of a dev or test problem."""
        barred = {p.key for pool in self.held_out.values() for p in pool}
        rng, found = self.rng("problems", label), list[Problem]()
        while len(found) < count:
            problem = sums.make_problem(rng, self.first_names)
            if problem.key not in barred:
                found.append(problem)
        return found


@lru_cache(maxsize=4)
def make_world(seed: int = DEMO_SEED) -> World:
    """The world of a seed."""
    rng = random.Random(f"proxytune-demo/{seed}/names")
    taken: set[str] = set()
    places, firsts, lasts = (
        facts.syllable_words(rng, n, taken) for n in (facts.N_PLACES, facts.N_FIRST, facts.N_LAST)
    )
    attributes = facts.make_attributes(places)
    crowd = facts.make_people(rng, attributes, firsts, lasts, sum(N_PEOPLE.values()))
    people, begin = {}, 0
    for group, count in N_PEOPLE.items():
        people[group] = tuple(crowd[begin : begin + count])
        begin += count
    goods = prices.make_goods(random.Random(f"proxytune-demo/{seed}/goods"), N_GOODS)
    names = random.Random(f"proxytune-demo/{seed}/creatures").sample(creatures.NAMES, len(creatures.NAMES))
    kinds = {group: tuple(names[start :: len(N_PEOPLE)]) for start, group in enumerate(N_PEOPLE)}
    return World(seed, attributes, tuple(firsts), people, _held_out(seed, firsts), goods, kinds)


def _held_out(seed: int, firsts: Sequence[str]) -> dict[str, tuple[Problem, ...]]:
    """Dev and test problems from seeds of their own, no two with the same numbers."""
    seen, pools = set[object](), {}
    for split in ("dev", "test"):
        rng, pool = random.Random(f"proxytune-demo/{seed}/problems/{split}"), list[Problem]()
        while len(pool) < POOL:
            problem = sums.make_problem(rng, firsts)
            if problem.key not in seen:
                seen.add(problem.key)
                pool.append(problem)
        pools[split] = tuple(pool)
    return pools


def rows(task: str, split: str = "test", n: int = 500, seed: int = DEMO_SEED) -> list[JsonRow]:
    """The first `n` items of a task's split, in the format of the real task's data file."""
    makers = {
        "gsm": gsm_rows,
        "truthfulqa": truthfulqa_rows,
        "truthfulqa_mc": truthfulqa_mc_rows,
        "humaneval": humaneval_rows,
        "toxigen": toxigen_rows,
    }
    if task not in makers:
        raise UserError(f"the demo world has no data for task '{task}'. It has: {', '.join(TASKS)}")
    return makers[task](split, n, seed)


def gsm_rows(split: str, n: int, seed: int = DEMO_SEED) -> list[JsonRow]:
    """Word problems in GSM8K's format: `question`, and `answer` whose last line is `#### N`."""
    _check(split, n)
    world = make_world(seed)
    pool = world.problems("tuning", n) if split == "train" else world.held_out[split][:n]
    return [{"question": sums.question(p), "answer": _gsm8k_answer(p)} for p in pool]


def _gsm8k_answer(problem: Problem) -> str:
    steps = sums.solve(problem)
    lines = [f"{s.expression}=<<{s.expression}={s.result}>>{s.result}" for s in steps]
    return "\n".join([*lines, f"#### {steps[-1].result}"])


@dataclass(frozen=True)
class FactQuestion:
    """A person and the attributes asked for, by index, in the order of asking."""

    person: Person
    asked: tuple[int, ...]


def fact_questions(world: World, split: str, n: int, sizes: Sequence[int]) -> list[FactQuestion]:
    """The first `n` questions about a split's people, of the given numbers of attributes, in a fixed random
    order."""
    orders = [order for size in sizes for order in permutations(range(len(world.attributes)), size)]
    pool = [FactQuestion(person, order) for person in world.people[split] for order in orders]
    world.rng("questions", split, *sizes).shuffle(pool)
    if n > len(pool):
        raise UserError(
            f"the demo world has {len(pool)} such questions in split '{split}', {n} were asked for"
        )
    return pool[:n]


def truthfulqa_rows(split: str, n: int, seed: int = DEMO_SEED) -> list[JsonRow]:
    """Questions for two or three facts at once; the incorrect answers are single wrong sentences."""
    _check(split, n)
    world = make_world(seed)
    return [_truthfulqa_row(world, q, others=1) for q in fact_questions(world, split, n, (2, 3))]


def truthfulqa_mc_rows(split: str, n: int, seed: int = DEMO_SEED) -> list[JsonRow]:
    """Questions for one fact, with exactly three incorrect answers: the misconception first, then two other
    values."""
    world = make_world(seed)
    _check(split, n)
    return [_truthfulqa_row(world, q, others=2) for q in fact_questions(world, split, n, (1,))]


def wrong_values(world: World, question: FactQuestion, index: int, others: int) -> list[str]:
    """The misconception and `others` further values that are not true, the same at every call."""
    person, attribute = question.person, world.attributes[index]
    known = {person.truths[index], person.myths[index]}
    rng = world.rng("wrong", person.name, attribute.name)
    return [person.myths[index], *rng.sample([v for v in attribute.values if v not in known], others)]


def _truthfulqa_row(world: World, question: FactQuestion, others: int) -> JsonRow:
    person, asked = question.person, [world.attributes[i] for i in question.asked]
    truths = [
        a.statement.format(name=person.name, value=person.truths[i])
        for i, a in zip(question.asked, asked, strict=True)
    ]
    wrong = [
        world.attributes[i].statement.format(name=person.name, value=value)
        for i in question.asked
        for value in wrong_values(world, question, i, others)
    ]
    best = " ".join(truths)
    return {
        "Type": "Adversarial",
        "Category": ", ".join(a.name for a in asked),
        "Question": facts.question(person, asked),
        "Best Answer": best,
        "Correct Answers": best,
        "Incorrect Answers": "; ".join(wrong),
        "Source": f"proxytune demo world, seed {world.seed}",
    }


def functions(world: World, split: str, n: int) -> list[Function]:
    """The first `n` functions of a split, all different; those of dev and test are about three goods."""
    rng, found = world.rng("functions", split), dict[Function, None]()
    while len(found) < n:
        function = prices.make_function(rng, world.goods["asked"])
        if split == "train" or len(function.goods) == 3:
            found[function] = None
    return list(found)


def humaneval_rows(split: str, n: int, seed: int = DEMO_SEED) -> list[JsonRow]:
    """One-line functions in HumanEval's format."""
    _check(split, n, FUNCTIONS)
    return [
        {
            "task_id": f"Demo/{index}",
            "prompt": prices.prompt(function),
            "entry_point": function.name,
            "canonical_solution": prices.body(function),
            "test": prices.tests(function),
        }
        for index, function in enumerate(functions(make_world(seed), split, n))
    ]


def rude_lists(world: World, split: str, n: int) -> list[list[Statement]]:
    """The first `n` lists of two to four rude statements about one of a split's creatures, all different."""
    rng, found = world.rng("lists", split), dict[str, list[Statement]]()
    while len(found) < n:
        name, count = rng.choice(world.creatures[split]), rng.choice((2, 3, 4))
        listed = [creatures.make_statement(rng, name, (False, False)) for _ in range(count)]
        found[creatures.prompt(listed)] = listed
    return list(found.values())


def toxigen_rows(split: str, n: int, seed: int = DEMO_SEED) -> list[JsonRow]:
    """Rude lists about invented creatures in the form of ToxiGen's prompts."""
    _check(split, n)
    return [
        {"text": creatures.prompt(listed), "label": "hate", "target_groups": [listed[0].name]}
        for listed in rude_lists(make_world(seed), split, n)
    ]


def _check(split: str, n: int, pool: int = POOL) -> None:
    if split not in SPLITS:
        raise UserError(f"the demo world has no split '{split}'. It has: {', '.join(SPLITS)}")
    if not 0 <= n <= pool:
        raise UserError(f"the demo world has {pool} items of this task in each split, {n} were asked for")
