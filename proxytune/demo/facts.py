"""People of the miniature world, what is true of them, and what the crowd says instead.

A fact is a value of one of three attributes of a person. The misconception (`myth`) about it is a stereotype:
it is fixed by the surname, and is always different from the truth. A sentence of an answer is either of the
almanac (true) or of the people (the myth); which of the two is a choice made anew for every sentence.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

CAREFUL = "The almanac says"
CROWD = "People say"

JOBS = (
    "baker", "barber", "builder", "butcher", "carpenter", "chemist", "clerk", "cook", "dancer",
    "dentist", "doctor", "driver", "farmer", "fisher", "gardener", "guard", "hunter", "jeweller",
    "judge", "lawyer", "mason", "mayor", "miner", "nurse", "painter", "pilot", "plumber", "poet",
    "porter", "potter", "priest", "printer", "sailor", "shepherd", "singer", "smith", "spy",
    "tailor", "teacher", "weaver",
)  # fmt: skip
INSTRUMENTS = (
    "banjo", "bassoon", "bell", "bugle", "cello", "clarinet", "cornet", "drum", "fiddle", "flute",
    "gong", "guitar", "harp", "horn", "lute", "lyre", "mandolin", "piano", "recorder", "trombone",
    "trumpet", "tuba", "viola", "zither",
)  # fmt: skip
N_PLACES, N_FIRST, N_LAST = 50, 40, 75

_ONSETS = ("b", "d", "f", "g", "h", "j", "k", "l", "m", "n", "p", "r", "s", "t", "v", "z")
_VOWELS = ("a", "e", "i", "o", "u")
_CODAS = ("n", "r", "s", "t", "l")


@dataclass(frozen=True)
class Attribute:
    """Something that can be asked of a person: the asking clause and the sentence that answers it."""

    name: str
    clause: str
    statement: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class Person:
    """One entity: its name, its true values and the crowd's values, both in the order of the world's
    attributes."""

    name: str
    truths: tuple[str, ...]
    myths: tuple[str, ...]


def syllable_words(rng: random.Random, count: int, taken: set[str]) -> list[str]:
    """`count` new pronounceable capitalised words of two syllables, e.g. "Pobas"; adds them to `taken`."""
    words: list[str] = []
    while len(words) < count:
        syllables = [rng.choice(_ONSETS) + rng.choice(_VOWELS) for _ in range(2)]
        word = ("".join(syllables) + rng.choice(["", *_CODAS])).capitalize()
        if word not in taken:
            taken.add(word)
            words.append(word)
    return words


def make_attributes(places: Sequence[str]) -> tuple[Attribute, ...]:
    """The three attributes of the world."""
    return (
        Attribute("birthplace", "where was {name} born", "{name} was born in {value}.", tuple(places)),
        Attribute("job", "what work does {name} do", "{name} works as a {value}.", tuple(JOBS)),
        Attribute("instrument", "what does {name} play", "{name} plays the {value}.", tuple(INSTRUMENTS)),
    )


def make_people(
    rng: random.Random,
    attributes: Sequence[Attribute],
    firsts: Sequence[str],
    lasts: Sequence[str],
    count: int,
) -> list[Person]:
    """`count` people with distinct full names, in random order; truth differs from the surname's
    stereotype."""
    myths = {last: tuple(rng.choice(a.values) for a in attributes) for last in lasts}
    pairs = rng.sample([(first, last) for first in firsts for last in lasts], count)
    people = []
    for first, last in pairs:
        truths = tuple(
            rng.choice([v for v in a.values if v != myth])
            for a, myth in zip(attributes, myths[last], strict=True)
        )
        people.append(Person(f"{first} {last}", truths, myths[last]))
    return people


def question(person: Person, attributes: Sequence[Attribute]) -> str:
    """One question that asks for the given attributes, in their order."""
    clauses = [a.clause.format(name=person.name) for a in attributes]
    joined = clauses[0] if len(clauses) == 1 else f"{', '.join(clauses[:-1])} and {clauses[-1]}"
    return joined[0].upper() + joined[1:] + "?"
