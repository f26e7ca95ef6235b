"""Which runs may stand beside each other, and what is told of the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from proxytune import comparison
from proxytune.api_spec import ApiSpec
from proxytune.comparison import Conditions
from proxytune.config import ModelSpec, Sampling, System, parse_alpha
from proxytune.records import Metric, Run
from proxytune.report import tables
from tests.support.command_line import proxytune
from tests.support.reports import run

SCORES = {"base": 0.1, "proxy": 0.82, "tuned": 0.9}
TRIO = {role: run(role, score) for role, score in SCORES.items()}
FEW = {"data_sha256": "3" * 64, "limit": 3}


def changed(made: Run, **fields: Any) -> Run:
    """A run with some fields of its record changed."""
    return made.model_copy(update=fields)


def over(made: Run, n: int) -> Run:
    """A run of 100 examples of which n have a score."""
    return changed(made, metrics={"exact_match": made.metrics["exact_match"].model_copy(update={"n": n})})


OTHERS = {
    "items": run("base", 0.1, data_sha256="1" * 64),
    "temperature": run("base", 0.1, sampling=Sampling(temperature=0.7)),
    "seed": run("base", 0.1, sampling=Sampling(seed=1)),
    "length": run("base", 0.1, sampling=Sampling(max_new_tokens=8)),
    "stops": run("base", 0.1, sampling=Sampling(stop=("x",))),
    "samples": run("base", 0.1, sampling=Sampling(n=2)),
    "mode": run("base", 0.1, mode="likelihood"),
    "judge": changed(TRIO["base"], judge="gpt"),
    "system": run("base", 0.1, system="other"),
    "models": run("base", 0.1, model="elsewhere"),
    "unscored items": over(TRIO["base"], 98),
    "unjudged items": changed(
        TRIO["base"], metrics={**TRIO["base"].metrics, "unjudged": Metric(value=0.1, n=100)}
    ),
    "no score": over(TRIO["base"], 0),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_gap_is_of_three_runs_under_the_same_conditions(name: str) -> None:
    base, proxy, tuned = TRIO.values()
    assert comparison.gap(base, proxy, tuned, "exact_match") == pytest.approx(0.9)
    assert comparison.gap(OTHERS[name], proxy, tuned, "exact_match") is None
    rows = tables.role_rows([OTHERS[name], proxy, tuned])
    assert [row.gap_closed for row in rows if row.role == "proxy"] == [None]
    mixed = tables.role_rows([base, OTHERS[name], proxy, tuned])
    assert [row.gap_closed for row in mixed if row.role == "proxy"] == (
        [None] if name in ("unscored items", "unjudged items", "no score") else [pytest.approx(0.9)]
    ), "the base that is like the others counts, and two that do not agree count neither"


def test_a_score_that_is_meant_for_some_items_lacks_no_other() -> None:
    def meant(n: int) -> list[Run]:
        shown = [(made, made.metrics["exact_match"]) for made in TRIO.values()]
        of_80 = [(made, metric.model_copy(update={"n": n, "of": 80})) for made, metric in shown]
        return [changed(made, metrics={"exact_match": metric}) for made, metric in of_80]

    assert comparison.gap(*meant(80), "exact_match") == pytest.approx(0.9)
    assert comparison.gap(*meant(79), "exact_match") is None


def test_alpha_trace_and_words_are_no_conditions() -> None:
    proxy = run("proxy", 0.5, alpha=parse_alpha(0.4), trace="tokens", limit=100)
    words = System(name="tiny", base=ModelSpec(model="nowhere"), description="d", data={"gsm": "hub"})
    tuned = run("tuned", 0.9)
    tuned = changed(tuned, spec=tuned.spec.model_copy(update={"system": words}))
    assert comparison.gap(TRIO["base"], proxy, tuned, "exact_match") == pytest.approx(0.5)


def test_rows_of_other_conditions_have_a_table_of_their_own() -> None:
    small = [changed(run(role, score, **FEW), n=3) for role, score in SCORES.items()]
    warm = run("proxy", 0.7, sampling=Sampling(temperature=0.7))
    whole = run("proxy", 0.75)
    found = tables.alike(tables.role_rows([*small, whole, warm]))
    assert [tables.title(rows) for rows in found] == [
        "gsm: exact_match (3 examples, temperature 0.0)",
        "gsm: exact_match (100 examples, temperature 0.0)",
        "gsm: exact_match (100 examples, temperature 0.7)",
    ]
    assert [len(rows) for rows in found] == [3, 1, 1]
    assert [row.gap_closed for rows in found for row in rows if row.role == "proxy"] == [
        pytest.approx(0.9), None, None,
    ]  # fmt: skip
    other_items = [run("proxy", 0.5), run("proxy", 0.5, data_sha256="ab" * 32)]
    titles = [tables.title(rows) for rows in tables.alike(tables.role_rows(other_items))]
    assert titles == ["gsm: exact_match (items 000000000000)", "gsm: exact_match (items abababababab)"]


def test_rows_that_differ_show_in_what() -> None:
    proxies = [run("proxy", score, alpha=parse_alpha(alpha)) for score, alpha in ((0.5, 0.4), (0.7, 1))]
    rows = tables.role_rows([TRIO["base"], *proxies, TRIO["tuned"], run("tuned", 0.9, trace="tokens")])
    assert [row.label for row in rows] == [
        "base", "proxy, alpha 0.4", "proxy, alpha 1", "tuned, trace off", "tuned, trace tokens",
    ]  # fmt: skip
    assert [row.gap_closed for row in rows[1:3]] == [pytest.approx(0.5), pytest.approx(0.75)]
    [alone] = tables.role_rows(proxies[:1])
    assert alone.label == "proxy, alpha 0.4", "it is not the system's own"
    models = [run("base", 0.1), run("proxy", 0.8, model="elsewhere")]
    labels = [row.label for row in tables.role_rows(models)]
    assert labels == ["base, base.model nowhere", "proxy, base.model elsewhere"]
    assert len(tables.role_rows([run("base", 0.1), run("base", 0.1)])) == 1, "the same run again"


def test_what_was_not_judged_shows_no_score() -> None:
    waiting = changed(
        run("proxy", 0.5), metrics={"unjudged": Metric(value=1, low=1, high=1, n=100)}, headline="unjudged"
    )
    [row] = tables.role_rows([waiting])
    assert (row.score, row.cells[2], row.examples) == (None, "not judged", "0 of 100")
    assert tables.title([row]) == "gsm: not judged" and "100.0" not in tables.markdown_table([row])
    assert tables.summary([row])["tasks"]["gsm"]["proxy"] is None
    failed = changed(run("base", 0.5), metrics={"exact_match": Metric(value=0, n=0)})
    [row] = tables.role_rows([failed])
    assert (row.score, row.cells[2], row.examples) == (None, "no score", "0 of 100")
    assert failed.model_dump(mode="json")["metrics"]["exact_match"]["value"] is None
    assert Run.model_validate_json(failed.model_dump_json()) == failed
    with pytest.raises(ValidationError):
        Metric.model_validate({"value": None, "n": 1})


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A demo of three examples, with a run of the proxy on more of them beside it."""
    made = {f"demo/gsm/{role}/limit=3": (run(role, s, system="demo", **FEW), 3) for role, s in SCORES.items()}
    made["twice"] = run("proxy", 0.5, system="demo"), 300
    for name, (one, n) in made.items():
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "run.json").write_text(changed(one, n=n).model_dump_json())
    return tmp_path


