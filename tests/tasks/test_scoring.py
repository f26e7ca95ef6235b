"""Scoring rules, each by hand, and the intervals."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxytune.intervals import difference, gap_closed, mean_metric, mean_metrics
from proxytune.records import Metric
from proxytune.tasks.scoring.rules import (
    clean_answer,
    exact_match,
    exact_match_numeric,
    last_number,
    last_signed_number,
    numeric_equal,
    parse_letter,
    reference_accuracy,
    remove_commas,
    trim_gsm,
)


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        (" 18\n\nAnswer the following question.\n\nQuestion: 5?", " 18\n\n"),
        (" 18\nQuestion: 5?", " 18\n"),
        (" 18\nComment: no, 5", " 18\n"),
        (" 1 Comment: 2 Question: 3 Answer the following question 4", " 1 "),
        (" answer the following question: 18", " answer the following question: 18"),
        ("", ""),
    ],
)
def test_the_response_ends_at_the_first_cut_string(text: str, kept: str) -> None:
    assert trim_gsm(text) == kept
    assert trim_gsm(kept) == kept


@pytest.mark.parametrize(
    ("text", "without"), [("$1,000", "$1000"), ("1,234,567", "1234567"), ("1,2,3", "12,3"), ("1, 2", "1, 2")]
)
def test_commas_between_digits_go_in_one_pass(text: str, without: str) -> None:
    assert remove_commas(text) == without


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("5 + 13 = 18.", "18"),
        ("It costs $1,000 in all", "1000"),
        ("#### 18.00", "18.00"),
        ("It is -3 degrees", "3"),
        ("It is -3.5 degrees", "-3.5"),
        ("about .5", ".5"),
        ("No idea, sorry", "No idea, sorry"),
        ("", ""),
    ],
)
def test_the_prediction_is_the_last_number_or_else_the_text(text: str, number: str) -> None:
    assert last_number(text) == number


@pytest.mark.parametrize(
    ("prediction", "answer", "paper", "fair"),
    [
        ("18", "18", 1, 1),
        ("18.00", "18", 0, 1),
        ("7.5", "75", 1, 0),
        ("3", "-3", 1, 0),
        ("-3.0", "-3", 0, 1),
        ("Eighteen!", "eighteen", 1, 0),
        ("", "18", 0, 0),
    ],
)
def test_the_papers_match_and_the_numeric_one(
    prediction: str, answer: str, paper: float, fair: float
) -> None:
    assert exact_match(prediction, answer) == paper
    assert numeric_equal(prediction, answer) == fair


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("-3 degrees", -3), ("= -3", -3), ("**-3.50**", -3.5), ("(-3)", -3), ("\u22123", -3), ("-$60", -60),
        ("$-60", -60), ("-1,234.5", -1234.5), ("10-3", 3), ("10 - 3", 3), ("x-3", 3), ("(2)-3", 3), ("+3", 3),
        ("5-$3", 3), ("no", None),
    ],
)  # fmt: skip
def test_signs_and_subtractions(text: str, number: float | None) -> None:
    assert last_signed_number(text) == number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        (r"\$2{,}500 in all", 2500), (r"\(31\,250\) beads", 31250), (r"1\text{,}000", 1000),
        ("4\u202f096", 4096), ("7\u2009000\u2009000", 7e6), ("9\u00a0100", 9100), ("8'200", 8200),
        ("6_400", 6400), ("6{,}400.25", 6400.25), ("\u201317", -17), ("= \u201312\\,500", -12500),
        (r"-\$1{,}000", -1000), (r"\(-8\)", -8), ("2e4", 2e4), ("2.5E+2", 250), ("5e\u22121", 0.5),
        ("1.5 \u00d7 10^3", 1500), (r"\(1.2 \times 10^{4}\)", 12000),
        # what is no group, no sign and no power
        ("in 2024\u00a0100", 100), ("1\u00a00005", 5), ("rows 1 000", 0), ("3\u20135", 5), ("so\u20145", 5),
        ("\u20145", 5), ("2e4x", 4), ("5 * 10 = 50", 50),
    ],
)  # fmt: skip
def test_numbers_as_latex_and_typography_write_them(text: str, number: float) -> None:
    assert last_signed_number(text) == number
    assert exact_match_numeric(text, f"{number:.2f}") == 1


def test_the_papers_number_does_not_know_groups() -> None:
    assert [last_number(text) for text in ("1{,}000", r"12\,500", "\u20135", "1e3")] == [
        "000",
        "500",
        "5",
        "3",
    ]


def test_the_fair_match_respects_sign_and_value() -> None:
    assert exact_match_numeric("It was -3 degrees.", "-3") == 1
    assert exact_match_numeric("It was 3 degrees.", "-3") == 0
    assert exact_match_numeric("He has -20 left", "20") == 0
    assert exact_match_numeric("$18.00", "18") == 1
    assert exact_match_numeric("7.5", "75") == 0
    assert exact_match_numeric("none", "0") == 0


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("  It is so. ", "It is so."),
        ("Answer: It is so.", "It is so."),
        ("\n Answer:\n\nIt is so.", "It is so."),
        ("The Answer: so", "The Answer: so"),
        ("a\n\nb\n\n\nc", "a\nb\n\nc"),
    ],
)
def test_open_answers_are_cleaned_as_in_the_paper(text: str, clean: str) -> None:
    assert clean_answer(text) == clean


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        (" A. The first", "A"), ("\n\nC", "C"), ("(B) so", "B"), ("\\begin{code}\nD", "D"),
        ("\\begin{blockquote}A", "A"), ("E", ""), ("a", ""), ("", ""), ("The answer", ""),
        ("<blockquote>A", ""), (" **A**", ""), ("Because", "B"),
    ],
)  # fmt: skip
def test_the_letter_is_the_first_character_after_three_deletions(text: str, letter: str) -> None:
    assert parse_letter(text) == letter


@pytest.mark.parametrize(
    "response", [" A. The first", "(B) so", " C: yes", ".A", "()D", "D", "\\begin{code}\nB)"]
)
def test_cutting_at_the_stops_does_not_change_the_letter(response: str) -> None:
    kept = response
    for stop in (".", ")", ":"):
        kept = kept.split(stop)[0]
    assert parse_letter(kept) == parse_letter(response)


ALMANAC = "The almanac says Ada was born in Rome. The almanac says Ada works as a cook!"


@pytest.mark.parametrize(
    ("response", "accuracy"),
    [
        (ALMANAC, 1),
        ("ada was  born in ROME; ada works as a cook", 1),
        ("Ada was born in Rome.", 0),  # every sentence of an answer is needed
        ("Ada was born in Romeo. Ada works as a cook.", 0),  # whole words
        (f"{ALMANAC} Or: Ada works as a SPY.", 0),  # an incorrect answer spoils it
        ("", 0),
    ],
)
def test_reference_accuracy(response: str, accuracy: float) -> None:
    right, wrong = (
        ["Ada was born in Rome. Ada works as a cook."],
        ["Ada was born in Oslo.", "Ada works as a spy"],
    )
    assert reference_accuracy(response, right, wrong) == accuracy
    assert reference_accuracy(response, ["", " ."], [""]) == 0, "no reference, nothing to contain"


def test_an_incorrect_answer_inside_a_correct_one_does_not_count() -> None:
    right, wrong = ["You pay with euros and francs"], ["euros", "You pay with euros"]
    assert reference_accuracy("You pay with euros and francs.", right, wrong) == 1
    assert reference_accuracy("You pay with euros and francs. No: euros", right, wrong) == 0
    assert reference_accuracy("unknown", ["Unknown"], ["Unknown"]) == 0


def test_intervals_are_deterministic_and_blind_to_order() -> None:
    values = [1.0] * 30 + [0.0] * 70
    metric = mean_metric(values)
    assert metric == mean_metric(values[::-1]) and metric.value == 0.3
    assert metric.low == pytest.approx(0.3 - 1.96 * np.sqrt(0.21 / 100), abs=0.015)
    assert metric.high == pytest.approx(0.3 + 1.96 * np.sqrt(0.21 / 100), abs=0.015)
    assert mean_metric([0.5]) == Metric(value=0.5, n=1)
    assert mean_metric([1.0, 1.0]) == Metric(value=1, low=1, high=1, n=2)


@given(st.lists(st.floats(0, 1), min_size=2, max_size=40))
def test_a_mean_lies_in_its_interval(values: list[float]) -> None:
    metric = mean_metric(values)
    assert metric.low is not None and metric.high is not None
    assert min(values) - 1e-9 <= metric.low <= metric.value <= metric.high <= max(values) + 1e-9


def test_scores_that_do_not_apply_leave_the_mean() -> None:
    metrics = mean_metrics([{"a": 1.0, "b": 0.0}, {"b": 1.0}])
    assert metrics["a"].value == 1 and metrics["b"].value == 0.5


def test_gap_closed() -> None:
    base, tuned = (mean_metric([1.0] * k + [0.0] * (200 - k)) for k in (20, 180))
    assert gap_closed(base, mean_metric([1.0] * 100 + [0.0] * 100), tuned) == pytest.approx(0.5)
    assert gap_closed(base, mean_metric([1.0] * 200), tuned) == pytest.approx(1.125), "not capped"
    assert gap_closed(base, tuned, mean_metric([1.0] * 22 + [0.0] * 178)) is None, "no firm gap"
    assert gap_closed(tuned, base, base) == pytest.approx(1), "a fall is a gap as well"
    assert gap_closed(Metric(value=0), tuned, Metric(value=1)) is None, "no interval known"


def test_the_interval_of_a_difference() -> None:
    found = difference(Metric(value=0.9, low=0.86, high=0.93), Metric(value=0.5, low=0.46, high=0.53))
    assert found.value == pytest.approx(0.4)
    assert found.low == pytest.approx(0.4 - np.hypot(0.04, 0.03))
    assert found.high == pytest.approx(0.4 + np.hypot(0.03, 0.04))


def test_an_interval_has_the_quantiles_of_two_thousand_resamples() -> None:
    """The percentile bootstrap, written out: each draw is the mean of ten values with seed 0."""
    values = [1.0] * 5 + [0.0] * 3 + [0.25] * 2
    draws = np.random.default_rng(0).multinomial(10, [0.3, 0.2, 0.5], size=2000)
    means = sorted((0.25 * quarter + one) / 10 for _, quarter, one in draws.tolist())

    def quantile(q: float) -> float:
        at = q * 1999
        low = int(at)
        return float(means[low] + (at - low) * (means[low + 1] - means[low]))

    found = mean_metric(values)
    assert (found.value, found.n, found.unit, found.of) == (0.55, 10, "share", None)
    assert found.low == pytest.approx(quantile(0.025), abs=1e-12)
    assert found.high == pytest.approx(quantile(0.975), abs=1e-12)
    with pytest.raises(ValueError, match="the mean of no values"):
        mean_metric([])


def test_scores_that_are_lacking_are_counted_and_the_first_comes_first() -> None:
    found = mean_metrics([{"b": 1.0}, {"a": None, "b": 0.0}, {"a": 0.5, "c": None}, {"a": 0.0, "b": None}])
    assert list(found) == ["b", "a"], "a score that nobody has is left out"
    assert {name: (one.value, one.n, one.of) for name, one in found.items()} == {
        "b": (0.5, 2, 3), "a": (0.25, 2, 3),
    }  # fmt: skip
    assert mean_metrics([{"a": 1.0}, {"a": None}])["a"].of is None, "all examples should have it"


def test_each_end_of_a_difference_has_the_two_ends_that_make_it() -> None:
    """a - b is lowest where a is low and b is high: all four half widths are different here."""
    a, b = Metric(value=0.5, low=0.4, high=0.7), Metric(value=0.25, low=0.2, high=0.65)
    found = difference(a, b)
    assert found.value == 0.25 and found.n is None
    assert found.low == pytest.approx(0.25 - np.sqrt(0.1**2 + 0.4**2))
    assert found.high == pytest.approx(0.25 + np.sqrt(0.2**2 + 0.05**2))
    for bare in (
        difference(Metric(value=0.5, low=0.4), b), difference(Metric(value=0.5, high=0.7), b),
        difference(a, Metric(value=0.25, low=0.2)), difference(a, Metric(value=0.25, high=0.65)),
    ):  # fmt: skip
        assert (bare.value, bare.low, bare.high) == (0.25, None, None)
    assert difference(b, a).value == -0.25


@pytest.mark.parametrize(
    ("prediction", "answer", "same"),
    [
        ("abc", "ABC", 1), ("ABC", "abc", 1), ("a-b.c", "abc", 1), ("abc", "a,b!c", 1), ("a b", "ab", 0),
        (" abc", "abc", 0), ("7.5", "75", 1), ("", "...", 1), ("3", "4", 0),
    ],
)  # fmt: skip
def test_both_texts_lose_case_and_punctuation(prediction: str, answer: str, same: float) -> None:
    assert exact_match(prediction, answer) == same
    assert numeric_equal("1e2", "100.0") == 1 and numeric_equal("3", "x") == numeric_equal("x", "3") == 0
