"""Figures and tables of sweeps over alpha and schedules, and of where two runs differ."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from proxytune.analysis import failures, sweeps
from proxytune.records import NO_SCORE, Metric
from proxytune.report import charts
from proxytune.report.analyses import bounded
from proxytune.report.charts import Figure, ReportTable, rows_of
from proxytune.report.escape import clipped, visible
from proxytune.report.figures import in_percent
from proxytune.report.tables import examples, percent, scored

LISTED = 20
"""Items that are listed for each way in which two runs differ."""
OPEN = 3
"""Failures that are listed without a click."""
SHOWN = 600
"""Characters of a text in that list."""
COLUMNS = ("alpha", "score, %", "loops, %", "tokens, mean", "examples")


def sweep_figures(found: sweeps.Sweep) -> list[Figure]:
    """Score against alpha, and the trade-off of truth and information where there is one."""
    task = found.source.task
    numbers = [point for point in found.points if point.value is not None and point.score is not None]
    figures = []
    if len(numbers) > 1:
        x = charts.axis("at", "alpha", nice=False, padding=7)
        figures.append(
            _against(numbers, _Curve(lambda p: p.value, x, lambda p: p.score, found.metric), Figure(
                name=f"alpha-{task}", title=f"{task}: score against alpha",
                table=sweep_table(found), layers=(),
                caption=f"{over(numbers)} examples; the area is a 95% interval; alpha 0 is the base alone",
                system=found.source.system,
            ))
        )  # fmt: skip
    if found.paper:
        figures.append(trade_off_figure(found))
    return figures


@dataclass(frozen=True)
class _Curve:
    """What is drawn of the points of a sweep."""

    at: Callable[[sweeps.SweepPoint], Any]
    """Where a point lies along x."""
    x: Any
    """The axis."""
    of: Callable[[sweeps.SweepPoint], Metric | None]
    what: str
    """What the metric is called."""


def _against(
    points: Sequence[sweeps.SweepPoint],
    curve: _Curve,
    figure: Figure,
    control: tuple[str, Metric] | None = None,
) -> Figure:
    """The figure with a metric of the points that have it and its interval; `control` is a level that another
    run has."""
    x, what = curve.x, curve.what
    drawn = [(point, metric) for point in points if (metric := curve.of(point)) is not None]
    unit = drawn[0][1].unit
    bounds: dict[str, Any] = {"zero": True} if unit == "number" else {"domain": [0, 100]}
    y = charts.axis("value", visible(what) + ("" if unit == "number" else ", %"), **bounds)
    data = []
    for point, metric in drawn:
        n = examples(metric, point.n)
        shown = percent(metric) if unit != "number" else bounded(metric, 1)
        data.append({
            "at": curve.at(point), "value": in_percent(metric.value, metric),
            "low": in_percent(metric.low, metric), "high": in_percent(metric.high, metric),
            "label": f"alpha {point.alpha}; {visible(what)} {shown}; {n} examples",
        })  # fmt: skip
    layers: list[charts.Layer] = []
    if control is not None:
        value = in_percent(control[1].value, control[1]) or 0.0
        layers.append(charts.level(value, y, "base"))
        # under its line, unless it would be in the axis there
        top = 100.0 if unit != "number" else max(datum["high"] or datum["value"] for datum in data)
        side: charts.Side = "below" if value > top / 8 else "above"
        named = [{"value": value, "text": f"{visible(control[0])}: {value:.1f}"}]
        dy = -5 if side == "above" else 5 if unit != "number" else 14
        layers.append(charts.words(named, {"value": 8}, y, "base", side, align="left", dy=dy))
    known = [datum for datum in data if datum["low"] is not None]
    layers += [
        charts.band(known, x, y, "proxy"),
        charts.line(data, x, y, "proxy"),
        charts.points(data, x, y, "proxy"),
    ]
    return replace(figure, layers=tuple(layers))


def trade_off_figure(found: sweeps.Sweep) -> Figure:
    """Truth against information: the paper's ten points, and ours where judges gave them."""
    x = charts.axis("info", "informative, %", zero=False)
    y = charts.axis("truth", "true, %", zero=False)
    printed: list[charts.Datum] = [
        {
            "info": 100 * p.info, "truth": 100 * p.truth, "order": p.alpha, "text": f"{p.alpha:g}",
            "label": f"paper, 13B; alpha {p.alpha:g}; true {100 * p.truth:.1f}%; "
            f"informative {100 * p.info:.1f}%",
        }
        for p in found.paper
    ]  # fmt: skip
    ours: list[charts.Datum] = [
        {
            "info": in_percent(p.info.value, p.info), "truth": in_percent(p.truth.value, p.truth),
            "order": p.value, "text": p.alpha,
            "label": f"{visible(found.source.system)}; alpha {p.alpha}; true {percent(p.truth)}; "
            f"informative {percent(p.info)}",
        }
        for p in found.points
        if p.truth is not None and p.info is not None and p.value is not None
    ]  # fmt: skip
    layers: list[charts.Layer] = []
    for data, color in ((printed, "published"), (ours, "proxy")):
        draw = charts.hollow if color == "published" else charts.points
        layers += [charts.path(data, x, y, color), draw(data, x, y, color, shape="circle")]
        for i, datum in enumerate(data):
            after = data[i + 1] if i + 1 < len(data) else None
            # beside the line that goes on from here
            rising = after is not None and after["info"] > datum["info"] and after["truth"] > datum["truth"]
            look: dict[str, Any] = {"dx": -8} if rising else {"align": "left", "dx": 4, "dy": -5}
            layers.append(charts.words([datum], x, y, color, "left" if rising else "above", **look))
    cells = [
        (who, datum["text"], f"{datum['truth']:.1f}", f"{datum['info']:.1f}")
        for who, data in (("paper, 13B", printed), (found.source.system, ours))
        for datum in data
    ]
    legend = "filled: ours; " if ours else "ours needs judges (proxytune judge truthfulqa RUN); "
    return Figure(
        name=f"alpha-trade-off-{found.source.task}",
        title=f"{found.source.task}: truth against information as alpha grows",
        caption=legend + "hollow: the paper's ten points (13B); the numbers are alphas",
        table=ReportTable(
            "Truth and information", ("who", "alpha", "true, %", "informative, %"), rows_of(cells)
        ),
        layers=tuple(layers),
        system=found.source.system,
    )


