"""Figures and tables of the analyses: influence by position, by token, in equations, and agreement."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from proxytune.analysis import positions, published, tokens
from proxytune.records import Metric
from proxytune.report import charts
from proxytune.report.charts import Figure, ReportTable, TableRow, rows_of
from proxytune.report.escape import clipped, visible

MANY = 80
"""Positions above which a curve shows groups of them, on a logarithmic axis."""
SINGLE = 32
"""The first positions, which are shown one by one even then."""
TOKENS_DRAWN, TOKENS_LISTED = 10, 60
AtPositions = TypeVar("AtPositions", positions.PositionRow, positions.AgreementRow)


def number(value: float | None, digits: int = 3) -> str:
    """A number of a table; "" for none."""
    return "" if value is None else f"{value:.{digits}f}"


def bounded(metric: Metric, digits: int = 3, scale: float = 1.0) -> str:
    """A value with its interval."""
    value = f"{scale * metric.value:.{digits}f}"
    if metric.low is None or metric.high is None:
        return value
    return f"{value} [{scale * metric.low:.{digits}f}, {scale * metric.high:.{digits}f}]"


def curve(
    rows: Sequence[AtPositions], bands: Sequence[AtPositions]
) -> tuple[list[AtPositions], dict[str, Any]]:
    """What a curve over positions is drawn of, and its x axis: every position, or the first ones and then
    groups."""
    title = "position in the response, tokens (0 is the first)"
    last = bands[-1].last
    if last < MANY:
        return list(rows), charts.axis("at", title, nice=False, padding=7)
    shown = [row for row in rows if row.first < SINGLE] + [row for row in bands if row.first >= SINGLE]
    x = charts.axis("at", title + ", log scale", type="symlog", nice=False, padding=7)
    edges = [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048]
    return shown, x | {"axis": {"values": [edge for edge in edges if edge <= last], "format": "~r"}}


def where(row: positions.PositionRow | positions.AgreementRow) -> str:
    """The positions of a row in words."""
    return f"position {row.first}" if row.first == row.last else f"positions {row.first} to {row.last}"


# Positions


def positions_figures(found: positions.Positions) -> list[Figure]:
    """Share of changed first choices, and mean shift, against position."""
    task, rows = found.source.task, found.rows
    if len(rows) < 4:
        return []
    shown, x = curve(rows, found.bands)
    changed = _data(shown, lambda row: row.changed, 100, "changed", "%")
    shift = _data(shown, lambda row: row.shift, 100, "mean shift", " points")
    y = charts.axis("value", "first choices changed, %", domain=[0, 100])
    own = 100 * found.changed.value
    theirs = None if found.paper_changed is None else 100 * found.paper_changed
    over_all = _levels(own, theirs, y)
    band_y = charts.axis("value", "mean shift of the token, points")
    table = _position_table(f"{task}: by position", shown)
    return [
        Figure(
            name=f"positions-changed-{task}",
            title=f"{task}: how often the proxy chooses another token than the base",
            caption=f"{found.tokens} tokens of {found.responses} responses; the area is a 95% interval"
            + _few(shown),
            table=table,
            layers=(
                *over_all,
                *_published_curve(task, changed[-1]["at"], x, y),
                *_banded(changed, x, y, "proxy"),
            ),
            system=found.source.system,
        ),
        Figure(
            name=f"positions-shift-{task}",
            title=f"{task}: how far the chosen token's probability is moved",
            caption="p(proxy) - p(base) of the chosen token, in percentage points; 95% interval of the "
            f"mean{_few(shown)}",
            table=table,
            layers=tuple(_banded(shift, x, band_y, "proxy")),
            system=found.source.system,
        ),
    ]


def _levels(own: float, theirs: float | None, y: Any) -> list[charts.Layer]:
    """Dashed lines at our share and at the paper's, named to the right of the drawing."""
    named = [("proxy", own, f"all {own:.1f}%")]
    if theirs is not None:
        named.append(("published", theirs, f"paper {theirs:.1f}%"))
    named.sort(key=lambda level: level[1])
    near = theirs is not None and abs(theirs - own) < 7
    layers: list[charts.Layer] = []
    for i, (color, value, text) in enumerate(named):
        layers.append(charts.level(value, y, color))
        dy = (6 if i == 0 else -6) if near else 0
        labels = [{"value": value, "text": text}]
        layers.append(charts.words(labels, {"value": "width"}, y, color, "right", dx=5, dy=dy))
    return layers


