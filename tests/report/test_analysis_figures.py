"""The figures and tables of the analyses: what each point, label, cell and caption says, of records whose
figures are all different."""

from __future__ import annotations

from typing import Any

import pytest

from proxytune.analysis import failures, positions, sweeps, tokens
from proxytune.analysis.analysis import Source, published
from proxytune.records import Metric
from proxytune.report import analyses, charts
from proxytune.report import sweeps as sweep_figures
from proxytune.report.charts import Figure, ReportTable


def source(task: str = "gsm", role: str = "proxy", **more: Any) -> Source:
    """The run that an analysis is of."""
    return Source.model_validate({
        "folder": "f", "system": "tiny", "task": task, "role": role, "alpha": "1", "n": 7, **more
    })  # fmt: skip


def data(figure: Figure, kind: str, color: str) -> list[dict[str, Any]]:
    """The data of a drawing's layers of one kind and colour."""
    found = [
        layer["data"]["values"]
        for layer in figure.layers
        if layer.get("mark", {}).get("type") == kind and layer["mark"]["color"] == charts.COLORS[color]
    ]
    return [datum for values in found for datum in values]


def texts(figure: Figure) -> list[str]:
    """All words beside points."""
    return [d["text"] for layer in figure.layers if "layer" in layer for d in layer["data"]["values"]]


def cells(table: ReportTable) -> list[tuple[str, ...]]:
    """Of all lines."""
    return [row.cells for row in table.rows]


def test_half_an_interval_is_none() -> None:
    assert (
        analyses.bounded(Metric(value=0.5, low=0.25))
        == analyses.bounded(Metric(value=0.5, high=1))
        == "0.500"
    )
    assert analyses.bounded(Metric(value=0.5, low=0.25, high=1.0), 1, 10) == "5.0 [2.5, 10.0]"
    assert (analyses.number(None), analyses.number(0.12345), analyses.number(2.0, 1)) == ("", "0.123", "2.0")


# Positions


def row(first: int, last: int, n: int, changed: float, shift: float = 0.25) -> positions.PositionRow:
    """Positions with an interval around the share of changed tokens, and none around the shift."""
    share = Metric(value=changed, low=changed - 0.125, high=changed + 0.0625)
    return positions.PositionRow(first=first, last=last, n=n, changed=share, shift=Metric(value=shift))


def found_positions(rows: list[positions.PositionRow], **more: Any) -> positions.Positions:
    """An analysis of these rows, which are also its bands unless others are given."""
    made = {
        "source": source(), "responses": 12, "tokens": 345, "changed": Metric(value=0.25, low=0.2, high=0.3),
        "shift": Metric(value=0.125), "paper_changed": 0.5, "rows": tuple(rows), "bands": tuple(rows),
    }  # fmt: skip
    return positions.Positions.model_validate({**made, **more})


ROWS = [row(0, 0, 90, 0.5), row(1, 1, 20, 0.25, -0.5), row(2, 2, 19, 0.125), row(3, 4, 60, 0.75)]


def test_influence_by_position() -> None:
    changed, shift = analyses.positions_figures(found_positions(ROWS))
    assert (changed.name, shift.name) == ("positions-changed-gsm", "positions-shift-gsm")
    assert changed.caption == (
        "345 tokens of 12 responses; the area is a 95% interval; faded: fewer than 20 tokens"
    )
    assert changed.system == shift.system == "tiny"
    dots = sorted(data(changed, "point", "proxy"), key=lambda datum: datum["at"])
    assert [(d["at"], d["value"], d["low"], d["high"], d["n"]) for d in dots] == [
        (0, 50, 37.5, 56.25, 90), (1, 25, 12.5, 31.25, 20), (2, 12.5, 0, 18.75, 19),
        (3.5, 75, 62.5, 81.25, 60),
    ]  # fmt: skip
    assert dots[3]["label"] == "positions 3 to 4; changed 75.0% [62.5, 81.2]; 60 tokens"
    moved = sorted(data(shift, "point", "proxy"), key=lambda datum: datum["at"])
    assert moved[1]["label"] == "position 1; mean shift -50.0 points; 20 tokens" and moved[1]["low"] is None
    assert changed.table == shift.table and cells(changed.table)[1] == (
        "position 1", "20", "25.0 [12.5, 31.2]", "-50.0",
    )  # fmt: skip
    assert changed.table.columns == ("where", "tokens", "first choice changed, %", "mean shift, points")
    assert analyses.positions_figures(found_positions(ROWS[:3])) == []
    many = analyses.positions_figures(found_positions([*ROWS[:2], row(2, 2, 20, 0.1), ROWS[3]]))
    assert "faded" not in many[0].caption


