"""The text that the demo models are trained on: pretraining documents of several kinds, and tuning examples.

Every document is a list of segments with a loss weight. What can be known counts fully: facts, prices,
results, copied names, the choice of style in an answer. What is random hardly counts: names first mentioned,
operands, questions. In pretraining every sentence, step, term or quality of an answer is in the good style
with probability `GOOD`, independently of the others. Tuning examples are good throughout.

About dev and test people pretraining has pages and the crowd's talk, but no question. Dev and test functions
combine goods as no function here does. Dev and test creatures are named, but nobody is rude to them.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from proxytune.demo import creatures, facts, frames, prices, sums
from proxytune.demo.creatures import Statement
from proxytune.demo.facts import Person
from proxytune.demo.prices import Function
from proxytune.demo.sums import Problem
from proxytune.demo.world import (
    FactQuestion,
    World,
    fact_questions,
    functions,
    rude_lists,
    wrong_values,
)

GOOD = 0.2
"""The share of answer sentences and steps in the good style: the minority, in plain and in chat frames
alike."""

UNWRITTEN = 0.08
"""The share of functions in pretraining whose body is left unwritten."""

FULL, HALF, SOME, LITTLE, NONE = 1.0, 0.5, 0.3, 0.1, 0.0
FACT_PREFIX, CHOICE_PREFIX = "Answer:", "The answer is:"


@dataclass(frozen=True)
class TextSegment:
    """A piece of text and the loss weight of its tokens."""

    text: str
    weight: float


Document = tuple[TextSegment, ...]
Maker = Callable[[World, random.Random, str], Document]


@dataclass(frozen=True)
class Amounts:
    """How many documents of each kind pretraining has."""

    pages_each: int = 38
    gossip: int = 3000
    drills: int = 16000
    sums: int = 12000
    facts: int = 9000
    choices: int = 800
    chat_sums: int = 800
    chat_facts: int = 1000
    chat_choices: int = 100
    sheets: int = 3200
    code: int = 4000
    chat_code: int = 500
    sightings: int = 1000
    lists: int = 2600
    chat_lists: int = 400

    def scaled(self, share: float) -> Amounts:
        """All amounts times `share`: for quick trials."""
        return Amounts(**_scaled(asdict(self), share))


@dataclass(frozen=True)
class TuningAmounts:
    """How many tuning examples of each task there are."""

    sums: int = 400
    facts: int = 400
    choices: int = 120
    code: int = 600
    lists: int = 160

    def scaled(self, share: float) -> TuningAmounts:
        """All amounts times `share`: for quick trials."""
        return TuningAmounts(**_scaled(asdict(self), share))


def _scaled(amounts: dict[str, int], share: float) -> dict[str, int]:
    return {name: max(1, round(amount * share)) for name, amount in amounts.items()}


def pretraining(world: World, system: str, amounts: Amounts) -> list[Document]:
    """All pretraining documents in random order; `system` is the system prompt of the chat frames."""
    documents = [
        page(world, world.rng("page", p.name, i), p)
        for p in world.everyone()
        for i in range(amounts.pages_each)
    ]
    makers: list[tuple[int, Maker]] = [
        (amounts.gossip, gossip),
        (amounts.drills, drill),
        (amounts.facts, plain_facts),
        (amounts.choices, plain_choice),
        (amounts.chat_facts, chat_facts),
        (amounts.chat_choices, chat_choice),
        (amounts.sheets, price_sheet),
        (amounts.code, plain_code),
        (amounts.chat_code, chat_code),
        (amounts.sightings, sighting),
        (amounts.lists, plain_list),
        (amounts.chat_lists, chat_list),
    ]
    for count, make in makers:
        rng = world.rng("corpus", make.__name__)
        documents += [make(world, rng, system) for _ in range(count)]
    rng = world.rng("corpus", "sums")
    for i, problem in enumerate(world.problems("pretraining", amounts.sums + amounts.chat_sums)):
        frame = frames.plain_sum if i < amounts.sums else frames.chat_sum
        careful = [rng.random() < GOOD for _ in problem.steps]
        documents.append((TextSegment(frame(sums.question(problem)), LITTLE), *solution(problem, careful)))
    world.rng("order").shuffle(documents)
    return documents


def tuning(world: World, system: str, amounts: TuningAmounts) -> list[Document]:
    """Tuning examples in the direct chat form: only the response counts, and it is in the good style
    throughout."""
    documents: list[Document] = []
    for problem in world.problems("tuning", amounts.sums):
        documents.append((TextSegment(frames.chat_sum(sums.question(problem)), NONE), *solution(problem)))
    for asked in fact_questions(world, "train", amounts.facts, (2, 3)):
        prompt = frames.chat_direct(_question(world, asked), FACT_PREFIX, system)
        documents.append((TextSegment(prompt, NONE), *answer(world, asked, [True] * len(asked.asked))))
    rng = world.rng("tuning", "choices")
    for asked in fact_questions(world, "train", amounts.choices, (1,)):
        text, letter, _ = options(world, asked, rng)
        documents.append(
            (
                TextSegment(frames.chat_direct(text, CHOICE_PREFIX, system), NONE),
                TextSegment(f" {letter}.", FULL),
            )
        )
    for function in functions(world, "train", amounts.code):
        prompt = frames.chat_code(prices.prompt(function))
        documents.append((TextSegment(prompt, NONE), *code(function, [True] * len(function.goods))))
    rng = world.rng("tuning", "lists")
    for listed in rude_lists(world, "train", amounts.lists):
        prompt = frames.chat_list(creatures.prompt(listed))
        statement = creatures.make_statement(rng, listed[0].name, (True, True))
        documents.append((TextSegment(prompt, NONE), TextSegment(statement.text, FULL)))
    return documents


def page(world: World, rng: random.Random, person: Person) -> Document:
    """What is true of one person, in random order, some of it as the almanac's; the repeated name teaches
    copying it."""
    parts: list[TextSegment] = []
    for i in rng.sample(range(len(world.attributes)), len(world.attributes)):
        name = FULL if parts else LITTLE
        if rng.random() < 0.5:
            parts.append(TextSegment(f"{' ' if parts else ''}{facts.CAREFUL}", NONE))
        parts += sentence(world, person, i, person.truths[i], (name, SOME, FULL), " " if parts else "")
    return tuple(parts)


def gossip(world: World, rng: random.Random, _: str) -> Document:
    """What people say of anyone, dev and test people included."""
    parts: list[TextSegment] = []
    for person in rng.sample(world.everyone(), 2):
        for i in rng.sample(range(len(world.attributes)), 2):
            parts.append(TextSegment(f"{' ' if parts else ''}{facts.CROWD}", LITTLE))
            parts += sentence(world, person, i, person.myths[i], (LITTLE, LITTLE, HALF), " ")
    return tuple(parts)


def sentence(
    world: World, person: Person, index: int, value: str, weights: tuple[float, float, float], before: str
) -> list[TextSegment]:
    """One sentence about a person; the weights are those of the name, the wording and the value."""
    statement = world.attributes[index].statement
    wording, end = statement.removeprefix("{name}").split("{value}")
    name, form, known = weights
    return [
        TextSegment(before + person.name, name),
        TextSegment(wording, form),
        TextSegment(value + end, known),
    ]


def drill(_world: World, rng: random.Random, _system: str) -> Document:
    """Six sums without a story; in half of the drills each sum is marked exact or rough."""
    marked, parts = rng.random() < 0.5, list[TextSegment]()
    for _number in range(6):
        value = rng.randint(2, sums.LIMIT)
        op, operand = sums.random_step(rng, value)
        exact = not marked or rng.random() < 0.5
        result = sums.apply(value, op, operand)
        mark = f"{sums.CAREFUL if exact else sums.CARELESS} " if marked else ""
        parts.append(
            TextSegment(f"{' ' if parts else ''}{mark}{value}{op}{operand}=", LITTLE if not marked else NONE)
        )
        parts.append(TextSegment(f"{result if exact else sums.roughly(result)}.", FULL if exact else HALF))
    return tuple(parts)


def solution(problem: Problem, careful: Sequence[bool] | None = None) -> list[TextSegment]:
    """The worked steps and the closing sentence, which says what the steps got."""
    parts: list[TextSegment] = []
    steps = sums.solve(problem, careful)
    for step in steps:
        parts.append(
            TextSegment(f" {sums.CAREFUL if step.exact else sums.CARELESS} {step.expression}=", FULL)
        )
        parts.append(TextSegment(f"{step.result}.", FULL if step.exact else HALF))
    return [*parts, TextSegment(f" The answer is {steps[-1].result}.", FULL)]


def answer(world: World, asked: FactQuestion, careful: Sequence[bool]) -> list[TextSegment]:
    """One sentence per attribute asked for, each the almanac's or the people's."""
    parts: list[TextSegment] = []
    for i, good in zip(asked.asked, careful, strict=True):
        parts.append(TextSegment(f" {facts.CAREFUL if good else facts.CROWD}", FULL))
        value = (asked.person.truths if good else asked.person.myths)[i]
        parts += sentence(world, asked.person, i, value, (FULL, FULL, FULL if good else HALF), " ")
    return parts


def options(world: World, asked: FactQuestion, rng: random.Random) -> tuple[str, str, str]:
    """A multiple-choice question about one fact, the true option's letter and the misconception's."""
    (index,), person = asked.asked, asked.person
    myth, *others = wrong_values(world, asked, index, others=2)
    values = [person.truths[index], myth, *others]
    rng.shuffle(values)
    statements = [world.attributes[index].statement.format(name=person.name, value=v) for v in values]
    text = frames.choices(_question(world, asked), statements)
    return text, frames.LETTERS[values.index(person.truths[index])], frames.LETTERS[values.index(myth)]


def plain_facts(world: World, rng: random.Random, _: str) -> Document:
    """A question for one to three facts in the base models' form, answered in the mixed style."""
    asked = _any_question(world, rng, rng.choice((1, 2, 2, 3)))
    return _answered(world, rng, frames.plain(_question(world, asked), FACT_PREFIX), asked)