def _published_curve(task: str, last: float, x: Any, y: Any) -> list[charts.Layer]:
    """The paper's curve, which it draws for one task, as far as ours goes."""
    drawn = published("changed_top1")["by_position"]
    if task != drawn["task"]:
        return []
    data = [
        {
            "at": at, "value": 100 * share,
            "label": f"paper, 13B, read off its plot; position {at}; about {100 * share:.0f}%",
        }
        for at, share in drawn["points"]
        if at <= last
    ]  # fmt: skip
    return [charts.line(data, x, y, "published", dashed=True), charts.hollow(data, x, y)]


def _data(
    rows: Sequence[AtPositions], of: Callable[[AtPositions], Metric], scale: float, name: str, unit: str
) -> list[charts.Datum]:
    """The points of a curve."""
    data = []
    for row in rows:
        metric = of(row)
        low, high = (None if end is None else scale * end for end in (metric.low, metric.high))
        interval = "" if low is None or high is None else f" [{low:.1f}, {high:.1f}]"
        data.append({
            "at": (row.first + row.last) / 2, "value": scale * metric.value, "low": low, "high": high,
            "n": row.n,
            "label": f"{where(row)}; {name} {scale * metric.value:.1f}{unit}{interval}; {row.n} tokens",
        })  # fmt: skip
    return data


def _banded(data: Sequence[charts.Datum], x: Any, y: Any, color: str) -> list[charts.Layer]:
    """A line with its interval and points that can be asked; faded where it is over few tokens."""
    layers: list[charts.Layer] = []
    for faded, part in charts.stretches(data):
        known = [datum for datum in part if datum["low"] is not None]
        layers.append(charts.band(known, x, y, color, opacity=0.06 if faded else 0.16))
        layers.append(charts.line(part, x, y, color, opacity=charts.FAINT if faded else 1))
    for faded in (True, False):
        own = [datum for datum in data if (datum["n"] < charts.FEW) is faded]
        layers.append(charts.points(own, x, y, color, size=34, opacity=charts.FAINT if faded else 1))
    return layers


def _few(rows: Sequence[AtPositions]) -> str:
    """What a caption says of points over few tokens."""
    return f"; faded: fewer than {charts.FEW} tokens" if any(row.n < charts.FEW for row in rows) else ""


def _position_table(title: str, rows: Sequence[positions.PositionRow]) -> ReportTable:
    cells = [
        (where(row), str(row.n), bounded(row.changed, 1, 100), bounded(row.shift, 1, 100)) for row in rows
    ]
    columns = ("where", "tokens", "first choice changed, %", "mean shift, points")
    return ReportTable(title, columns, rows_of(cells))


def positions_table(found: Sequence[positions.Positions]) -> ReportTable:
    """Over all tokens, beside the paper's shares."""
    cells = [
        (
            f"{one.source.system}: {one.source.task}",
            str(one.tokens),
            bounded(one.changed, 1, 100),
            "" if one.paper_changed is None else f"{100 * one.paper_changed:.1f}",
            bounded(one.shift, 1, 100),
        )
        for one in found
    ]
    columns = (
        "system and task",
        "tokens",
        "first choice changed, %",
        "the paper's (13B), %",
        "mean shift, points",
    )
    return ReportTable("Over all tokens", columns, rows_of(cells), folded=True)


# Tokens and equations