def test_levels_are_named_away_from_each_other() -> None:
    y = {"field": "value"}
    far = analyses._levels(25.0, 50.0, y)
    assert [layer["data"]["values"][0] for layer in far] == [
        {"value": 25}, {"value": 25, "text": "all 25.0%"}, {"value": 50},
        {"value": 50, "text": "paper 50.0%"},
    ]  # fmt: skip
    assert [layer["layer"][0]["mark"]["dy"] for layer in far[1::2]] == [0, 0]
    near = analyses._levels(50.0, 43.5, y)
    assert [layer["data"]["values"][0]["text"] for layer in near[1::2]] == ["paper 43.5%", "all 50.0%"]
    assert [layer["layer"][0]["mark"]["dy"] for layer in near[1::2]] == [6, -6]
    assert [layer["layer"][0]["mark"]["dy"] for layer in analyses._levels(50.0, 43.0, y)[1::2]] == [0, 0]
    assert len(analyses._levels(50.0, None, y)) == 2


def test_the_papers_curve_goes_as_far_as_ours() -> None:
    drawn = published("changed_top1")["by_position"]
    ends = [at for at, _ in drawn["points"]]
    line, dots = analyses._published_curve(drawn["task"], ends[2], {}, {})
    assert [d["at"] for d in line["data"]["values"]] == ends[:3] and dots["mark"]["filled"] is False
    at, share = drawn["points"][0]
    assert line["data"]["values"][0]["value"] == 100 * share
    assert f"position {at}; about {100 * share:.0f}%" in line["data"]["values"][0]["label"]
    assert analyses._published_curve("gsm", 99, {}, {}) == []


def test_a_long_curve_is_drawn_in_groups() -> None:
    rows = [row(i, i, 30, 0.5) for i in range(100)]
    bands = [row(0, 31, 90, 0.5), row(32, 63, 90, 0.5), row(64, 79, 90, 0.5)]
    shown, x = analyses.curve(rows, bands)
    assert shown == rows and "log" not in x["title"], "of 80 positions each is drawn"
    longer = [*bands, row(80, 80, 90, 0.5)]
    shown, x = analyses.curve(rows, longer)
    assert shown == rows[:32] + longer[1:] and x["title"].endswith(", log scale")
    assert x["scale"]["type"] == "symlog" and x["axis"]["values"] == [0, 1, 2, 4, 8, 16, 32, 64]


def test_shares_over_all_tokens() -> None:
    without = found_positions(ROWS, paper_changed=None, source=source("xsum"), tokens=6)
    table = analyses.positions_table([found_positions(ROWS), without])
    assert cells(table) == [
        ("tiny: gsm", "345", "25.0 [20.0, 30.0]", "50.0", "12.5"),
        ("tiny: xsum", "6", "25.0 [20.0, 30.0]", "", "12.5"),
    ]
    assert table.columns[3] == "the paper's (13B), %" and table.folded


# Tokens


