"""What the records say of themselves: counts, quotients, names and reprs, worked out by hand."""

from __future__ import annotations

import hashlib
from dataclasses import astuple, fields
from typing import Any

import pytest

from proxytune.errors import UserError
from proxytune.records import (
    FAULTS,
    NO_SCORE,
    UNSCORED,
    Completion,
    Cost,
    FinishReason,
    Metric,
    Prompt,
    RoleMemory,
    Run,
    TaskFacts,
    Took,
    TracedToken,
    WorkerFacts,
    named_by_content,
)
from tests.support.reports import run


def completion(text: str = "so", reason: FinishReason = "eos", **more: Any) -> Completion:
    """A completion of three tokens."""
    return Completion("0", 0, text, (5, 6, 7), reason, -1.5, **more)


# Names


def test_the_name_of_a_prompt_is_made_of_all_that_it_says() -> None:
    plain = Prompt(plain="p", user="u")
    others = [
        Prompt(plain="q", user="u"),
        Prompt(plain="p", user="v"),
        Prompt(plain="p", user="u", system="s"),
        Prompt(plain="p", user="u", response_prefix="r"),
        Prompt(plain="p", user="u", system=""),
    ]
    names = [one.id for one in named_by_content([plain, *others])]
    assert len(set(names)) == 6 and all(name.endswith("-1") and len(name) == 18 for name in names)
    content = repr(("p", "u", None, "", None)).encode()
    assert names[0] == f"{hashlib.sha256(content).hexdigest()[:16]}-1"
    assert len(astuple(plain)) == 6, "the last is a conversation, which is named by its plain text"


def test_the_same_prompt_again_has_a_number_of_its_own() -> None:
    made = named_by_content(["a", "b", "a", "a"])
    assert [one.id.partition("-")[2] for one in made] == ["1", "1", "2", "3"]
    assert len({one.id.partition("-")[0] for one in made}) == 2
    assert made[1].prompt == Prompt(plain="b", user="b") and made[1].target == {}
    for bad in ("a", [1], [None]):
        with pytest.raises(UserError, match="prompts must be a list of texts"):
            named_by_content(bad)  # type: ignore[arg-type]


# Responses


def test_a_traced_token_is_stored_field_by_field() -> None:
    token = TracedToken("a", 3, {"base": 0.25}, {"base": "b"}, 0.5)
    stored = {"text": "a", "id": 3, "probability": {"base": 0.25}, "top": {"base": "b"}, "alpha": 0.5}
    assert token.row() == stored
    divergent = TracedToken("a", 3, {"base": 0.25}, {"base": "b"}, 0.5, {"base": 0.125})
    assert divergent.row() == {**stored, "divergence": {"base": 0.125}}


def test_which_ends_are_faults() -> None:
    reasons: list[FinishReason] = ["eos", "stop", "length", "nan", "template", "unseen"]
    faults = [completion(reason=reason).fault for reason in reasons]
    assert faults == [None, None, None, "nan", "template", "unseen"]
    assert frozenset({"nan", "template", "unseen"}) == FAULTS


def test_a_response_in_one_line() -> None:
    assert repr(completion()) == "Completion('so', 3 tokens, eos)"
    token = TracedToken("a", 3, {}, {}, 1.0)
    assert repr(completion(trace=(token,))) == "Completion('so', 3 tokens, eos, traced)"
    shown = repr(completion("word " * 40, "length"))
    assert shown.startswith("Completion('word word") and shown.endswith("word…', 3 tokens, length)")
    assert 50 <= len(shown.partition(", 3 tokens")[0]) - len("Completion(") <= 60


def test_what_a_response_took_does_not_make_it_another() -> None:
    assert completion(took=Took(seconds=1.0)) == completion()
    assert completion(bounded=True) != completion() != completion(remark="r")


# Metrics


@pytest.mark.parametrize(
    ("n", "of", "over", "lacks"),
    [
        (None, None, (10, 10), False),
        (10, None, (10, 10), False),
        (9, None, (9, 10), True),
        (4, 4, (4, 10), False),
        (3, 4, (3, 4), True),
        (0, None, (0, 10), True),
        (0, 0, (0, 10), False),
    ],
)
def test_how_many_examples_a_metric_is_over(
    n: int | None, of: int | None, over: tuple[int, int], lacks: bool
) -> None:
    """In a run of ten."""
    metric = Metric(value=0.5, n=n, of=of)
    assert metric.over(10) == over and metric.lacks(10) is lacks