def ngrams_figure(found: tokens.Ngrams, task: str) -> Figure | None:
    """The most promoted tokens; None where none is frequent enough."""
    rows = [row for row in found.rows if row.shift is not None][:TOKENS_DRAWN]
    if not rows:
        return None
    x = charts.axis("value", "mean shift of the token's probability, points")
    names = [visible(clipped(row.token, 24)) for row in rows]
    y = {**charts.axis("name", "", "nominal"), "sort": names, "title": None}
    data = []
    for name, row in zip(names, rows, strict=True):
        assert row.shift is not None
        low, high = (None if end is None else 100 * end for end in (row.shift.low, row.shift.high))
        phrase = (
            f"; mostly in: {clipped(row.gram, 60)} ({row.count} of {row.occurrences})" if row.gram else ""
        )
        data.append({
            "name": name, "value": 100 * row.shift.value, "low": low, "high": high,
            "label": visible(f"{name}; {bounded(row.shift, 1, 100)} points; {row.n} tokens{phrase}"),
        })  # fmt: skip
    return Figure(
        name=f"tokens-{task}",
        title=f"{task}: the tokens that the proxy promotes most",
        caption=f"generated at least {found.min_count} times; lines are 95% intervals of the mean",
        table=ngrams_table(f"{task}: tokens by mean shift", found.rows[:TOKENS_LISTED]),
        layers=(charts.intervals(data, x, y, "proxy", along="x"), charts.points(data, x, y, "proxy")),
        height=20 * len(rows),
        system="" if found.source is None else found.source.system,
    )


def ngrams_table(title: str, rows: Sequence[tokens.NgramRow]) -> ReportTable:
    """Tokens with their phrases."""
    cells = [
        (
            row.token, "" if row.shift is None else bounded(row.shift, 1, 100),
            "" if row.n is None else str(row.n), row.gram or "",
            f"{row.count} / {row.occurrences}" if row.gram else "",
        )
        for row in rows
    ]  # fmt: skip
    columns = ("token", "mean shift, points", "tokens", "most common 4-gram", "count / occurrences")
    return ReportTable(title, columns, rows_of(cells), texts=frozenset({0, 3}))


def published_ngrams(paper: Mapping[str, Any]) -> ReportTable:
    """The paper's twenty tokens of TruthfulQA."""
    rows = paper["analyses"]["truthfulqa_ngrams"]["rows"]
    cells = [(row["token"], row["gram"], f"{row['count']} / {row['occurrences']}") for row in rows]
    return ReportTable(
        "The paper's twenty tokens on TruthfulQA (13B)",
        ("token", "most common 4-gram", "count / occurrences"),
        tuple(TableRow(cell, "published") for cell in cells), words=2, folded=True,
    )  # fmt: skip


def equations_figure(found: tokens.Equations) -> Figure | None:
    """Mean shift left and right of `=`, by rule; None where there are no equations."""
    rows = [row for row in found.rows if row.left.mean is not None and row.right.mean is not None]
    if not rows:
        return None
    x = charts.axis("value", "mean shift of a token's probability, points", padding=45)
    span = max(abs(points(side)) for row in rows for side in (row.left, row.right))
    names = {"paper": "the paper's rule", "corrected": "corrected rule", "published": "published, 13B"}
    y = {**charts.axis("name", "", "nominal"), "sort": list(names.values()), "title": None}
    layers: list[charts.Layer] = []
    for row in rows:
        name, color = names[row.rule], "published" if row.rule == "published" else "proxy"
        ends: list[charts.Datum] = [
            {
                "name": name, "value": points(side), "text": word, "low": points(row.left),
                "high": points(row.right),
                "label": f"{name}, {word} of the equals sign; {points(side):.2f} points; "
                f"{side.tokens} tokens",
            }
            for word, side in (("left", row.left), ("right", row.right))
        ]  # fmt: skip
        ends.sort(key=lambda end: float(end["value"]))
        draw = charts.hollow if row.rule == "published" else charts.points
        layers += [
            charts.intervals(ends[:1], x, y, color, along="x"),
            draw(ends, x, y, color),
            *_ends(ends, x, y, color, apart=ends[1]["value"] - ends[0]["value"] > span / 6),
        ]
    cells = [
        (
            names[row.rule], f"{points(row.left):.2f}", str(row.left.tokens),
            f"{points(row.right):.2f}", str(row.right.tokens), number(row.t, 2), number(row.df, 0),
            "" if row.p is None else f"{row.p:.2g}",
        )
        for row in rows
    ]  # fmt: skip
    columns = ("rule", "left, points", "tokens", "right, points", "tokens", "Welch's t", "df", "p")
    return Figure(
        name=f"equations-{found.source.task}",
        title=f"{found.source.task}: left and right of the equals sign",
        caption=f"equations in {found.responses_with} of {found.responses} responses; "
        "left is the reasoning, right the arithmetic",
        table=ReportTable(f"{found.source.task}: equations", columns, rows_of(cells)),
        layers=tuple(layers),
        height=46 * len(rows),
        system=found.source.system,
    )