def test_promoted_tokens() -> None:
    rows = (
        tokens.NgramRow(
            token="the", n=9, shift=Metric(value=0.5, low=0.25, high=0.75), gram="in the end of", count=3,
            occurrences=8,
        ),
        tokens.NgramRow(token="mute", n=None, shift=None),
        tokens.NgramRow(token="so", n=4, shift=Metric(value=0.125)),
    )  # fmt: skip
    found = tokens.Ngrams(source=source(), min_count=30, rows=rows)
    figure = analyses.ngrams_figure(found, "gsm")
    assert figure is not None and (figure.name, figure.system, figure.height) == ("tokens-gsm", "tiny", 40)
    assert figure.caption == "generated at least 30 times; lines are 95% intervals of the mean"
    first, second = data(figure, "point", "proxy")
    assert (first["name"], first["value"], first["low"], first["high"]) == ("the", 50, 25, 75)
    assert first["label"] == "the; 50.0 [25.0, 75.0] points; 9 tokens; mostly in: in the end of (3 of 8)"
    assert (second["label"], second["low"]) == ("so; 12.5 points; 4 tokens", None)
    assert cells(figure.table) == [
        ("the", "50.0 [25.0, 75.0]", "9", "in the end of", "3 / 8"), ("mute", "", "", "", ""),
        ("so", "12.5", "4", "", ""),
    ]  # fmt: skip
    assert analyses.ngrams_figure(found.model_copy(update={"rows": rows[1:2]}), "gsm") is None
    most = tuple(rows[2].model_copy(update={"token": f"t{i}"}) for i in range(61))
    whole = analyses.ngrams_figure(found.model_copy(update={"rows": most, "source": None}), "gsm")
    assert whole is not None and (whole.height, len(whole.table.rows), whole.system) == (200, 60, "")


def line(rule: str, left: float | None, right: float | None, **more: Any) -> tokens.EquationRow:
    """Left against right."""
    sides = tokens.Side(tokens=30, mean=left), tokens.Side(tokens=40, mean=right)
    tested = {"t": 2.345, "df": 56.7, "p": 0.0123, **more}
    return tokens.EquationRow(rule=rule, left=sides[0], right=sides[1], **tested)


def test_left_and_right_of_equations() -> None:
    rows = (
        line("paper", 0.5, 0.25), line("corrected", 0.01, 0.02),
        line("published", -0.5, 0.1, t=None, df=None, p=None),
    )  # fmt: skip
    found = tokens.Equations(source=source(), responses=9, responses_with=7, rows=rows)
    figure = analyses.equations_figure(found)
    assert figure is not None and (figure.name, figure.height) == ("equations-gsm", 46 * 3)
    assert figure.system == "tiny" and figure.table.columns == (
        "rule", "left, points", "tokens", "right, points", "tokens", "Welch's t", "df", "p",
    )  # fmt: skip
    assert figure.caption.startswith("equations in 7 of 9 responses; ")
    assert cells(figure.table) == [
        ("the paper's rule", "50.00", "30", "25.00", "40", "2.35", "57", "0.012"),
        ("corrected rule", "1.00", "30", "2.00", "40", "2.35", "57", "0.012"),
        ("published, 13B", "-50.00", "30", "10.00", "40", "", "", ""),
    ]
    ours = data(figure, "point", "proxy")
    assert [(d["name"], d["text"], d["value"]) for d in ours] == [
        ("the paper's rule", "right", 25), ("the paper's rule", "left", 50),
        ("corrected rule", "left", 1), ("corrected rule", "right", 2),
    ]  # fmt: skip
    assert ours[0]["label"] == "the paper's rule, right of the equals sign; 25.00 points; 40 tokens"
    assert [d["value"] for d in data(figure, "point", "published")] == [-50, 10]
    drawn = [layer["mark"] for layer in figure.layers if layer.get("mark", {}).get("type") == "point"]
    assert [mark["filled"] for mark in drawn] == [True, True, False], "published points are hollow"
    # 50 / 6 = 8.3 points apart is enough for a word on either side
    assert texts(figure) == ["right", "left", "left 1.00, right 2.00", "left", "right"]
    sides = [layer["layer"][0]["mark"]["align"] for layer in figure.layers if "layer" in layer]
    assert sides == ["right", "left", "left", "right", "left"]
    nothing = found.model_copy(update={"rows": (line("paper", None, 0.1), line("corrected", 0.1, None))})
    assert analyses.equations_figure(nothing) is None


