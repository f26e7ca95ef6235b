"""What the drawings are made of: their data, bounds and captions, and the tables beside them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from proxytune.config import Sampling
from proxytune.paper import published
from proxytune.records import Cost, Metric, RoleMemory, Run
from proxytune.report import charts, figures
from proxytune.report import page as report_page
from proxytune.report.charts import Figure
from proxytune.report.tables import RoleRow, role_rows
from tests.support.reports import run

SCORES = {"base": 0.1, "expert": 0.5, "proxy": 0.82, "tuned": 0.9}


def rows_of(**more: Any) -> list[RoleRow]:
    """The lines of one system and task."""
    return role_rows([run(role, score, **more) for role, score in SCORES.items()])


def values(figure: Figure | None, field: str) -> list[Any]:
    """A field of all data of a drawing's layers that have it, layer by layer."""
    assert figure is not None
    found = [datum for layer in figure.layers for datum in layer["data"]["values"]]
    return [datum[field] for datum in found if field in datum]


# The paper's figures


def paper() -> dict[str, Any]:
    """A table 2 of one task, and others that are empty. Three of its cells are stored."""
    column = {"task": "gsm", "name": "GSM", "metric": "acc", "unit": "share"}
    other = {"task": None, "name": "TriviaQA", "metric": "acc", "unit": "share"}
    rows = [
        {"size": "7B", "role": "expert", "runs": [None, None], "printed": [30.0, 9.0]},
        {"size": "13B", "role": "base", "runs": [None, None], "printed": [10.0, None]},
        {"size": "13B", "role": "proxy", "runs": [None, None], "printed": [25.0, 8.0]},
        {"size": "13B", "role": "tuned", "runs": [None, None], "printed": [50.0, 8.0]},
        {"size": "70B", "role": "base", "runs": [None, None], "printed": [20.0, 8.0]},
        {"size": "70B", "role": "proxy", "runs": [None, None], "printed": [80.0, 9.0]},
        {"size": "70B", "role": "tuned", "runs": [None, None], "printed": [20.0, 8.0]},
    ]
    none: dict[str, Any] = {"columns": [], "rows": []}
    return {"tables": {"2": {"columns": [column, other], "rows": rows}, "4": none, "5": none}}


def test_published_scores_have_the_gap_of_their_own_size() -> None:
    found = figures.published_scores(paper(), "gsm")
    assert [(row["size"], row["role"], row["score"], row["gap"]) for row in found] == [
        ("7B", "expert", 30.0, None),
        ("13B", "base", 10.0, None),
        ("13B", "proxy", 25.0, 37.5),
        ("13B", "tuned", 50.0, None),
        ("70B", "base", 20.0, None),
        ("70B", "proxy", 80.0, None),
        ("70B", "tuned", 20.0, None),
    ]
    assert {(row["table"], row["metric"]) for row in found} == {("2", "GSM")}
    trivia = figures.published_scores(paper(), "triviaqa")
    assert [(row["size"], row["role"], row["gap"]) for row in trivia][:2] == [
        ("7B", "expert", None), ("13B", "proxy", None),
    ], "a cell that was not printed is left out, and no gap is closed without its base"  # fmt: skip
    assert figures.published_scores(paper(), "xsum") == []


def test_stored_figures_go_before_printed_ones() -> None:
    whole = published.read_paper()
    found = figures.published_scores(whole, "humaneval")
    assert {row["table"] for row in found} == {"4"}, "the paper's codex_humaneval"
    column = next(c for c in whole["tables"]["4"]["columns"] if c["task"] == "codex_humaneval")
    place = whole["tables"]["4"]["columns"].index(column)
    stored = [
        published.stored_percent(whole, column, row["runs"][place]) for row in whole["tables"]["4"]["rows"]
    ]
    assert [row["score"] for row in found] == stored
    assert figures._either(None, 3.0) == 3.0 and figures._either(0.0, 3.0) == 0.0