def test_the_papers_tables_come_when_asked_for_and_mix_nothing(results: Path) -> None:
    assert "of the paper" not in proxytune("report", results).stdout
    shown = proxytune("report", results, "--paper", "--markdown").stdout
    own = [line for line in shown.splitlines() if line.startswith("| demo |")]
    assert len(own) == 6 and all("n = 3" in line and "n = 300" not in line for line in own)
    assert "ours 90.00% (demo, 1 of 5 columns)" in shown and "82.0 [77.0, 87.0], n = 3 |" in shown
    theirs = changed(run("proxy", 0.3, system="llama2-13b-chat", sampling=Sampling(temperature=0.5)), n=7)
    (results / "theirs").mkdir()
    (results / "theirs" / "run.json").write_text(theirs.model_dump_json())
    shown = proxytune("report", results, "--markdown").stdout
    assert "### Table 2 of the paper" in shown and "### Table 5 of the paper" not in shown
    [line] = [line for line in shown.splitlines() if line.startswith("| 13B | proxy |")]
    assert "ours 30.0 [25.0, 35.0], n = 7, temperature 0.5" in line


# Conditions and models, one by one


def of_system(made: Run, **fields: Any) -> Run:
    """A run of a system with some fields changed."""
    system = made.spec.system.model_copy(update=fields)
    return changed(made, spec=made.spec.model_copy(update={"system": system}))


def test_the_conditions_of_a_run() -> None:
    sampling = Sampling(seed=3)
    made = changed(run("proxy", 0.5, mode="choices", sampling=sampling, data_sha256="7"), judge="j")
    assert comparison.conditions(made) == Conditions(
        "gsm", "choices", "7", sampling, "j", "exact_match", visible=None
    )
    assert comparison.conditions(made, "f1").metric == "f1"
    api = of_system(made, base=ApiSpec(api="http://here", model="m", top_logprobs=20))
    assert comparison.conditions(api).visible == 20
    few = of_system(made, base=ApiSpec(api="http://here", model="m", top_logprobs=5))
    assert not comparison.comparable([api, few]) and comparison.comparable([api, api])


