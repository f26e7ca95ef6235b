"""What is paid for once is known by all that it depends on: a setting that its key lacks would bring back the
reply to another question."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest

from proxytune.api_spec import ApiSpec
from proxytune.black_box.client import ApiClient, Question
from proxytune.judges.pairwise import Pair, PairwiseJudge

SPEC = ApiSpec(api="http://127.0.0.1:1/v1", model="m")
OTHER_SPEC: dict[str, Any] = {
    "api": "http://127.0.0.1:2/v1",
    "model": "other",
    "top_logprobs": 6,
    "route": "chat",
    "prompt_as": None,  # it decides the prompt, which is told apart below
    "key_variable": None,  # who asks does not change what is said
}
QUESTION = Question(0, "a")
OTHER_QUESTION: dict[str, Any] = {
    "item": None,  # whom it is for does not change what is said
    "prompt": "b",
    "max_tokens": 2,
    "visible": False,
    "stop": ("x",),
}
PAIR = Pair("do", "one", "two", swapped=False)
OTHER_PAIR: dict[str, Any] = {"instruction": "do it", "baseline": "1", "output": "2", "swapped": True}


def test_replies_of_a_base_behind_an_api() -> None:
    assert OTHER_SPEC.keys() == ApiSpec.model_fields.keys(), "a new setting has to be decided on here"
    assert list(OTHER_QUESTION) == [field.name for field in fields(Question)]
    specs = [SPEC.model_copy(update={name: value}) for name, value in OTHER_SPEC.items() if value is not None]
    questions = [
        replace(QUESTION, **{name: value}) for name, value in OTHER_QUESTION.items() if value is not None
    ]
    questions += [replace(QUESTION, prompt=ids) for ids in ((1, 2), (12,))]
    keys = [ApiClient(spec).key(QUESTION) for spec in (SPEC, *specs)]
    keys += [ApiClient(SPEC).key(question) for question in questions]
    assert len(set(keys)) == len(keys) == 1 + 4 + 4 + 2
    assert ApiClient(SPEC.model_copy(update={"key_variable": "OTHER_KEY"})).key(QUESTION) == keys[0]
    assert ApiClient(SPEC).key(replace(QUESTION, item=1)) == keys[0]


def test_verdicts_of_a_judge(monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(OTHER_PAIR) == [field.name for field in fields(Pair)]
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:1/v1")
    judge, pairs = PairwiseJudge("m"), [replace(PAIR, **{name: value}) for name, value in OTHER_PAIR.items()]
    keys = [judge.key(PAIR), PairwiseJudge("other").key(PAIR), *map(judge.key, pairs)]
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:2/v1")
    keys.append(judge.key(PAIR))
    assert len(set(keys)) == len(keys) == 1 + 1 + 4 + 1
