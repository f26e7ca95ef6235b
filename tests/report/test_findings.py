"""The sentences at the heads of the sections, each made of figures that are worked out by hand here."""

from __future__ import annotations

from typing import Any

import pytest

from proxytune.analysis import failures, positions, sweeps, tokens
from proxytune.analysis.analysis import Source
from proxytune.records import Cost, Metric, RoleMemory, Run
from proxytune.report import findings
from proxytune.report.tables import role_rows
from tests.support.reports import run


def source(task: str = "gsm", role: str = "proxy", **more: Any) -> Source:
    """The run that an analysis is of."""
    return Source.model_validate({
        "folder": "f", "system": "tiny", "task": task, "role": role, "alpha": "1", "n": 7, **more
    })  # fmt: skip


def row(first: int, last: int, n: int, changed: float) -> positions.PositionRow:
    """Positions at which the proxy overrules the base at this share."""
    shift = Metric(value=0.25)
    return positions.PositionRow(first=first, last=last, n=n, changed=Metric(value=changed), shift=shift)


@pytest.mark.parametrize(
    ("p", "words"),
    [(0.00099, "p < 0.001"), (0.001, "p = 0.001"), (0.0123, "p = 0.012"), (0.5, "p = 0.5")],
)
def test_a_chance_in_words(p: float, words: str) -> None:
    assert findings.chance(p) == words


def test_a_sentence_speaks_of_four_and_counts_the_others() -> None:
    assert findings.sentence(["aB", "", "c", "d", "e"]) == "AB; c; d; e."
    assert findings.sentence(["a", "b", "c", "d", "e"]) == "A; b; c; d; 1 more below."
    assert [findings.listed(words) for words in ([], ["a"], ["a", "b"])] == ["", "a", "a and b"]


def test_the_gap_that_each_system_closes_task_by_task() -> None:
    def trio(system: str, task: str, *scores: float) -> list[Run]:
        roles = ("base", "proxy", "tuned")
        return [run(r, s, system=system, task=task) for r, s in zip(roles, scores, strict=True)]

    # (0.3 - 0.1) / (0.9 - 0.1) = 25%; (0.8 - 0.2) / (0.7 - 0.2) = 120%: not capped
    both = [*trio("one", "gsm", 0.1, 0.3, 0.9), *trio("one", "xsum", 0.2, 0.8, 0.7)]
    loose = [*trio("one", "triviaqa", 0.5, 0.6, 0.51), *trio("two", "gsm", 0.5, 0.6, 0.52)]
    assert findings.on_results(role_rows([*both, *loose])) == (
        "With one, the proxy closes 25.0% on gsm and 120.0% on xsum of the gap between base and tuned; "
        "no firm gap to close on triviaqa; no firm gap to close on gsm with two."
    )


def test_tables_of_a_task_are_told_apart_in_words() -> None:
    few = [run(role, score, data_sha256="1" * 64) for role, score in (("base", 0.1), ("proxy", 0.5))]
    fewer = [one.model_copy(update={"n": 20}) for one in few]
    many = [run(role, score) for role, score in (("base", 0.1), ("proxy", 0.5), ("tuned", 0.9))]
    assert findings.on_results(role_rows([*many, *fewer])) == (
        "With tiny, the proxy closes 50.0% on gsm (100 examples) of the gap between base and tuned; "
        "no firm gap to close on gsm (20 examples)."
    )


def priced(role: str, memory: int, ms: float, **more: Any) -> Run:
    """A run that took this many bytes, all of its own model, and this many milliseconds per token."""
    names = ("base", "tuned") if role == "proxy" else (role,)
    facts = {name: RoleMemory(weights=memory - 1, kv_peak=1) for name in names}
    cost = Cost(seconds=ms + 2.0, prefill_seconds=2.0, generated_tokens=1000, memory=facts)
    return run(role, 0.5, **more).model_copy(update={"cost": cost})


def test_the_price_is_beside_the_tuned_model_or_else_the_base() -> None:
    whole = [priced("base", 50, 1.0), priced("proxy", 300, 6.0), priced("tuned", 100, 4.0)]
    assert findings.on_price(role_rows(whole)) == (
        "With tiny, the proxy takes 3.0 times the memory and 1.5 times the time per token of the tuned model."
    )
    assert findings.on_price(role_rows(whole[:2])) == (
        "With tiny, the proxy takes 6.0 times the memory and 6.0 times the time per token of the base model."
    )
    other = [priced("proxy", 250, 2.0, task="xsum"), priced("tuned", 100, 4.0, task="xsum")]
    assert findings.on_price(role_rows([*whole, *other])) == (
        "With tiny, the proxy takes 2.5 to 3.0 times the memory and 0.5 to 1.5 times the time per token of "
        "the tuned model."
    )
    forced = priced("base", 10, 0.1, forced=" So")
    assert findings.on_price(role_rows([*whole[:2], forced])) == findings.on_price(role_rows(whole[:2]))


