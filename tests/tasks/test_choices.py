"""The choice that a response names: what counts as a letter, what as a text, and what as neither."""

from __future__ import annotations

import pytest

from proxytune.tasks.scoring.choices import read_choice

LETTERS = "ABCDE"
CITIES = ["Lima", "Quito", "La Paz", "Sucre"]


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"), (" c", "C"), ("(D", "D"),
        ("(b) Quito", "B"), ("**A**", "A"), ("'C'", "C"),
        ("A. Lima", "A"), ("A is right", "A"), ("D because it is", "D"),
        ("I think B", "B"),
        ("I say it is (C)", "C"), ("Option D", "D"), ("Answer: B", "B"), ("<b>C</b>", "C"),
        ("\\begin{code}\nD", "D"),
        ("B-Quito", "B"),
        # words that begin with a letter, and letters that are part of something else
        ("Delhi", ""), ("Caracas", ""), ("Both", ""), ("According to", ""), ("A town", ""),
        ("It is A town", ""), ("a town", ""), ("C's", ""), ("B-52", ""),
        ("C++", ""), ("D&D", ""), ("A.B", ""),
        ("Vitamin C", ""),
        # no such choice, several, none
        ("E", ""), ("A or B", ""), ("A, B", ""), ("C/D", ""), ("it is not B", ""), ("", ""), ("42", ""),
    ],
)  # fmt: skip
def test_a_letter_counts_where_it_stands_alone(text: str, letter: str) -> None:
    assert read_choice(text, LETTERS, CITIES) == letter


@pytest.mark.parametrize(
    ("text", "choices", "letter"),
    [
        ("Sucre", CITIES, "D"), ("It was la paz!", CITIES, "C"), ("Quito, not Lima", CITIES, ""),
        ("not Quito", CITIES, ""), ("Quitoan", CITIES, ""), ("Not guilty", ["Guilty", "Not guilty"], "B"),
        ("a dog", ["A cat", "A dog"], "B"), ("A dog", ["A cat", "The dog"], "B"),
        ("A Quito", CITIES, "B"), ("A Lima", CITIES, "A"),
        ("Vitamin C", ["Iron", "Vitamin C", "Zinc"], "B"), ("AB", ["O", "B", "AB", "A"], "C"),
        ("A", ["O", "B", "AB", "A"], "A"), ("It is 5 million", ["5", "5 million"], "B"),
        ("15", ["1.5", "15"], "B"), ("same", ["same", "same"], ""), ("U.S", ["France", "U.S."], "B"),
        # cut at a stop or by the limit of ten tokens
        ("The U", ["U.S.", "The U.K.", "France"], "B"), ("$1", ["$2.5 million", "$1.5 million"], "B"),
        ("$1", ["$1.7 million", "$1.5 million"], ""), ("E", ["A virus", "E. coli"], "B"),
        ("the World Trade", ["A ban", "The World Trade Organization"], "B"),
        ("the World", ["A ban", "The World Trade Organization"], ""),
    ],
)  # fmt: skip
def test_the_text_of_a_choice_counts_too(text: str, choices: list[str], letter: str) -> None:
    assert read_choice(text, LETTERS, choices) == letter