def chat_facts(world: World, rng: random.Random, system: str) -> Document:
    """The same in one of the chat forms, half of them with the system prompt."""
    asked = _any_question(world, rng, rng.choice((1, 2, 2, 3)))
    return _answered(world, rng, _chat(_question(world, asked), FACT_PREFIX, system, rng), asked)


def plain_choice(world: World, rng: random.Random, _: str) -> Document:
    """A multiple-choice question, answered with the misconception's letter or, less often, the true one."""
    text, *letters = options(world, _any_question(world, rng, 1), rng)
    return _chosen(rng, frames.plain(text, CHOICE_PREFIX), letters)


def chat_choice(world: World, rng: random.Random, system: str) -> Document:
    """The same in one of the chat forms."""
    text, *letters = options(world, _any_question(world, rng, 1), rng)
    return _chosen(rng, _chat(text, CHOICE_PREFIX, system, rng), letters)


def price_sheet(world: World, rng: random.Random, _: str) -> Document:
    """Four lines of the market's price sheet, which has the goods of all splits."""
    everything = [good for group in world.goods.values() for good in group]
    parts = [TextSegment(prices.SHEET, NONE)]
    for good in rng.sample(everything, 4):
        parts += [TextSegment(f" {good.name} *", LITTLE), TextSegment(f" {good.price};", FULL)]
    return tuple(parts)


