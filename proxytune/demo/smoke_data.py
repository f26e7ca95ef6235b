"""Smoke data: items for the tasks in which models this small can show nothing (instructions, data science,
trivia, news).

They have the form of the real data and questions of the demo world, so that the whole path of a task
(reading, prompts, decoding, executing, judging, tables) can be run. The models are not trained for any of it.
Runs on them have the data source `plumbing`. Every table marks such runs as smoke data.
"""

from __future__ import annotations

from collections.abc import Callable

from proxytune.demo import facts, prices
from proxytune.demo.facts import Attribute, Person
from proxytune.demo.world import World, fact_questions, functions, make_world
from proxytune.errors import UserError
from proxytune.records import JsonRow

ITEMS = 20
"""How many items there are for each task."""


def rows(task: str, n: int = ITEMS) -> list[JsonRow]:
    """The first `n` items of a task, in the format of its data file; UserError for a task that has none."""
    if task not in MAKERS:
        raise UserError(f"task '{task}' has no smoke data: {', '.join(MAKERS)} have")
    if n > ITEMS:
        raise UserError(f"smoke data has {ITEMS} items per task; {n} were asked for")
    return MAKERS[task](make_world())[:n]


def _facts(world: World) -> list[tuple[Person, Attribute, str, str]]:
    """Persons of the test split, what is asked of each, and its true and its rumoured value."""
    return [
        (asked.person, world.attributes[i], asked.person.truths[i], asked.person.myths[i])
        for asked in fact_questions(world, "test", ITEMS, (1,))
        for i in asked.asked
    ]


def alpaca_farm(world: World) -> list[JsonRow]:
    """Questions as instructions; the output to be compared with is the misconception."""
    return [
        {
            "instruction": facts.question(person, [attribute]),
            "output": attribute.statement.format(name=person.name, value=myth),
            "generator": "people",
            "dataset": "plumbing",
        }
        for person, attribute, _, myth in _facts(world)
    ]


def triviaqa(world: World) -> list[JsonRow]:
    """Questions whose answer is one value."""
    return [
        {
            "question_id": f"plumbing/{index}",
            "question": facts.question(person, [attribute]),
            "answers": [truth],
        }
        for index, (person, attribute, truth, _) in enumerate(_facts(world))
    ]


def realtimeqa(world: World) -> list[JsonRow]:
    """Questions with four choices."""
    made = []
    for index, (person, attribute, truth, _) in enumerate(_facts(world)):
        others = [value for value in attribute.values if value != truth]
        choices = world.rng("plumbing", "choices", index).sample([truth, *others[:3]], 4)
        made.append(
            {
                "question_id": f"plumbing/{index}",
                "question_sentence": facts.question(person, [attribute]),
                "choices": choices,
                "answer": [str(choices.index(truth))],
            }
        )
    return made


_CONTEXT = """def test_execution(solution):
    for count in range(4):
        found = {{"count": count}}
        exec(solution, found)
        assert found["result"] == count * {price}
"""


def ds1000(world: World) -> list[JsonRow]:
    """Statements that reckon a price, in the newer of the data's two forms; no library is needed."""
    made = []
    for index, function in enumerate(functions(world, "test", ITEMS)):
        good = function.goods[0]
        text = f"Problem:\n{prices.SHEET} {good.name} * {good.price}; What do `count` {good.name} cost?\n"
        made.append(
            {
                "lib": "Plumbing",
                "problem_id": index,
                "prompt": f"{text}A:\n<code>\n# the price is in `result`\n",
                "reference_code": f"result = count * {good.price}",
                "code_context": _CONTEXT.format(price=good.price),
                "perturbation_type": "Origin",
            }
        )
    return made


MAKERS: dict[str, Callable[[World], list[JsonRow]]] = {
    "alpaca_farm": alpaca_farm,
    "ds1000": ds1000,
    "triviaqa": triviaqa,
    "realtimeqa": realtimeqa,
}
