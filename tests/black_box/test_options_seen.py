"""Multiple choice through the visible tokens of one position, by numbers made by hand."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest

from proxytune.api_spec import ApiSpec
from proxytune.black_box.deferral import Deferral, Nudged
from proxytune.black_box.options_seen import SeenOptions, shifts_of
from proxytune.black_box.visible import Continued, VisiblePosition, VisibleToken
from proxytune.config import ExpertSpec, Sampling, System
from proxytune.records import Completion, Example, Prompt
from proxytune.tasks.scoring import letters
from tests.support import oracle
from tests.support.decoders import decoder, example, plain

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


def test_the_expert_speaks_on_until_its_letter_is_whole() -> None:
    """A request holds text: the base cannot be asked in the middle of a letter."""
    runner: Any = SimpleNamespace(
        tokens=SimpleNamespace(data=[b"a", *(bytes([b]) for b in "\u20ac".encode())])
    )
    told: Any = SimpleNamespace(eos=frozenset())
    deferral = Deferral(told, runner, 0.3, Sampling(max_new_tokens=9))
    row = Nudged(Example("1", Prompt("q", "q")), (5,), "q", 0, unsure=True)
    speaks_on = []
    for token in (1, 2, 3):
        deferral._said(row, (token,), -0.5)
        speaks_on.append(row.unsure)
    assert speaks_on == [True, True, False] and row.text() == "\u20ac" and row.by_expert == 3


def test_every_expert_moves_the_options_by_its_weight(trio: System) -> None:
    """By the definition: the sum over the experts, on two questions of which one has an option of two
    forms."""
    assert trio.expert is not None and trio.antiexpert is not None
    first = ExpertSpec(**trio.expert.model_dump(), weight=0.5)
    second = ExpertSpec(**trio.base.model_dump(), weight=-2.0)
    d = decoder(trio.model_copy(update={"expert": None, "experts": (first, second)}))
    contexts = [d.contexts(example(text).prompt) for text in ("abc", "de")]
    forms = [[[40], [41, 50]], [[60], [61]]]

    def logprob(name: str, ids: tuple[int, ...], tokens: list[int]) -> float:
        return float(oracle.last_logits(plain(d, name), [*ids]).log_softmax(-1)[tokens].logsumexp(-1))

    for ids, options, moved in zip(contexts, forms, shifts_of(d, contexts, forms), strict=True):
        for tokens, shift in zip(options, moved, strict=True):
            want = sum(
                weight
                * (logprob(expert, ids[expert], tokens) - logprob("antiexpert", ids["antiexpert"], tokens))
                for expert, weight in (("expert", 0.5), ("expert2", -2.0))
            )
            assert shift == pytest.approx(want, abs=1e-9)


def test_a_bound_is_no_visible_letter_where_both_are_equal() -> None:
    """The smallest visible probability is a letter's own, so that the bound of those before it equals it."""
    example = Example("1", Prompt("q", "q"), {"mc_answer_idx": "B"})
    seen = SeenOptions.of(reply(The=0.5, _B=0.1), OPTIONS, COMPLETIONS)
    assert seen is not None and seen.logprobs == pytest.approx([math.log(0.1)] * 3)
    found = letters.most_probable("ABC")(
        example, [_option(n, *pair) for n, pair in enumerate(zip(seen.logprobs, seen.bounded, strict=True))]
    )
    assert found["visible_output"] == "B"