def over(points: Sequence[sweeps.SweepPoint]) -> str:
    """How many examples the scores of a curve are over: `300`, or `297 of 300 to 300`."""
    counts = list(dict.fromkeys(examples(point.score, point.n) for point in points))
    return counts[0] if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"


def sweep_table(found: sweeps.Sweep | sweeps.Skip) -> ReportTable:
    """All points of a sweep."""
    points = [(point.alpha, point) for point in found.points]
    if isinstance(found, sweeps.Skip) and found.control is not None:
        points.append((f"0, opener forced ({found.forced!r})", found.control))
    cells = [
        (
            name, scored(found.metric, p.score), "" if p.loops is None else bounded(p.loops, 1, 100),
            "" if p.tokens is None else bounded(p.tokens, 1), examples(p.score, p.n),
        )
        for name, p in points
    ]  # fmt: skip
    metric = NO_SCORE.get(found.metric, found.metric)
    return ReportTable(f"{found.source.task}: {metric} by alpha", COLUMNS, rows_of(cells))


def skip_figures(found: sweeps.Skip) -> list[Figure]:
    """Score, loops and length against the number of corrected tokens."""
    task, names = found.source.task, ["all" if p.until is None else str(p.until) for p in found.points]
    x = {**charts.axis("at", "tokens that are corrected before the proxy lets go", "ordinal"), "sort": names}
    x["axis"] = {"labelAngle": 0}
    table, control = sweep_table(found), found.control

    def drawn(
        kind: Literal["score", "loops", "tokens"], what: str, title: str, caption: str
    ) -> Figure | None:
        if all(getattr(point, kind) is None for point in found.points):
            return None
        beside = None if control is None else getattr(control, kind)
        level = None if beside is None else ("base, opener forced", beside)
        name, system = f"skip-{kind}-{task}", found.source.system
        figure = Figure(name=name, title=title, caption=caption, table=table, layers=(), system=system)
        curve = _Curve(
            lambda p: "all" if p.until is None else str(p.until), x, lambda p: getattr(p, kind), what
        )
        return _against(found.points, curve, figure, level)

    figures = [
        drawn("score", found.metric, f"{task}: score when the correction ends early",
              "the area is a 95% interval; 0 is the base alone, all is plain proxy-tuning"),
        drawn("loops", "responses that end in a loop", f"{task}: repetition when the correction ends early",
              "share of responses that fall into a loop; 95% interval"),
        drawn("tokens", "length, tokens", f"{task}: length when the correction ends early",
              "mean length of a response; 95% interval"),
    ]  # fmt: skip
    return [figure for figure in figures if figure is not None]


# Failures


def failure_counts(found: Sequence[failures.Failures]) -> ReportTable:
    """Who has what right, with McNemar's test: a line for every pair of runs."""
    cells = [
        (
            f"{one.first.system}: {one.first.task}", one.metric, str(one.both_right), str(one.only_first),
            str(one.only_second), str(one.both_wrong), f"{one.p:.2g}",
            str(one.n) if one.n == one.of else f"{one.n} of {one.of}",
        )
        for one in found
    ]  # fmt: skip
    first, second = found[0].first.role, found[0].second.role
    columns = (
        "system and task", "metric", "both right", f"only {first}", f"only {second}", "both wrong",
        "McNemar's exact p", "items",
    )  # fmt: skip
    return ReportTable(f"{first} against {second}, in items", columns, rows_of(cells), words=2)


def failure_tables(found: Sequence[failures.Failures]) -> list[ReportTable]:
    """The items on which two runs differ: a few that the second run fails are open, then all of them, then
    those that it mends."""
    failed = [_items(one, "first", OPEN) for one in found]
    rest = [_items(one, "first", LISTED, folded=True) for one in found if one.only_first > OPEN]
    mended = [_items(one, "second", LISTED, folded=True) for one in found]
    return [table for table in (*failed, *rest, *mended) if table.rows]


def _items(
    found: failures.Failures, which: Literal["first", "second"], most: int, *, folded: bool = False
) -> ReportTable:
    """The first items that only one of two runs has right."""
    first, second = found.first.role, found.second.role
    right, wrong = (first, second) if which == "first" else (second, first)
    items = [item for item in found.items if item.right == which]
    cells = [
        tuple(
            clipped(text.strip(), SHOWN)
            for text in (item.id, item.question, item.answer, item.first, item.second)
        )
        for item in items[:most]
    ]
    return ReportTable(
        f"{found.first.task}: {right} right, {wrong} wrong ({len(items)})",
        ("id", "question", "reference", f"{first}'s answer", f"{second}'s answer"),
        rows_of(cells), note="" if len(items) <= most else f"the first {most} of {len(items)}",
        texts=frozenset({1, 2, 3, 4}), words=5, folded=folded,
    )  # fmt: skip