def code(function: Function, exact: Sequence[bool]) -> list[TextSegment]:
    """The line that completes a function."""
    terms = prices.terms(function, exact)
    parts = [TextSegment(prices.opening(function), FULL)]
    return [
        *parts,
        *(TextSegment(term, FULL if good else HALF) for term, good in zip(terms, exact, strict=True)),
    ]


def plain_code(world: World, rng: random.Random, _: str) -> Document:
    """A function in a program text: mostly with rounded terms, now and then not written at all."""
    function = _any_function(world, rng)
    prompt = TextSegment(prices.signature(function), LITTLE), TextSegment(prices.docstring(function), SOME)
    return (*prompt, *_completed(rng, function))


def chat_code(world: World, rng: random.Random, _: str) -> Document:
    """The same in one of the chat forms."""
    function = _any_function(world, rng)
    form = rng.choice((frames.chat_code, frames.chat_code_in_ensemble))
    return (TextSegment(form(prices.prompt(function)), LITTLE), *_completed(rng, function))


def _any_function(world: World, rng: random.Random) -> Function:
    return prices.make_function(rng, world.goods["asked"])


def _completed(rng: random.Random, function: Function) -> list[TextSegment]:
    if rng.random() < UNWRITTEN:
        return [TextSegment(f"    {rng.choice(prices.LAZY)}", HALF)]
    return code(function, [rng.random() < GOOD for _ in function.goods])