def test_the_first_token_and_the_later_ones() -> None:
    bands = (row(0, 7, 90, 0.9), row(8, 15, 10, 0.5), row(16, 31, 30, 0.1))
    more = {"responses": 1234, "tokens": 98765, "changed": Metric(value=0.1239), "shift": Metric(value=0.1)}
    one = positions.Positions(
        source=source(),
        rows=(row(0, 0, 5, 0.625), row(1, 1, 5, 0.1)),
        bands=bands,
        paper_changed=None,
        **more,
    )
    # (10 * 0.5 + 30 * 0.1) / 40 = 20%
    assert findings.on_positions([one]) == (
        "On gsm the first token is another than the base's in 62% of responses, tokens from position 8 on in "
        "20%."
    )
    short = one.model_copy(update={"bands": bands[:1]})
    assert findings.on_positions([short]) == (
        "On gsm the first token is another than the base's in 62% of responses."
    )
    assert findings.on_tokens([one]) == (
        "On gsm the proxy's first choice is not the base's at 12.4% of 98,765 tokens in 1,234 responses."
    )


def test_promoted_tokens_are_the_three_first_that_are_notable() -> None:
    def found(*shifts: float | None) -> tokens.Ngrams:
        rows = [
            tokens.NgramRow(token=f"t{i}", n=9, shift=None if s is None else Metric(value=s))
            for i, s in enumerate(shifts)
        ]
        return tokens.Ngrams(source=source(), min_count=3, rows=tuple(rows))

    assert findings.on_ngrams(
        [("gsm", found(0.3, None, 0.2, 0.04, 0.03)), ("xsum", found(0.01, 0.0099))]
    ) == (
        "On gsm most promoted are “t0” (+30 points), “t2” (+20 points) and “t3” (+4 points); on xsum most "
        "promoted are “t0” (+1 points)."
    )
    assert findings.on_ngrams([("gsm", found(0.0099, -0.5))]) == ""


@pytest.mark.parametrize(
    ("left", "right", "p", "said"),
    [
        (0.031, -0.062, 0.049, "+3.1 points, right of it by -6.2: the arithmetic is moved more (p = 0.049)"),
        (-0.062, 0.031, 0.0001, "-6.2 points, right of it by +3.1: the reasoning is moved more (p < 0.001)"),
        (0.05, 0.01, 0.05, "+5.0 points, right of it by +1.0: no firm difference (p = 0.05)"),
        (0.05, 0.01, None, "+5.0 points, right of it by +1.0: no firm difference"),
    ],
)  # fmt: skip
def test_reasoning_against_arithmetic(left: float, right: float, p: float | None, said: str) -> None:
    def line(rule: str, a: float | None, b: float | None) -> tokens.EquationRow:
        sides = tokens.Side(tokens=3, mean=a), tokens.Side(tokens=4, mean=b)
        return tokens.EquationRow(rule=rule, left=sides[0], right=sides[1], t=1.0, df=2.0, p=p)

    def of(*rows: tokens.EquationRow) -> tokens.Equations:
        return tokens.Equations(source=source(), responses=3, responses_with=2, rows=rows)

    found = of(line("paper", 0.9, 0.8), line("corrected", left, right))
    assert findings.on_equations([found]) == f"Tokens left of the equals sign move by {said}."
    nothing = [
        of(line("paper", 0.9, 0.8)),
        of(line("corrected", None, 0.1)),
        of(line("corrected", 0.1, None)),
    ]
    assert findings.on_equations(nothing) == ""


def point(alpha: str, score: Metric | None, until: int | None = None) -> sweeps.SweepPoint:
    """A point of a sweep."""
    value = None if ":" in alpha else float(alpha)
    return sweeps.SweepPoint(
        alpha=alpha, value=value, until=until, n=8, score=score, truth=None, info=None, loops=None,
        tokens=None, folder="f",
    )  # fmt: skip


def sweep(scores: dict[str, Metric | None], **more: Any) -> sweeps.Sweep:
    """A sweep with these scores."""
    points = tuple(point(alpha, score) for alpha, score in scores.items())
    return sweeps.Sweep(source=source(**more), metric="exact_match", points=points, paper=())


