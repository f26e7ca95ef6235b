"""What errors say, word by word: the value, what is allowed, and the next command."""

from __future__ import annotations

import pytest

from proxytune.errors import PromptTooLong, UserError, did_you_mean, needs_extra


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("gms", "Unknown task 'gms'. Did you mean: gsm? Known: alpha, beta, gsm"),
        ("x", "Unknown task 'x'. Known: alpha, beta, gsm"),
        ("alpha1", "Unknown task 'alpha1'. Did you mean: alpha? Known: alpha, beta, gsm"),
    ],
)
def test_an_unknown_name(name: str, says: str) -> None:
    error = did_you_mean("task", name, ("gsm", "beta", "alpha"))
    assert isinstance(error, UserError) and str(error) == says


def test_at_most_three_names_are_near() -> None:
    said = str(did_you_mean("role", "aaaa", ("aaab", "aaac", "aaad", "aaae")))
    assert said.count("aaa") == 1 + 3 + 4


def test_a_prompt_that_is_too_long() -> None:
    error = PromptTooLong("prompt 3", "base", 300, 256)
    assert str(error) == (
        "prompt 3 has 300 tokens for the base, whose context window is 256: shorten the prompt"
    )
    assert (error.model, error.tokens, error.window) == ("base", 300, 256) and isinstance(error, UserError)


def test_a_package_that_is_missing_is_named_with_its_extra() -> None:
    needs_extra("reading JSON", "json", "x")
    with pytest.raises(UserError) as raised:
        needs_extra("the judge", "no_such_package", "judges")
    assert str(raised.value) == (
        "the judge needs the package 'no_such_package'. Install: pip install 'proxytune[judges]'"
    )
