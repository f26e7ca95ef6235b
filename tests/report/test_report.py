"""Tables of runs, and the paper's figures."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from proxytune.errors import UserError
from proxytune.paper import published as figures
from proxytune.paper import recipes as paper
from proxytune.records import Cost, Metric, RoleMemory, Run
from proxytune.report import examples as report_text
from proxytune.report import paper_tables as report_paper
from proxytune.report import tables as report
from tests.support.checkout import ROOT
from tests.support.reports import run

SCORES = {"tuned": 0.9, "proxy": 0.82, "expert": 0.5, "base": 0.1, "antiexpert": 0.0}
TRIO = [run(role, score) for role, score in SCORES.items()]


@pytest.mark.parametrize(
    ("metric", "shown"),
    [
        (Metric(value=0.5, low=0.25, high=0.75), "50.0 [25.0, 75.0]"),
        (Metric(value=50, low=25, high=75, unit="percent"), "50.0 [25.0, 75.0]"),
        (Metric(value=50, unit="percent"), "50.0"),
        (Metric(value=0.5), "50.0"),
        (Metric(value=1.5, low=1, high=2, unit="number"), "1.5"),
    ],
)
def test_a_figure_is_shown_in_its_unit(metric: Metric, shown: str) -> None:
    assert report.percent(metric) == shown


def test_a_role_takes_the_memory_of_all_of_its_models() -> None:
    one = RoleMemory(weights=3, kv_peak=2)
    names = ("base", "expert", "expert2", "antiexpert", "antiexpert2", "tuned")
    cost = Cost(memory=dict.fromkeys(names, one))
    for role, models in (("base", 1), ("expert", 2), ("antiexpert", 2), ("proxy", 5), ("tuned", 1)):
        done = run(role, 0.5).model_copy(update={"cost": cost})
        assert report.role_rows([done])[0].memory == 5 * models, role


def test_rows_come_in_order_with_gap_memory_and_speed() -> None:
    rows = report.role_rows(TRIO)
    assert [row.role for row in rows] == ["base", "antiexpert", "expert", "proxy", "tuned"]
    proxy = rows[3]
    assert proxy.gap_closed == pytest.approx(0.9) and proxy.ms_per_token == 2.0
    assert (rows[0].memory, rows[2].memory, proxy.memory) == (9_000_000, 600_000, 10_200_000)
    assert proxy.cells == ("tiny", "proxy", "82.0 [77.0, 87.0]", "90.0%", "10.2 MB", "2.00", "100")
    assert [row.cells[3] for row in rows] == ["", "", "", "90.0%", ""]


def test_the_summary_of_the_demo() -> None:
    entry = report.summary(report.role_rows(TRIO))["tasks"]["gsm"]
    assert entry == {
        "n": 100, "base": 0.1, "antiexpert": 0.0, "expert": 0.5, "proxy": 0.82, "tuned": 0.9,
        "gap_closed": pytest.approx(0.9),
    }  # fmt: skip


@pytest.mark.parametrize(
    "others",
    [
        [run("tuned", 0.12), run("base", 0.1)],
        [run("tuned", 0.9)],
        [run("tuned", 0.9), run("base", 0.1, data_sha256="1" * 64)],
        [run("tuned", 0.9, system="other"), run("base", 0.1)],
    ],
    ids=["no firm gap", "no base", "other data", "other system"],
)
def test_no_gap_is_named_where_there_is_none(others: list[Run]) -> None:
    rows = report.role_rows([run("proxy", 0.5), *others])
    proxy = next(row for row in rows if row.role == "proxy")
    assert proxy.gap_closed is None and proxy.cells[3] == "n/a"


def test_the_forced_control_stands_beside_the_base() -> None:
    rows = report.role_rows([*TRIO, run("base", 0.8, forced=" Exactly")])
    assert [row.label for row in rows[:3]] == ["base", "base, opener forced", "antiexpert"]
    assert rows[1].gap_closed == pytest.approx(0.875) and rows[4].gap_closed == pytest.approx(0.9)
    assert report.summary(rows)["tasks"]["gsm"]["base_forced"] == 0.8


def test_tables_name_the_system_only_where_there_are_several() -> None:
    rows = report.role_rows(TRIO)
    assert report.markdown_table(rows).startswith("| as | score [95%] | gap closed |")
    both = report.role_rows([*TRIO, run("tuned", 0.6, system="mid")])
    table = report.markdown_table(both).splitlines()
    assert table[0].startswith("| system | as |") and table[-1].startswith(
        "| mid | tuned | 60.0 [55.0, 65.0] |"
    )
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(report.rich_table(rows))
    assert "90.0%" in console.export_text()


def test_sizes() -> None:
    assert [report.size(n) for n in (0, 340_000, 53_000_000_000)] == ["", "0.3 MB", "53.0 GB"]


# The paper


def test_the_papers_headline_comes_out_of_the_stored_metrics() -> None:
    published = paper.read_paper()
    expected = {("2", "13B"): 91.05, ("2", "70B"): 88.07}
    for (table, size), share in expected.items():
        assert figures.paper_gap_closed(published, table, size) * 100 == pytest.approx(share, abs=0.005)
    for size, share in published["tables"]["5"]["gap_closed"].items():  # with TriviaQA's printed cells
        assert figures.paper_gap_closed(published, "5", size) * 100 == pytest.approx(share, abs=0.0501)


def test_printed_and_stored_figures_differ_in_the_four_known_cells() -> None:
    published = paper.read_paper()
    recipes = [paper.load_recipe(name) for name in ("table2", "table3", "table4", "table5")]
    tables = [report_paper.markdown_side_by_side(recipe, published, {}) for recipe in recipes]
    assert [table.count("printed") for table in tables] == [2, 0, 1, 1]


def test_stored_figures_equal_the_repositorys_files(reference: Path) -> None:
    stored = paper.read_paper()["stored"]
    found = 0
    for path in (reference / "golden").glob("*/*/*metrics.json"):
        task = "truthfulqa_mc" if path.name == "mc_metrics.json" else path.parent.parent.name
        assert stored[task]["runs"][path.parent.name] == json.loads(path.read_text()), path
        found += 1
    assert found == 31


def test_the_analyses_are_whole() -> None:
    analyses = paper.read_paper()["analyses"]
    assert [row["alpha"] for row in analyses["alpha_sweep"]["rows"]] == [k / 5 for k in range(1, 11)]
    main = paper.read_paper()["stored"]["truthfulqa"]["runs"]["dexperts-13B-helpful-prompt"]
    assert analyses["alpha_sweep"]["rows"][4].items() >= {
        "GPT-true acc": main["GPT-true acc"], "GPT-info acc": main["GPT-info acc"]
    }.items()  # fmt: skip
    rows = analyses["truthfulqa_ngrams"]["rows"]
    assert len(rows) == 20 and all(row["token"] in row["gram"].split() for row in rows)


def test_the_results_page_shows_demo_runs_and_the_paper() -> None:
    runs = [run("base", 0.1, model="demo://base"), run("base", 0.3)]
    text = report_paper.results_readme(paper.read_paper(), runs)
    assert "### gsm: exact_match" in text and "| base | 10.0 [5.0, 15.0] |" in text and "30.0" not in text
    assert "91.05% (13B), 88.07% (70B)" in text and "56.62 (57.4 printed)" in text


def test_the_papers_half_of_the_committed_page_is_up_to_date() -> None:
    page = ROOT / "results" / "README.md"
    text = report_paper.results_readme(paper.read_paper(), [])
    if page.exists():
        committed = page.read_text(encoding="utf-8")
        assert committed.partition("## The paper")[2] == text.partition("## The paper")[2], (
            "run: proxytune report results --write"
        )


def test_a_run_that_cannot_be_read_is_named_and_one_of_another_version_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "run.json").write_text('{"schema_version": 99}')
    assert report.main_runs(tmp_path) == ([], 0)
    assert "left out" in capsys.readouterr().err
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "run.json").write_text("{")
    with pytest.raises(UserError, match="cannot read"):
        report.main_runs(tmp_path)


# Responses


def stored(folder: Path, role: str, response: str, task: str = "gsm", **row: Any) -> None:
    """A finished run of one example on disk."""
    made = run(role, 0.5, task=task)
    path = folder / "tiny" / task / role
    path.mkdir(parents=True)
    (path / "run.json").write_text(made.model_dump_json())
    line = {"id": "0", **row, "scores": {"exact_match": 0.5}, "responses": [{"text": response}]}
    (path / "predictions.jsonl").write_text(json.dumps(line) + "\n")


def test_examples_show_every_role_and_no_markup(tmp_path: Path) -> None:
    hostile = "<script>alert(1)</script> | **b** [red]x[/red] \x1b[31m\n\nsecond line"
    stored(tmp_path, "tuned", "5", question="How many [bold]nuts[/bold]?")
    stored(tmp_path, "base", hostile, question="How many [bold]nuts[/bold]?")
    found, _ = report.main_runs(tmp_path)
    [shown] = report_text.examples(found, 3, show_hateful=False)
    assert [one.who for one in shown.responses] == ["base", "tuned"] and shown.responses[1].text == "5"
    assert shown.responses[0].scores == "exact_match 0.5"
    text = report_text.markdown_example(shown)
    assert "<script" not in text and "\x1b" not in text and "\\|" in text and "\\*\\*b" in text
    assert "/ second line" in text and len(text.splitlines()) == 6
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(report_text.rich_example(shown))
    printed = console.export_text()
    assert "[red]x[/red]" in printed and "[bold]nuts[/bold]" in printed and "\x1b" not in printed
    long = report_text.plain("x" * 10_000)
    assert len(long) < 500 and long.endswith("...")


def test_hateful_text_is_hidden_unless_asked_for(tmp_path: Path) -> None:
    stored(tmp_path, "base", "ANSWERED", task="toxigen", text="ASKED", target_groups=["a"])
    found, _ = report.main_runs(tmp_path)
    for show in (False, True):
        [shown] = report_text.examples(found, 1, show_hateful=show)
        console = Console(width=200, record=True, file=io.StringIO())
        console.print(report_text.rich_example(shown))
        for text in (report_text.markdown_example(shown), console.export_text()):
            assert (("ANSWERED" in text), ("ASKED" in text)) == (show, show)
            assert ("hidden" in text) != show