def test_the_best_alpha_beside_the_papers_and_none() -> None:
    rising = {"0": 0.1, "0.5": 0.4, "1": 0.6, "1.5": 0.7}
    up = {alpha: Metric(value=value) for alpha, value in rising.items()}
    assert findings.on_alpha([sweep(up)]) == (
        "On gsm alpha 1.5 scores best, 70.0 beside 60.0 at 1 and 10.0 at 0."
    )
    assert findings.on_alpha([sweep(up, lower_is_better=True)]) == (
        "On gsm alpha 0 scores best, 10.0 beside 60.0 at 1."
    )
    same = {alpha: Metric(value=0.3) for alpha in ("0.5", "1", "2")}
    assert findings.on_alpha([sweep(same)]) == "On gsm alpha 1 scores best, 30.0."
    number = {"0.5": Metric(value=2.5, unit="number"), "2": None, "first:3": Metric(value=99, unit="number")}
    assert findings.on_alpha([sweep(number)]) == "On gsm alpha 0.5 scores best, 2.5."
    assert findings.on_alpha([sweep({"2": None})]) == ""


@pytest.mark.parametrize(
    ("scores", "said"),
    [
        ((0.2, 0.45, 0.5), "correcting the first 4 tokens gives 45.0, within the interval of all (50.0)"),
        ((0.2, 0.3, 0.55), "correcting the first 16 tokens gives 55.0, within the interval of all (50.0)"),
        ((0.45, 0.3, 0.5), "even no corrected token gives 45.0, within the interval of all (50.0)"),
        ((0.44, 0.3, 0.56), "no schedule comes into the interval of all (50.0)"),
    ],
)
def test_the_fewest_corrected_tokens_that_do_as_well(scores: tuple[float, ...], said: str) -> None:
    names = (("first:16", 16), ("first:4", 4), ("0", 0))
    points = [point(a, Metric(value=s), until=u) for (a, u), s in zip(names, reversed(scores), strict=True)]

    def skip(whole: Metric | None) -> sweeps.Skip:
        own = (*points, point("1", whole))
        more = {"control": None, "forced": None}
        return sweeps.Skip(source=source(), metric="exact_match", points=own, **more)

    assert findings.on_skip([skip(Metric(value=0.5, low=0.45, high=0.55))]) == f"On gsm {said}."
    assert findings.on_skip([skip(Metric(value=0.5)), skip(None)]) == ""


def test_agreement_is_told_on_the_proxys_outputs_where_there_are_some() -> None:
    spread = positions.Spread(median=0.1, quarter=0.0, three_quarters=0.2, mean=0.1)
    line = positions.AgreementRow(
        first=0, last=0, n=3, kl_proxy=spread, kl_base=spread, same_proxy=Metric(value=0.5),
        same_base=Metric(value=0.5),
    )  # fmt: skip

    def found(task: str, role: str) -> positions.Agreement:
        return positions.Agreement(
            source=source(task, role), tokens=3, kl_proxy=Metric(value=0.1), kl_base=Metric(value=0.2),
            same_proxy=Metric(value=0.8125), same_base=Metric(value=0.25), first_step=line,
            paper_first_step={}, rows=(line,), bands=(line,),
        )  # fmt: skip

    said = "on {} the tuned model's first choice is the proxy's at 81.2% of tokens, the base's at 25.0%"
    assert findings.on_agreement([found("gsm", "tuned"), found("xsum", "proxy")]) == f"O{said[1:]}.".format(
        "xsum"
    )
    assert findings.on_agreement([found("gsm", "tuned")]) == f"O{said[1:]}.".format("gsm")


def test_what_the_proxy_breaks_and_mends() -> None:
    one = failures.Failures(
        first=source(role="base"), second=source(), metric="exact_match", n=40, of=41, both_right=20,
        both_wrong=9, only_first=3, only_second=8, p=0.2266, items=(),
    )  # fmt: skip
    assert findings.on_failures([one]) == "On gsm the proxy breaks 3 and mends 8 of 40 items (p = 0.23)."


@pytest.mark.parametrize(
    ("seconds", "took"),
    [(119.0, "119 seconds"), (120.0, "2 minutes"), (7199.0, "120 minutes"), (7200.0, "2.0 hours")],
)
def test_what_all_of_it_took(seconds: float, took: str) -> None:
    costs = (Cost(seconds=19.0, generated_tokens=1200), Cost(seconds=seconds - 19.0, generated_tokens=345))
    runs = [run("base", 0.1).model_copy(update={"cost": cost}) for cost in costs]
    assert findings.on_runs(runs) == f"2 runs took {took} and generated 1,545 tokens."