def test_the_papers_lines_have_its_expert_in_each() -> None:
    table = figures.beside_table(rows_of(), {"gsm": figures.published_scores(paper(), "gsm")})
    assert table.columns == (
        "task", "models", "metric, %", "base", "antiexpert", "expert", "proxy", "tuned", "gap closed",
        "examples",
    )  # fmt: skip
    paper_13b = ("gsm", "paper, 13B (table 2)", "GSM", "10.0", "")
    assert [(row.mark, row.cells) for row in table.rows] == [
        ("strong", ("gsm", "tiny", "exact_match", "10.0", "", "50.0", "82.0", "90.0", "90.0%", "100")),
        ("published", (*paper_13b, "30.0", "25.0", "50.0", "37.5%", "")),
        ("published", ("gsm", "paper, 70B (table 2)", "GSM", "20.0", "", "30.0", "80.0", "20.0", "", "")),
    ]  # fmt: skip


def test_our_lines_are_of_the_first_row_of_each_role() -> None:
    some = run("base", 0.2, trace="tokens").model_copy(
        update={"metrics": {"exact_match": Metric(value=0.2, n=60)}}
    )
    forced = run("expert", 0.7, forced=" So")
    rows = role_rows([run("base", 0.1), some, forced, run("tuned", 0.9, system="two")])
    lines = figures.beside_table(rows, {}).rows
    assert [row.cells for row in lines] == [
        ("gsm", "tiny", "exact_match", "10.0", "", "", "", "", "", "100"),
        ("gsm", "two", "exact_match", "", "", "", "", "90.0", "", "100"),
    ]
    waiting = role_rows([forced.model_copy(update={"metrics": {}, "headline": "unjudged"})])
    assert figures.beside_table(waiting, {}).rows[0].cells == (
        "gsm", "tiny", "not judged", "", "", "", "", "", "", "0 of 100",
    )  # fmt: skip


# Scores


def test_the_table_beside_the_scores() -> None:
    rows = [*rows_of(), *role_rows([run("proxy", 0.3, system="two")])]
    table = figures.score_table(rows)
    assert table.title == "gsm: exact_match" and table.columns == figures.SCORE_COLUMNS
    assert figures.SCORE_COLUMNS == (
        "as", "score, %", "95% interval", "gap closed", "memory", "ms / token", "examples",
    )  # fmt: skip
    lines = [(row.mark, row.cells) for row in table.rows]
    assert lines[0] == ("", ("base", "10.0", "5.0 to 15.0", "", "9.0 MB", "2.00", "100"))
    assert lines[2] == ("strong", ("proxy", "82.0", "77.0 to 87.0", "90.0%", "10.2 MB", "2.00", "100"))
    assert lines[4][1][0] == "two: proxy", "the system where it is not the first one's"


def test_a_score_is_drawn_with_its_interval_and_its_words() -> None:
    forced = role_rows([run("base", 0.3, forced=" So")])
    none = [replace(forced[0], role="tuned", forced=None, score=None, metric="faulty")]
    figure = figures.score_figure([*rows_of()[:3:2], *forced, *none])
    assert figure is not None and (figure.name, figure.height) == ("score-gsm", 4 * 27)
    assert figure.caption == "100, 0 of 100 examples; lines are 95% intervals"
    lines, dots, texts = figure.layers[3:6]
    assert lines["data"]["values"][0] == {
        "name": "proxy", "score": 82.0, "low": pytest.approx(77), "high": pytest.approx(87), "text": "82.0",
        "label": "proxy; 82.0 [77.0, 87.0]; 100 examples",
    }  # fmt: skip
    assert lines["encoding"]["x"]["field"] == "low" and lines["encoding"]["x2"] == {"field": "high"}
    assert dots["encoding"]["x"]["scale"]["domain"] == [0, 100]
    assert dots["encoding"]["x"]["title"] == "exact_match, %"
    assert dots["encoding"]["y"]["sort"] == ["base", "proxy", "base, opener forced", "tuned"]
    shapes = [layer["mark"]["shape"] for layer in (figure.layers[1], dots, figure.layers[7])]
    assert shapes == ["circle", "circle", "diamond"]
    assert dots["mark"]["color"] == charts.COLORS["proxy"]
    weights = [layer["layer"][1]["mark"]["fontWeight"] for layer in (figure.layers[2], texts)]
    assert weights == ["normal", "bold"]
    assert figure.layers[-1]["data"]["values"] == [{"name": "tuned", "text": "no score"}]
    assert figures.score_figure(none) is None


