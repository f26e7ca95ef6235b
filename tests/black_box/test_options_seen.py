"""Multiple choice through the visible tokens of one position, by numbers made by hand."""

from __future__ import annotations

import math

import pytest

from proxytune.api_spec import ApiSpec
from proxytune.black_box.options_seen import SeenOptions
from proxytune.black_box.visible import Continued, VisiblePosition, VisibleToken
from proxytune.records import Completion, Example, Prompt
from proxytune.tasks.scoring import letters

OPTIONS = [" A", " B", " C"]
CHAT = ApiSpec(api="http://127.0.0.1/v1", model="m", route="chat")
COMPLETIONS = ApiSpec(api="http://127.0.0.1/v1", model="m")


def reply(**shown: float) -> Continued:
    """Tokens by name ("_A" is " A") and their probabilities."""
    tokens = [VisibleToken(math.log(p), name.replace("_", " ").encode()) for name, p in shown.items()]
    tokens.sort(key=lambda token: -token.logprob)
    return Continued("", ended=False, positions=(VisiblePosition(tuple(tokens), tokens[0]),))


def test_a_missing_option_is_bounded_by_the_smallest_visible_probability() -> None:
    seen = SeenOptions.of(reply(_A=0.5, The=0.3, _C=0.1, x=0.05), OPTIONS, COMPLETIONS)
    assert seen is not None and seen.bounded == (False, True, False)
    assert seen.logprobs == pytest.approx([math.log(0.5), math.log(0.05), math.log(0.1)])


def test_an_item_without_a_visible_option_is_left_out() -> None:
    assert SeenOptions.of(reply(The=0.3, Paris=0.2), OPTIONS, COMPLETIONS) is None
    assert SeenOptions.of(Continued("", ended=True), OPTIONS, COMPLETIONS) is None


def test_which_tokens_name_an_option() -> None:
    """A completions endpoint goes on with " A"; a chat endpoint begins with "A" or " A"; "Alas" is none."""
    both = reply(_A=0.2, A=0.1, B=0.3, Alas=0.2)
    completions, chat = (SeenOptions.of(both, OPTIONS, spec) for spec in (COMPLETIONS, CHAT))
    assert completions is not None and completions.bounded == (False, True, True)
    assert completions.logprobs[0] == pytest.approx(math.log(0.2))
    assert chat is not None and chat.bounded == (False, False, True)
    assert chat.logprobs[:2] == pytest.approx([math.log(0.2 + 0.1), math.log(0.3)])
    stripped = SeenOptions.of(reply(A=0.2, B=0.1), OPTIONS, COMPLETIONS)
    assert stripped is not None and stripped.bounded == (False, False, True), "some servers drop the space"


def test_the_options_are_re_weighted() -> None:
    seen = SeenOptions((math.log(0.5), math.log(0.3), math.log(0.1)), (False, False, True))
    assert seen.scores([0.0, 9.0, 0.0], 0.0) == pytest.approx([math.log(p / 0.9) for p in (0.5, 0.3, 0.1)])
    moved = [0.5, 0.3 * math.exp(0.5 * 2.0), 0.1 * math.exp(-0.5)]
    assert seen.scores([0.0, 2.0, -1.0], 0.5) == pytest.approx([math.log(p / sum(moved)) for p in moved])


def test_the_plain_rule_stands_beside_the_bound() -> None:
    """The bounded C wins; among the visible letters it is A."""
    example = Example("1", Prompt("q", "q"), {"mc_answer_idx": "A"})
    row = letters.most_probable("ABCD")
    found = row(
        example,
        [_option(n, lp, bound) for n, (lp, bound) in enumerate([(-1.0, False), (-2.0, False), (-0.5, True)])],
    )
    assert (found["parsed_output"], found["visible_output"]) == ("C", "A")
    assert found["bounded"] == [False, False, True]
    assert letters.score(found) == {"accuracy": 0.0, "accuracy_visible": 1.0}
    whole = row(example, [_option(0, -1.0, None), _option(1, -0.5, None)])
    assert letters.score(whole) == {"accuracy": 0.0} and "bounded" not in whole


def _option(number: int, logprob: float, bounded: bool | None) -> Completion:
    return Completion("1", number, " x", (), "length", logprob, bounded=bounded)