# Agreement


def agreement_row(first: int, last: int, n: int, kl: float, same: float) -> positions.AgreementRow:
    """The proxy's figures; the base's are twice the divergence, and half the agreement."""

    def spread(median: float) -> positions.Spread:
        return positions.Spread(median=median, quarter=median / 2, three_quarters=3 * median, mean=9.0)

    return positions.AgreementRow(
        first=first, last=last, n=n, kl_proxy=spread(kl), kl_base=spread(2 * kl),
        same_proxy=Metric(value=same), same_base=Metric(value=same / 2, low=0.125, high=0.5),
    )  # fmt: skip


@pytest.mark.parametrize(("role", "on"), [("proxy", "the proxy's"), ("tuned", "the tuned model's")])
def test_agreement_with_tuned(role: str, on: str) -> None:
    rows = (agreement_row(0, 0, 30, 0.25, 0.5), agreement_row(1, 2, 30, 0.0625, 0.75))
    found = positions.Agreement(
        source=source(role=role), tokens=60, kl_proxy=Metric(value=0.1), kl_base=Metric(value=0.2),
        same_proxy=Metric(value=0.8125), same_base=Metric(value=0.25), first_step=rows[0],
        paper_first_step={"proxy": 0.5, "base": 1.5}, rows=rows, bands=rows,
    )  # fmt: skip
    kl, same = analyses.agreement_figures(found)
    assert (kl.name, same.name) == (f"agreement-kl-gsm-{role}", f"agreement-same-gsm-{role}")
    assert kl.system == same.system == "tiny"
    assert kl.title == f"gsm: distance from tuned, on {on} outputs"
    assert kl.caption == (
        "median and middle half; first step: proxy 0.250, base 0.500 nats (paper, AlpacaFarm: 0.5 and 1.5)"
    )
    assert same.caption == "over all tokens: proxy 81.2%, base 25.0%; areas are 95% intervals"
    base, proxy = data(kl, "point", "base"), data(kl, "point", "proxy")
    assert [(d["at"], d["value"], d["low"], d["high"]) for d in proxy] == [
        (0, 0.25, 0.125, 0.75), (1.5, 0.0625, 0.03125, 0.1875),
    ]  # fmt: skip
    assert [d["value"] for d in base] == [0.5, 0.125]
    assert proxy[1]["label"] == (
        "proxy, positions 1 to 2; median 0.0625 nats; middle half 0.0312 to 0.188; 30 tokens"
    )
    assert [d["value"] for d in data(same, "point", "proxy")] == [50, 75]
    assert [d["value"] for d in data(same, "point", "base")] == [25, 37.5]
    assert data(same, "point", "base")[0]["label"] == "position 0; base agrees 25.0% [12.5, 50.0]; 30 tokens"
    assert texts(kl) == texts(same) == ["base", "proxy"]
    assert cells(kl.table)[1] == (
        "positions 1 to 2", "30", "0.062", "0.125", "75.0", "37.5 [12.5, 50.0]",
    )  # fmt: skip
    assert kl.table.columns == (
        "where", "tokens", "KL to proxy, median", "KL to base, median", "proxy agrees, %", "base agrees, %",
    )  # fmt: skip


# Sweeps


def point(alpha: str, score: float | None, **more: Any) -> sweeps.SweepPoint:
    """A point of a sweep over 8 of 9 examples."""
    metric = None if score is None else Metric(value=score, low=score - 0.125, high=score + 0.125, n=8)
    made = {
        "alpha": alpha, "value": None if ":" in alpha else float(alpha), "until": None, "n": 9,
        "score": metric, "truth": None, "info": None, "loops": None, "tokens": None, "folder": "f", **more,
    }  # fmt: skip
    return sweeps.SweepPoint.model_validate(made)


