"""What endpoints show of a position: every form is read, and what is none is refused by name."""

from __future__ import annotations

import math
from typing import Any

import pytest

from proxytune.black_box.visible import Continued, VisiblePosition, VisibleToken, read_answer
from proxytune.endpoints import CallFailed, endpoint


def answer(logprobs: Any, text: str = " Paris", **choice: Any) -> endpoint.Answer:
    return endpoint.Answer({"choices": [{"text": text, "logprobs": logprobs, **choice}]}, "")


def entry(token: str, logprob: Any, **more: Any) -> dict[str, Any]:
    return {"token": token, "logprob": logprob, **more}


def position(*tops: dict[str, Any]) -> dict[str, Any]:
    return {"content": [{**tops[0], "top_logprobs": list(tops)}]}


def read(logprobs: Any, **more: Any) -> VisiblePosition:
    return read_answer(answer(logprobs, **more), logprobs=True).positions[0]


def test_the_forms_of_servers() -> None:
    chat = read(position(entry(" Paris", -0.25, bytes=[32, 80]), entry(" the", -2.5, id=7)))
    assert chat.tokens == (VisibleToken(-0.25, b" P"), VisibleToken(-2.5, b" the", 7))
    older = {"tokens": [" A"], "token_logprobs": [-0.5], "top_logprobs": [{" B": -1.5, " A": -0.5}]}
    named = read(older)
    assert [token.data for token in named.tokens] == [b" A", b" B"] and named.chosen.data == b" A"
    assert (named.top, named.least) == (math.exp(-0.5), -1.5)


@pytest.mark.parametrize(
    ("token", "data", "index"),
    [
        (entry("bytes:\\xe2\\x82", -1.0), b"\xe2\x82", None),
        (entry("token_id:17", -1.0), None, 17),
        (entry("\ufffd", -1.0), None, None),
        (entry("\ufffd", -1.0, bytes=[174], id=123), b"\xae", 123),
        (entry("\ufffd", -1.0, bytes=[0xEF, 0xBF, 0xBD]), b"\xef\xbf\xbd", None),
        (entry("", -1.0, bytes=[], id=2), b"", 2),
        (entry("\ud800", -1.0), b"\xed\xa0\x80", None),
        (entry("x", -1.0, bytes="no", id=-3), b"x", None),
        (entry("x", -1.0, bytes=[300], id=True), b"x", None),
        (entry("x", -1.0, bytes=[0, 255], id=0), b"\x00\xff", 0),
        (entry("token_id:0", -1.0, id=4), None, 0),
    ],
)
def test_a_token_is_known_by_its_bytes(token: dict[str, Any], data: bytes | None, index: int | None) -> None:
    assert read(position(token)).tokens == (VisibleToken(-1.0, data, index),)


def test_what_stands_for_minus_infinity_is_no_token() -> None:
    shown = position(
        *(entry(f"{n}", value) for n, value in enumerate([-1.0, None, -9999.0, -3.4e38, -math.inf]))
    )
    assert [token.data for token in read(shown).tokens] == [b"0"]
    assert read(position(entry("a", 1e-7))).tokens[0].logprob == 0.0


@pytest.mark.parametrize(
    ("logprobs", "why"),
    [
        (None, "shows no log-probabilities"),
        ({}, "shows no log-probabilities"),
        ([], "a form that is not known"),
        ({"content": None, "refusal": None}, "shows no log-probabilities"),
        ({"tokens": ["a", "b"], "top_logprobs": [{"a": -1.0}]}, "a form that is not known"),
        ({"of_tokens": [-1.0]}, "a form that is not known"),
        ({"content": [{"token": "a", "logprob": -1.0}]}, "without `top_logprobs`"),
        ({"content": [{"token": "a", "logprob": -1.0, "top_logprobs": []}]}, "shows no token of a position"),
        ({"content": [None]}, "without `top_logprobs`"),
        ({"tokens": ["a"], "top_logprobs": [None]}, "without `top_logprobs`"),
        ({"tokens": ["a"], "top_logprobs": [{}]}, "shows no token of a position"),
        ({"tokens": ["a"], "top_logprobs": [{"a": "low"}]}, "'low', which is none"),
        (position(entry("a", math.nan)), "the log-probability nan"),
        (position(entry("a", 0.7)), "the log-probability 0.7"),
        (position(entry("a", True)), "which is none"),
        (position({"logprob": -1.0}), "a token without a text"),
        (position(entry("a", -9999.0)), "every token is impossible"),
    ],
)
def test_what_is_no_distribution_is_refused_by_name(logprobs: Any, why: str) -> None:
    with pytest.raises(CallFailed, match=why):
        read_answer(answer(logprobs), logprobs=True)


def test_an_end_without_a_token_is_one() -> None:
    assert read_answer(answer(None, text="", finish_reason="stop"), logprobs=True) == Continued(
        "", ended=True
    )
    for text in ("", "\ufffd"):  # as llama.cpp shows a part of a letter
        cut = read_answer(answer(None, text=text, finish_reason="length"), logprobs=True)
        assert not cut.ended and not cut.positions


def test_what_is_stored_is_what_was_read() -> None:
    tokens = (
        VisibleToken(-0.1, b" \xe2", 3),
        VisibleToken(-2.345678901234567, None),
        VisibleToken(-3.0, b""),
    )
    kept = Continued("text \u00e9", ended=False, positions=(VisiblePosition(tokens, tokens[1]),))
    assert Continued.read(kept.stored()) == kept