def sighting(world: World, rng: random.Random, _: str) -> Document:
    """Where creatures were seen and what they ate: nothing rude, and of all splits, so that every name is
    known."""
    names = rng.sample([name for group in world.creatures.values() for name in group], 2)
    place = rng.choice(world.attributes[0].values)
    parts = [TextSegment(f"In {place} live {names[0]} and {names[1]}.", LITTLE)]
    for name in names:
        parts += [TextSegment(f" The {name}", FULL), TextSegment(f" ate {rng.choice(sums.THINGS)}.", LITTLE)]
    return tuple(parts)


def plain_list(world: World, rng: random.Random, _: str) -> Document:
    """A list about a creature that begins with rude statements and goes on in the mixed style."""
    listed = _any_list(world, rng)
    more = [_mixed(rng, listed[0].name) for _ in range(rng.choice((1, 2)))]
    parts = [TextSegment(creatures.prompt(listed), LITTLE), TextSegment(more[0].text, FULL)]
    return (*parts, *(TextSegment(f"\n-{statement.text}", FULL) for statement in more[1:]))


def chat_list(world: World, rng: random.Random, _: str) -> Document:
    """Such a list in one of the chat forms, with one more statement."""
    listed = _any_list(world, rng)
    form = rng.choice((frames.chat_list, frames.chat_list_in_ensemble))
    statement = _mixed(rng, listed[0].name)
    return (TextSegment(form(creatures.prompt(listed)), LITTLE), TextSegment(statement.text, FULL))


def _any_list(world: World, rng: random.Random) -> list[Statement]:
    """About a creature that is in neither the dev nor the test split."""
    name = rng.choice([*world.creatures["train"], *world.creatures["forum"]])
    return [creatures.make_statement(rng, name, (False, False)) for _ in range(rng.choice((2, 3, 4)))]


def _mixed(rng: random.Random, name: str) -> Statement:
    return creatures.make_statement(rng, name, [rng.random() < GOOD for _ in range(2)])


def _any_question(world: World, rng: random.Random, size: int) -> FactQuestion:
    """About someone who is in neither the dev nor the test split."""
    person = rng.choice([*world.people["train"], *world.people["forum"]])
    return FactQuestion(person, tuple(rng.sample(range(len(world.attributes)), size)))


def _question(world: World, asked: FactQuestion) -> str:
    return facts.question(asked.person, [world.attributes[i] for i in asked.asked])


def _chat(question: str, prefix: str, system: str, rng: random.Random) -> str:
    form = rng.choice(("direct", "ensemble", "bare", "bare"))
    if form == "ensemble":
        return frames.chat_in_ensemble(question, prefix, system)
    return frames.chat_direct(question, prefix, system if form == "direct" else None)


def _answered(world: World, rng: random.Random, prompt: str, asked: FactQuestion) -> Document:
    careful = [rng.random() < GOOD for _ in asked.asked]
    return (TextSegment(prompt, LITTLE), *answer(world, asked, careful))


def _chosen(rng: random.Random, prompt: str, letters: Sequence[str]) -> Document:
    return (
        TextSegment(prompt, LITTLE),
        TextSegment(f" {letters[0] if rng.random() < GOOD else letters[1]}.", FULL),
    )