def points(side: tokens.Side) -> float:
    """The mean shift of a side that has tokens, in percentage points."""
    assert side.mean is not None
    return 100 * side.mean


def _ends(ends: Sequence[charts.Datum], x: Any, y: Any, color: str, *, apart: bool) -> list[charts.Layer]:
    """The words of two points on a line: on either side of them, or together where they lie close."""
    if apart:
        return [charts.words(ends[:1], x, y, color, "left"), charts.words(ends[1:], x, y, color, "right")]
    both = ", ".join(
        f"{end['text']} {end['value']:.2f}" for end in sorted(ends, key=lambda e: e["text"] != "left")
    )
    return [charts.words([ends[1] | {"text": both}], x, y, color, "right")]


# Agreement


def agreement_figures(found: positions.Agreement) -> list[Figure]:
    """KL to the tuned model and shared first choices, against position."""
    task = found.source.task
    on = "on the proxy's outputs" if found.source.role == "proxy" else "on the tuned model's outputs"
    shown, x = curve(found.rows, found.bands)
    y = charts.axis("value", "KL from tuned, nats (median)", type="symlog", constant=0.01)
    y["axis"] = {"values": [0, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30], "format": "~r"}
    layers: list[charts.Layer] = []
    for role in ("base", "proxy"):
        data = _divergences(shown, role)
        layers += [*_banded(data, x, y, role), charts.words(data[:1], x, y, role, "right")]
    same_y = charts.axis("value", "same first choice as tuned, %", domain=[0, 100])
    same: list[charts.Layer] = []
    for role in ("base", "proxy"):
        data = _data(shown, lambda row, r=role: getattr(row, f"same_{r}"), 100, f"{role} agrees", "%")  # type: ignore[misc]
        same += [
            *_banded(data, x, same_y, role),
            charts.words([data[0] | {"text": role}], x, same_y, role, dy=17 if role == "proxy" else -9),
        ]
    table = _agreement_table(f"{task}: agreement with tuned, {on}", shown)
    first = found.first_step
    return [
        Figure(
            name=f"agreement-kl-{task}-{found.source.role}",
            title=f"{task}: distance from tuned, {on}",
            caption=f"median and middle half; first step: proxy {first.kl_proxy.median:.3f}, base "
            f"{first.kl_base.median:.3f} nats (paper, AlpacaFarm: {found.paper_first_step['proxy']} and "
            f"{found.paper_first_step['base']}){_few(shown)}",
            table=table,
            layers=tuple(layers),
            system=found.source.system,
        ),
        Figure(
            name=f"agreement-same-{task}-{found.source.role}",
            title=f"{task}: same first choice as tuned, {on}",
            caption=f"over all tokens: proxy {100 * found.same_proxy.value:.1f}%, base "
            f"{100 * found.same_base.value:.1f}%; areas are 95% intervals{_few(shown)}",
            table=table,
            layers=tuple(same),
            system=found.source.system,
        ),
    ]


def _divergences(rows: Sequence[positions.AgreementRow], role: str) -> list[charts.Datum]:
    """Medians of KL(tuned || role) with quartiles."""
    data = []
    for row in rows:
        spread = row.kl_proxy if role == "proxy" else row.kl_base
        half = f"middle half {spread.quarter:.3g} to {spread.three_quarters:.3g}"
        data.append({
            "at": (row.first + row.last) / 2, "value": spread.median, "low": spread.quarter,
            "high": spread.three_quarters, "text": role, "n": row.n,
            "label": f"{role}, {where(row)}; median {spread.median:.3g} nats; {half}; {row.n} tokens",
        })  # fmt: skip
    return data


def _agreement_table(title: str, rows: Sequence[positions.AgreementRow]) -> ReportTable:
    cells = [
        (
            where(row), str(row.n), number(row.kl_proxy.median), number(row.kl_base.median),
            bounded(row.same_proxy, 1, 100), bounded(row.same_base, 1, 100),
        )
        for row in rows
    ]  # fmt: skip
    columns = (
        "where",
        "tokens",
        "KL to proxy, median",
        "KL to base, median",
        "proxy agrees, %",
        "base agrees, %",
    )
    return ReportTable(title, columns, rows_of(cells))