def test_the_gap_is_drawn_beside_the_papers_task_by_task() -> None:
    xsum = [run(role, score, task="xsum") for role, score in (("base", 0.5), ("proxy", 0.3), ("tuned", 0.9))]
    rows = [*role_rows(xsum), *rows_of(), *role_rows([run("proxy", 0.5, task="mute")])]
    entries = figures.published_scores(paper(), "gsm")
    figure = figures.gap_figure(rows, {"gsm": entries, "mute": entries})
    assert figure is not None
    # (0.3 - 0.5) / (0.9 - 0.5) = -50%
    assert [row.cells for row in figure.table.rows] == [
        ("gsm: tiny", "", "90.0"), ("gsm: paper, table 2", "13B", "37.5"), ("xsum: tiny", "", "-50.0"),
    ]  # fmt: skip
    assert figure.height == 21 * 3
    x = figure.layers[1]["encoding"]["x"]
    assert x["scale"]["domain"] == [-60, 100] and figure.layers[0]["data"]["values"] == [{"gap": 100}]
    assert set(values(figure, "label")) == {
        "gsm: tiny; 90.0% of the gap closed", "gsm: paper, table 2, 13B; 37.5% of the gap closed",
        "xsum: tiny; -50.0% of the gap closed",
    }  # fmt: skip
    assert figures.gap_figure(role_rows([run("proxy", 0.5)]), {}) is None


def test_a_gap_beyond_all_widens_the_drawing() -> None:
    rows = role_rows([run(role, score) for role, score in (("base", 0.1), ("proxy", 0.62), ("tuned", 0.5))])
    figure = figures.gap_figure(rows, {})
    assert figure is not None and figure.layers[1]["encoding"]["x"]["scale"]["domain"] == [0, 140]


def test_names_of_published_points_lie_outward() -> None:
    printed = [{"row": "r", "gap": gap, "text": f"{gap}"} for gap in (50, 10, 90, 30)]
    layers = figures._outward([*printed, {"row": "s", "gap": 5, "text": "5"}], {}, {})
    assert [(layer["data"]["values"][0]["text"], layer["layer"][0]["mark"]["align"]) for layer in layers] == [
        ("10", "right"),
        ("30", "center"),
        ("50", "center"),
        ("90", "left"),
        ("5", "left"),
    ]


# Prices


def priced(role: str, score: float, memory: int, ms: float) -> Run:
    """A run of this price."""
    facts = {"base" if role == "proxy" else role: RoleMemory(weights=memory - 5, kv_peak=5)}
    cost = Cost(seconds=ms + 1.0, prefill_seconds=1.0, generated_tokens=1000, memory=facts)
    return run(role, score).model_copy(update={"cost": cost})