def test_score_against_alpha() -> None:
    points = (point("0", 0.25), point("first:2", 0.5), point("1", 0.75), point("2", None))
    found = sweeps.Sweep(source=source(), metric="acc", points=points, paper=())
    [figure] = sweep_figures.sweep_figures(found)
    assert (figure.name, figure.system) == ("alpha-gsm", "tiny")
    assert figure.caption == "8 of 9 examples; the area is a 95% interval; alpha 0 is the base alone"
    dots = data(figure, "point", "proxy")
    assert [(d["at"], d["value"], d["low"], d["high"]) for d in dots] == [
        (0.0, 25, 12.5, 37.5), (1.0, 75, 62.5, 87.5),
    ]  # fmt: skip
    assert dots[1]["label"] == "alpha 1; acc 75.0 [62.5, 87.5]; 8 of 9 examples"
    y = figure.layers[-1]["encoding"]["y"]
    assert (y["title"], y["scale"]["domain"]) == ("acc, %", [0, 100])
    assert cells(figure.table) == [
        ("0", "25.0 [12.5, 37.5]", "", "", "8 of 9"), ("first:2", "50.0 [37.5, 62.5]", "", "", "8 of 9"),
        ("1", "75.0 [62.5, 87.5]", "", "", "8 of 9"), ("2", "no score", "", "", "0 of 9"),
    ]  # fmt: skip
    alone = found.model_copy(update={"points": points[:2]})
    assert sweep_figures.sweep_figures(alone) == [], "a schedule is no point on the axis"
    assert sweep_figures.over([points[0], point("1", 0.5, n=8)]) == "8 of 9 to 8"


def test_ending_the_correction_early() -> None:
    def met(until: int | None, score: float, loops: float, length: float) -> sweeps.SweepPoint:
        return point(
            "1" if until is None else f"first:{until}", score, until=until, loops=Metric(value=loops),
            tokens=Metric(value=length, low=length - 1, high=length + 1, unit="number"),
        )  # fmt: skip

    control = point("0", 0.5, loops=Metric(value=0.0625), tokens=Metric(value=9.0, unit="number"))
    found = sweeps.Skip(
        source=source(), metric="acc",
        points=(met(0, 0.25, 0.5, 30), met(4, 0.5, 0.25, 20), met(None, 0.75, 0.125, 10)),
        control=control, forced=" So",
    )  # fmt: skip
    score, loops, length = sweep_figures.skip_figures(found)
    assert {figure.system for figure in (score, loops, length)} == {"tiny"}
    assert [f.name for f in (score, loops, length)] == ["skip-score-gsm", "skip-loops-gsm", "skip-tokens-gsm"]
    assert [d["at"] for d in data(score, "point", "proxy")] == ["0", "4", "all"]
    assert [d["value"] for d in data(loops, "point", "proxy")] == [50, 25, 12.5]
    assert [(d["value"], d["low"], d["high"]) for d in data(length, "point", "proxy")[:1]] == [(30, 29, 31)]
    assert data(length, "point", "proxy")[1]["label"] == (
        "alpha first:4; length, tokens 20.0 [19.0, 21.0]; 9 examples"
    )
    assert length.layers[-1]["encoding"]["y"]["title"] == "length, tokens"
    assert [texts(figure) for figure in (score, loops, length)] == [
        ["base, opener forced: 50.0"], ["base, opener forced: 6.2"], ["base, opener forced: 9.0"],
    ]  # fmt: skip
    sides = [
        next(layer["layer"][0]["mark"] for layer in figure.layers if "layer" in layer)
        for figure in (score, loops, length)
    ]
    # under its line, but above it where that lies low: 6.25 of 100, and 9 of 31
    assert [(mark["baseline"], mark["dy"]) for mark in sides] == [("top", 5), ("bottom", -5), ("top", 14)]
    assert cells(score.table)[-1] == ("0, opener forced (' So')", "50.0 [37.5, 62.5]", "6.2", "9.0", "8 of 9")
    assert cells(score.table)[1] == ("first:4", "50.0 [37.5, 62.5]", "25.0", "20.0 [19.0, 21.0]", "8 of 9")
    silent = tuple(p.model_copy(update={"loops": None, "tokens": None}) for p in found.points)
    assert len(sweep_figures.skip_figures(found.model_copy(update={"points": silent}))) == 1


