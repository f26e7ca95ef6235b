"""What the page and the examples put beside each other, and what they show without a score."""

from __future__ import annotations

from pathlib import Path

from proxytune.config import Sampling
from proxytune.records import Metric, Run
from proxytune.report import examples, figures, tables
from proxytune.report.charts import svg
from proxytune.report.page import Report, tiles
from tests.support.hostile import example, put, tokens_for
from tests.support.reports import run

SCORES = {"base": 0.1, "expert": 0.5, "proxy": 0.82, "tuned": 0.9}


def waiting(made: Run) -> Run:
    """The run before anything was judged."""
    metrics = {"unjudged": Metric(value=1.0, low=1.0, high=1.0, n=made.n)}
    return made.model_copy(update={"metrics": metrics, "headline": "unjudged"})


def over(made: Run, n: int) -> Run:
    """The run where n of its 100 examples have a score."""
    return made.model_copy(update={"metrics": {"exact_match": Metric(value=0.8 if n else 0.0, n=n)}})


def test_the_page_takes_one_set_of_conditions_for_a_system_and_task(tmp_path: Path) -> None:
    rows = [example(0, "x", True)]
    for role, score in SCORES.items():
        put(tmp_path / "s" / "gsm" / role, run(role, score), rows)
    put(tmp_path / "s" / "gsm" / "antiexpert", run("antiexpert", 0.7, data_sha256="7" * 64), rows)
    warm = run("base", 0.2, sampling=Sampling(temperature=1.0), forced=" So")
    put(tmp_path / "s" / "gsm" / "base" / "warm", warm, rows)
    inputs = Report.read(tmp_path).inputs
    assert {row.label: row.score.value for row in inputs.rows if row.score} == SCORES
    assert inputs.others == 2 and [tile["gap"] for tile in tiles(inputs.rows)] == ["90.0%"]


def test_systems_asked_other_items_have_charts_of_their_own(tmp_path: Path) -> None:
    for system, items, n in (("one", "1" * 64, 100), ("two", "2" * 64, 20)):
        for role, score in SCORES.items():
            made = run(role, score, system=system, data_sha256=items).model_copy(update={"n": n})
            put(tmp_path / system / "gsm" / role, made, [example(0, "x", True)])
    report = Report.read(tmp_path)
    drawn = [figure for figure in report.figures if figure.name.startswith("score-")]
    titles = ["gsm: exact_match (100 examples)", "gsm: exact_match (20 examples)"]
    assert [figure.title for figure in drawn] == titles
    assert [len(figure.table.rows) for figure in drawn] == [4, 4]
    [results] = [one for one in report.sections if one.id == "results"]
    [scores] = results.parts[0].tables
    own = [row.cells for row in scores.rows if row.mark == "strong"]
    assert [(f"gsm: {cells[2]}", cells[-1]) for cells in own] == list(zip(titles, ("100", "20"), strict=True))
    assert len(tiles(report.inputs.rows)) == 2


def test_no_score_is_drawn_of_what_was_not_judged(tmp_path: Path) -> None:
    for role, score in SCORES.items():
        put(tmp_path / "s" / "gsm" / role, waiting(run(role, score)), [example(0, "x", True)])
    report = Report.read(tmp_path)
    assert not [figure for figure in report.figures if figure.name.startswith(("score-", "price-"))]
    assert tiles(report.inputs.rows) == []
    page = report.html()
    assert "not judged" in page and "100.0" not in page


def test_one_role_without_a_score_stands_beside_the_others() -> None:
    rows = tables.role_rows([over(run("base", 0.1), 0), run("proxy", 0.8), run("tuned", 0.9)])
    drawn = figures.score_figure(rows)
    assert drawn is not None and "no score" in svg(drawn)
    assert drawn.caption.startswith("0 of 100, 100 examples")
    assert [row.cells[1] for row in drawn.table.rows] == ["no score", "80.0", "90.0"]


def test_captions_say_how_many_of_how_many() -> None:
    rows = tables.role_rows([run("base", 0.1), over(run("proxy", 0.8), 60)])
    drawn = figures.score_figure(rows)
    assert drawn is not None and drawn.caption.startswith("100, 60 of 100 examples")


def test_answers_beside_each_other_are_of_the_same_sampling(tmp_path: Path) -> None:
    rows = [example(0, "x", True)]
    put(tmp_path / "s" / "gsm" / "proxy", run("proxy", 0.8, trace="tokens"), rows, [tokens_for(0)])
    put(tmp_path / "s" / "gsm" / "base", run("base", 0.1), rows)
    put(tmp_path / "s" / "gsm" / "tuned", run("tuned", 0.9, sampling=Sampling(temperature=1.0)), rows)
    report = Report.read(tmp_path)
    [traced] = report.inputs.sets
    assert set(traced.others) == {"base"}
    shown = examples.examples(report.inputs.found, 1, show_hateful=False)
    assert [[one.who for one in item.responses] for item in shown] == [["base", "proxy"], ["tuned"]]