def test_a_score_is_drawn_against_what_it_costs() -> None:
    runs = [priced("base", 0.1, 2_000_000, 0.8), priced("proxy", 0.82, 9_000_000, 6.4)]
    rows = role_rows([*runs, run("tuned", 0.9).model_copy(update={"cost": Cost()})])
    memory, time = figures.price_figure(rows, "memory"), figures.price_figure(rows, "time")
    assert memory is not None and time is not None
    assert (memory.name, time.name) == ("price-memory-gsm", "price-time-gsm")
    assert (memory.title, time.title) == ("gsm: score against memory", "gsm: score against time")
    assert [row.cells for row in memory.table.rows] == [("base", "2", "10.0"), ("proxy", "9", "82.0")]
    assert [row.cells for row in time.table.rows] == [("base", "0.8", "10.0"), ("proxy", "6.4", "82.0")]
    assert memory.table.columns == ("as", "memory of weights and KV cache, MB", "score, %")
    assert time.table.columns == ("as", "time per generated token, ms", "score, %")
    x = memory.layers[0]["encoding"]["x"]
    assert x["scale"]["domain"] == pytest.approx([2 / 1.6, 9 * 1.9]) and x["axis"]["values"] == [2, 5, 10]
    assert memory.layers[0]["encoding"]["y"]["scale"]["domain"] == [-4, 106]
    assert memory.layers[0]["encoding"]["y"]["axis"]["values"] == [0, 20, 40, 60, 80, 100]
    assert values(memory, "label")[-1] == "proxy; 82.0 [77.0, 87.0]; 100 examples; 9 MB"
    assert values(time, "label")[0] == "base; 10.0 [5.0, 15.0]; 100 examples; 0.8 ms per token"
    assert memory.caption == "up and to the left is better; lines are 95% intervals"
    assert figures.price_figure(rows[:1], "memory") is None
    assert figures.price_figure([rows[0], rows[2]], "time") is None, "one of them took no time that is known"
    number = {"exact_match": Metric(value=12.5, unit="number")}
    counts = role_rows([one.model_copy(update={"metrics": number}) for one in runs])
    drawn = figures.price_figure(counts, "memory")
    assert drawn is not None and values(drawn, "score")[0] == 12.5
    assert "domain" not in drawn.layers[1]["encoding"]["y"]["scale"]
    assert drawn.layers[1]["encoding"]["y"]["title"] == "exact_match"


# Layers


def test_ticks_of_a_logarithmic_axis_lie_within_its_bounds() -> None:
    axis = charts.log_axis("price", "t", 0.2, 50)
    assert axis["axis"]["values"] == pytest.approx([0.2, 0.5, 1, 2, 5, 10, 20, 50])
    assert axis["scale"] == {"nice": False, "type": "log", "domain": [0.2, 50]} and axis["field"] == "price"


def test_points_without_an_interval_have_no_line() -> None:
    x, y = charts.axis("a", "A"), charts.axis("b", "B", "nominal")
    assert "axis" in x and "axis" not in y and (y["type"], y["title"]) == ("nominal", "B")
    data = [{"low": 0, "high": 1}, {"low": None, "high": 1}, {"low": 0, "high": None}, {}]
    upright = charts.intervals(data, x, y, "base", along="y")
    assert upright["data"]["values"] == data[:1] and upright["encoding"]["x"] == x
    assert upright["encoding"]["y"]["field"] == "low" and upright["encoding"]["y2"] == {"field": "high"}
    across = charts.level(3.5, x, "base", along="x")
    assert across["data"]["values"] == [{"a": 3.5}] and list(across["encoding"]) == ["x"]
    area = charts.band(data, x, y, "proxy")["encoding"]
    assert (area["y"]["field"], area["y2"]["field"]) == ("low", "high")


def test_columns_of_figures_are_set_to_the_right() -> None:
    table = charts.ReportTable("t", ("a", "b", "c", "d"), (), words=2, texts=frozenset({3}))
    assert table.numbers == {2}