def test_truth_against_information() -> None:
    paper = (
        sweeps.PublishedPoint(alpha=0.2, truth=0.5, info=0.9),
        sweeps.PublishedPoint(alpha=0.4, truth=0.6, info=0.95),
    )
    judged = {"truth": Metric(value=0.25), "info": Metric(value=0.75)}
    found = sweeps.Sweep(
        source=source("truthfulqa"), metric="acc", paper=paper,
        points=(point("0.5", 0.5, **judged), point("1", 0.5)),
    )  # fmt: skip
    figure = sweep_figures.sweep_figures(found)[-1]
    assert figure.system == "tiny"
    assert figure.name == "alpha-trade-off-truthfulqa" and figure.caption.startswith("filled: ours; hollow")
    assert cells(figure.table) == [
        ("paper, 13B", "0.2", "50.0", "90.0"), ("paper, 13B", "0.4", "60.0", "95.0"),
        ("tiny", "0.5", "25.0", "75.0"),
    ]  # fmt: skip
    assert data(figure, "point", "published")[1]["label"] == (
        "paper, 13B; alpha 0.4; true 60.0%; informative 95.0%"
    )
    assert data(figure, "point", "proxy")[0]["label"] == "tiny; alpha 0.5; true 25.0; informative 75.0"
    marks = [layer["layer"][0]["mark"] for layer in figure.layers if "layer" in layer]
    assert [mark["align"] for mark in marks] == ["right", "left", "left"], (
        "the first one's line rises to the right"
    )
    waiting = found.model_copy(update={"points": found.points[1:]})
    assert "ours needs judges" in sweep_figures.sweep_figures(waiting)[-1].caption


# Failures


def item(name: str, right: str) -> failures.Disagreement:
    """An item that one of two runs has right."""
    return failures.Disagreement.model_validate({
        "id": name, "right": right, "question": f" q{name} ", "first": "one", "second": "x" * 601,
        "answer": "5",
    })  # fmt: skip


def test_items_on_which_two_runs_differ() -> None:
    items = [item(str(i), "first") for i in range(4)] + [item(str(i), "second") for i in range(4, 25)]
    found = failures.Failures(
        first=source(role="base"), second=source(), metric="acc", n=40, of=41, both_right=20, both_wrong=9,
        only_first=4, only_second=21, p=0.0123, items=tuple(items),
    )  # fmt: skip
    few, rest, mended = sweep_figures.failure_tables([found])
    assert (few.title, len(few.rows), few.folded, few.note) == (
        "gsm: base right, proxy wrong (4)", 3, False, "the first 3 of 4",
    )  # fmt: skip
    assert (rest.title, len(rest.rows), rest.folded, rest.note) == (few.title, 4, True, "")
    assert (mended.title, len(mended.rows), mended.note) == (
        "gsm: proxy right, base wrong (21)", 20, "the first 20 of 21",
    )  # fmt: skip
    assert few.columns == ("id", "question", "reference", "base's answer", "proxy's answer")
    assert few.rows[0].cells[:4] == ("0", "q0", "5", "one") and "(1 characters more" in few.rows[0].cells[4]
    three = found.model_copy(update={"items": tuple(items[:3]), "only_first": 3})
    assert [table.title for table in sweep_figures.failure_tables([three])] == [
        "gsm: base right, proxy wrong (3)"
    ]
    counts = sweep_figures.failure_counts([found, found.model_copy(update={"n": 41, "p": 0.5})])
    assert cells(counts) == [
        ("tiny: gsm", "acc", "20", "4", "21", "9", "0.012", "40 of 41"),
        ("tiny: gsm", "acc", "20", "4", "21", "9", "0.5", "41"),
    ]
    assert counts.title == "base against proxy, in items" and counts.columns[2:6] == (
        "both right", "only base", "only proxy", "both wrong",
    )  # fmt: skip