def test_the_models_of_a_run_are_told_without_words_and_alpha() -> None:
    made = TRIO["base"]
    model = ModelSpec(model="other")
    for fields in (
        {"alpha": parse_alpha(0.5)}, {"description": "d"}, {"data": {"gsm": "hub"}}, {"judges": {"gsm": "j"}},
    ):  # fmt: skip
        assert comparison.models_of(of_system(made, **fields)) == comparison.models_of(made)
    for other in (
        {"name": "x"}, {"base": model}, {"expert": model}, {"antiexpert": model}, {"tuned": model},
        {"vocab": "intersect"},
    ):  # fmt: skip
        assert comparison.models_of(of_system(made, **other)) != comparison.models_of(made)


def test_in_what_two_runs_differ() -> None:
    one = run("base", 0.1)
    assert comparison.unlike(one, one) == ""
    other = run(
        "base", 0.1, sampling=Sampling(temperature=0.5), data="hub", shots=3, mode="choices", model="m2",
        data_sha256="ab" * 32,
    )  # fmt: skip
    other = changed(other, n=7, judge="j", headline="f1")
    assert comparison.unlike(one, other) == (
        "examples: 100 and 7; temperature: 0.0 and 0.5; data: generated and hub; shots: 0 and 3; "
        "mode: generate and choices; judge: none and j; metric: exact_match and f1; "
        "items: 000000000000 and abababababab; base.model: nowhere and m2"
    )
    vocab = of_system(one, vocab="intersect", name="x", alpha=parse_alpha(0.5))
    assert comparison.unlike(vocab, one) == "name: x and tiny; vocab: intersect and strict"


def test_apart_are_told_by_what_differs() -> None:
    warm, other = Sampling(temperature=0.7), {"data_sha256": "1" * 64}
    runs = [run("base", 0.1), run("base", 0.1, sampling=warm), changed(run("base", 0.1, shots=2), n=3)]
    assert comparison.apart(runs) == [
        "100 examples, temperature 0.0, shots 0", "100 examples, temperature 0.7, shots 0",
        "3 examples, temperature 0.0, shots 2",
    ]  # fmt: skip
    named = changed(run("base", 0.1), headline="f1")
    assert comparison.apart([run("base", 0.1), named]) == ["", ""], "their metric aside"
    assert comparison.apart([run("base", 0.1), run("base", 0.1, **other)]) == [
        "items 000000000000", "items 111111111111",
    ]  # fmt: skip
    both = [run("base", 0.1), run("base", 0.1, **other), run("base", 0.1, sampling=warm)]
    assert comparison.apart(both) == [
        "temperature 0.0, items 000000000000", "temperature 0.0, items 111111111111",
        "temperature 0.7, items 000000000000",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("role", "first", "second", "told"),
    [
        ("base", {}, {"limit": 5}, ["limit none", "limit 5"]),
        ("base", {}, {"data": "hub"}, ["data generated", "data hub"]),
        ("base", {}, {"trace": "tokens"}, ["trace off", "trace tokens"]),
        ("base", {"forced": " A"}, {"forced": " B"}, ["forced  A", "forced  B"]),
        ("base", {}, {"forced": " B"}, ["", ""]),
        ("base", {}, {"alpha": parse_alpha(0.5)}, ["", ""]),
        ("base", {}, {"shots": 4}, ["", ""]),
        ("proxy", {}, {"defer": 0.25}, ["defer none", "defer 0.25"]),
        ("proxy", {}, {"alpha": parse_alpha(0.5)}, ["alpha 1", "alpha 0.5"]),
        (
            "proxy", {"alpha": parse_alpha(2), "limit": 3}, {"alpha": parse_alpha(2), "limit": 4},
            ["alpha 2, limit 3", "alpha 2, limit 4"],
        ),
        ("tuned", {}, {"model": "m2"}, ["base.model nowhere", "base.model m2"]),
    ],
)  # fmt: skip
def test_what_tells_runs_of_a_role_apart(
    role: str, first: dict[str, Any], second: dict[str, Any], told: list[str]
) -> None:
    assert comparison.details([run(role, 0.5, **first), run(role, 0.5, **second)]) == told


@pytest.mark.parametrize("place", SCORES)
def test_a_gap_needs_a_whole_score_of_all_three(place: str) -> None:
    for other in (over(TRIO[place], 99), changed(TRIO[place], metrics={}), changed(TRIO[place], judge="j")):
        three = {**TRIO, place: other}
        assert comparison.gap(three["base"], three["proxy"], three["tuned"], "exact_match") is None
    swapped = comparison.gap(TRIO["tuned"], TRIO["proxy"], TRIO["base"], "exact_match")
    assert swapped == pytest.approx(0.1), "(0.82 - 0.9) / (0.1 - 0.9)"