def test_a_label_goes_where_nothing_is() -> None:
    """A label of two letters is 12.4 pixels long; a point takes 5 on each side of it."""
    beside = [(100.0, 100.0), (115.0, 100.0), (85.0, 100.0)]
    corners = [(x, y) for x in (120.0, 80.0) for y in (114.0, 86.0)]

    def first(*points: tuple[float, float]) -> str:
        return charts.sides([(100.0, 100.0), *points], ["ab"] * (1 + len(points)))[0]

    assert first() == "right" and first(beside[1]) == "left" and first(*beside[1:]) == "above"
    assert first(*beside[1:], *corners) == "above", "between the points beside and above it"
    assert first(*beside[1:], *corners, (100.0, 114.0)) == "below"
    assert first((125.0, 100.0), (85.0, 100.0)) == "above", "it ends 0.4 pixels within a point"
    assert first((125.5, 106.9), (85.0, 100.0)) == "right", "just clear of it"
    assert charts.sides([(280.0, 100.0)], ["abcdef"]) == ["left"], "and within the drawing"
    assert charts.sides([(100.0, 100.0)], ["abcdef"], width=140.0) == ["left"]


# Tiles


def test_a_tile_has_the_places_of_its_three_scores() -> None:
    [tile] = report_page.tiles(rows_of())
    assert (tile["system"], tile["task"], tile["metric"]) == ("tiny", "gsm", "exact_match")
    assert (tile["gap"], tile["caption"]) == ("90.0%", "of the gap closed")
    assert [(m["role"], m["at"], m["text"]) for m in tile["marks"]] == [
        ("base", "0.0", "base 10.0"), ("tuned", "100.0", "tuned 90.0"), ("proxy", "90.0", "proxy 82.0"),
    ]  # fmt: skip
    # proxy's label is 76 - 152 px at 90, tuned's at the right end hides it: on a line of its own
    assert [m["line"] for m in tile["marks"]] == [0, 1, 0] and tile["lines"] == 2


@pytest.mark.parametrize(("proxy", "at"), [(0.95, "100.0"), (0.05, "0.0"), (0.3, "25.0")])
def test_a_mark_stays_on_its_tile(proxy: float, at: str) -> None:
    rows = role_rows([run(role, s) for role, s in (("base", 0.1), ("proxy", proxy), ("tuned", 0.9))])
    [tile] = report_page.tiles(rows)
    assert tile["marks"][2]["at"] == at


def test_without_a_firm_gap_marks_stand_at_their_scores() -> None:
    rows = role_rows([run(role, s) for role, s in (("base", 0.5), ("proxy", 0.7), ("tuned", 0.53))])
    [tile] = report_page.tiles(rows)
    assert (tile["gap"], tile["caption"]) == ("n/a", "no firm gap to close")
    assert [m["at"] for m in tile["marks"]] == ["50.0", "53.0", "70.0"]


def test_tiles_are_of_each_system_and_need_all_three_roles() -> None:
    two = role_rows([run(role, score, system="two") for role, score in SCORES.items() if role != "tuned"])
    control = role_rows([run("base", 0.8, forced=" So", sampling=Sampling())])
    found = report_page.tiles([*rows_of(), *two, *control, *rows_of(task="xsum")])
    assert [(tile["system"], tile["task"]) for tile in found] == [("tiny", "gsm"), ("tiny", "xsum")]
    assert found[0]["marks"][0]["text"] == "base 10.0", "and not the control"


def test_a_label_goes_down_a_line_where_another_would_hide_it() -> None:
    # a label of 8 characters takes 8 * 6.7 + 6 = 59.6 of 152 pixels; its left end is at 92.4 * place / 100
    texts = dict.fromkeys(("base", "proxy", "tuned"), "12345678")
    lines = {"base": 0, "proxy": 0, "tuned": 0}
    assert report_page.label_lines({"base": 0, "proxy": 65, "tuned": 0}, texts) == lines | {"tuned": 1}
    assert report_page.label_lines({"base": 0, "proxy": 64, "tuned": 0}, texts) == lines | {
        "proxy": 1, "tuned": 2,
    }  # fmt: skip
    assert report_page.label_lines({"base": 100, "proxy": 35, "tuned": 0}, texts) == lines | {"tuned": 1}