def test_a_metric_over_nothing_is_null_in_a_file_only() -> None:
    assert Metric(value=0.0, n=0).model_dump(mode="json")["value"] is None
    assert Metric(value=0.0, n=0).model_dump()["value"] == 0
    assert Metric(value=0.0, n=1).model_dump(mode="json")["value"] == 0
    assert Metric(value=0.0).model_dump(mode="json")["value"] == 0
    assert Metric.model_validate({"value": None, "n": 0}) == Metric(value=0.0, n=0)
    usual = {"value": 1.0, "low": None, "high": None, "unit": "share", "n": None, "of": None}
    assert Metric(value=1).model_dump() == usual


def test_the_figures_that_are_scores() -> None:
    assert NO_SCORE == {"unjudged": "not judged", "not_run": "not executed", "faulty": "no score"}
    assert frozenset(NO_SCORE) == UNSCORED
    made = run("proxy", 0.5)
    assert made.score == made.metrics["exact_match"] == made.figure("exact_match")
    assert made.figure("f1") is None
    for name, said in NO_SCORE.items():
        waits = made.model_copy(update={"headline": name, "metrics": {name: Metric(value=1.0, n=100)}})
        assert waits.score is None and f": {said}, 100 examples, done)" in repr(waits)
    nothing = made.model_copy(update={"metrics": {"exact_match": Metric(value=0.0, n=0)}})
    assert nothing.score is None and "no score" in repr(nothing)
    one = made.model_copy(update={"metrics": {"exact_match": Metric(value=0.0, n=1)}})
    assert one.score == Metric(value=0.0, n=1)


def test_a_run_in_one_line() -> None:
    made = run("tuned", 0.123456)
    assert repr(made) == "Run(gsm as tuned on tiny: exact_match 0.1235, 100 examples, done)"
    assert Run.model_validate_json(made.model_dump_json()) == made


# Costs


def test_the_quotients_of_a_cost() -> None:
    cost = Cost(seconds=7.0, prefill_seconds=2.0, generated_tokens=30, row_steps=12, examined=24, accepted=18)
    assert (cost.decode_seconds, cost.tokens_per_second) == (5.0, 6.0)
    assert (cost.acceptance, cost.accepted_per_step, cost.tokens_per_step) == (0.75, 1.5, 2.5)
    assert Cost(seconds=1.0, prefill_seconds=2.0).decode_seconds == 0, "never below nothing"
    assert Cost(seconds=2.0, prefill_seconds=2.0, generated_tokens=3).tokens_per_second is None
    nothing = Cost()
    assert (nothing.acceptance, nothing.accepted_per_step, nothing.tokens_per_step) == (None, None, None)
    assert (nothing.tokens_per_second, nothing.sessions) == (None, 1)
    assert Cost.model_validate(cost.model_dump(mode="json")) == cost


def test_what_a_response_takes_is_counted_under_the_names_of_a_cost() -> None:
    names = [one.name for one in fields(Took)]
    assert names == [
        *("seconds", "prefill_seconds", "prompt_tokens", "generated_tokens", "preemptions", "row_steps"),
        *("drafted", "examined", "accepted", "api_calls", "api_prompt_tokens", "api_completion_tokens"),
        "deferred",
    ]
    assert set(names) <= set(Cost.model_fields) and astuple(Took()) == (0,) * 13


def test_the_defaults_of_what_a_run_stores() -> None:
    facts = {
        "asked": "prompt", "lower_is_better": False, "hateful": False, "fault_column": None, "file": None,
    }  # fmt: skip
    assert TaskFacts().model_dump() == facts
    memory = RoleMemory(weights=1, kv_peak=2)
    assert (memory.shared_with, memory.path, memory.tokenizer) == (None, "packed", None)
    worker = WorkerFacts(host="h", pid=7, device="cpu")
    assert worker.name == "h:7" and worker.model_dump() == {
        "host": "h", "pid": 7, "device": "cpu", "log": None, "examples": 0, "generated_tokens": 0,
        "seconds": 0.0, "process_peak": 0,
    }  # fmt: skip
