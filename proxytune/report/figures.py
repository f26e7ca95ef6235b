"""Figures of runs: scores with the paper's beside them, the gap closed, and what a score costs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from proxytune.config import ROLES
from proxytune.paper import published
from proxytune.records import NO_SCORE, Metric
from proxytune.report import charts
from proxytune.report.charts import Figure, ReportTable, TableRow
from proxytune.report.escape import visible
from proxytune.report.tables import RoleRow, alike, size, title

PAPER_TASKS = {"codex_humaneval": "humaneval"}
"""The paper's repository's names of tasks that we call otherwise."""
PAPER_TABLES = ("2", "4", "5")
EDGE = {"value": "width"}
"""The right edge of a drawing: words there stand outside."""
SCORE_COLUMNS = ("as", "score, %", "95% interval", "gap closed", "memory", "ms / token", "examples")
Published = dict[str, Any]


def in_percent(value: float | None, metric: Metric) -> float | None:
    """A value of the metric as tables show it: shares in percent, other numbers as they are."""
    return None if value is None else value * (100 if metric.unit == "share" else 1)


def published_scores(paper: Mapping[str, Any], task: str) -> list[Published]:
    """The paper's rows for a task: table, size, role and percent (stored where the repository has it, else
    printed), with `gap` for the proxy."""
    found: list[Published] = []
    for number in PAPER_TABLES:
        table = paper["tables"][number]
        for i, column in enumerate(table["columns"]):
            own = column["task"] or ("triviaqa" if column["name"] == "TriviaQA" else None)
            if own is None or PAPER_TASKS.get(own, own) != task:
                continue
            rows = [
                {
                    "table": number, "size": row["size"], "role": row["role"], "metric": column["name"],
                    "score": _either(
                        published.stored_percent(paper, column, row["runs"][i]), row["printed"][i]
                    ),
                }
                for row in table["rows"]
            ]  # fmt: skip
            found += [row | {"gap": _published_gap(row, rows)} for row in rows if row["score"] is not None]
    return found


def _either(stored: float | None, printed: float | None) -> float | None:
    return printed if stored is None else stored


def _published_gap(row: Published, rows: Sequence[Published]) -> float | None:
    """The gap that a published proxy closed, in percent."""
    if row["role"] != "proxy":
        return None
    same = {other["role"]: other["score"] for other in rows if other["size"] == row["size"]}
    if same.get("base") is None or same.get("tuned") is None or same["base"] == same["tuned"]:
        return None
    return float(100 * (row["score"] - same["base"]) / (same["tuned"] - same["base"]))


# Tables


def beside_table(rows: Sequence[RoleRow], paper: Mapping[str, Sequence[Published]]) -> ReportTable:
    """A line for every task and system, and under it the paper's lines for that task, marked as such."""
    lines = []
    for task in dict.fromkeys(row.task for row in rows):
        for own in alike([row for row in rows if row.task == task]):
            lines += [_own_line(own, system) for system in dict.fromkeys(row.system for row in own)]
        lines += _published_lines(task, paper.get(task, ()))
    note = "ours in bold, published figures of other models in grey; the drawings have the intervals"
    columns = ("task", "models", "metric, %", *ROLES, "gap closed", "examples")
    return ReportTable("All scores, beside the paper's", columns, tuple(lines), note, words=3, folded=True)


def _own_line(rows: Sequence[RoleRow], system: str) -> TableRow:
    """The scores of a system's roles on the same items, and over how many of these they are."""
    own = [row for row in rows if row.system == system]
    roles = {row.role: row for row in reversed(own) if not row.forced}
    values = [row.shown if row.score is None else row.shown.split()[0] for row in roles.values()]
    scores = dict(zip(roles, values, strict=True))
    gap = roles["proxy"].cells[3] if "proxy" in roles else ""
    metric = NO_SCORE.get(own[0].metric, own[0].metric) + (f" ({own[0].apart})" if own[0].apart else "")
    over = "; ".join(dict.fromkeys(row.examples for row in roles.values())) or own[0].examples
    cells = (scores.get(role, "") for role in ROLES)
    return TableRow((own[0].task, visible(system), visible(metric), *cells, gap, over), "strong")


def _published_lines(task: str, entries: Sequence[Published]) -> list[TableRow]:
    """The paper's systems for a task. Its 7B tuned model is the expert of all of them."""
    lines = []
    for number in dict.fromkeys(entry["table"] for entry in entries):
        own = [entry for entry in entries if entry["table"] == number]
        expert = next((entry["score"] for entry in own if entry["size"] == "7B"), None)
        for model in dict.fromkeys(entry["size"] for entry in own if entry["size"] != "7B"):
            roles = {entry["role"]: entry for entry in own if entry["size"] == model}
            scores = {role: entry["score"] for role, entry in roles.items()} | {"expert": expert}
            cells = ["" if scores.get(role) is None else f"{scores[role]:.1f}" for role in ROLES]
            gap = roles["proxy"]["gap"] if "proxy" in roles else None
            name = (task, f"paper, {model} (table {number})", own[0]["metric"])
            lines.append(TableRow((*name, *cells, "" if gap is None else f"{gap:.1f}%", ""), "published"))
    return lines


def score_table(rows: Sequence[RoleRow]) -> ReportTable:
    """Our rows of a task, with what they cost."""
    lines = [
        TableRow(
            (
                visible(name), *_score_cells(row), row.cells[3], size(row.memory),
                row.speed, row.examples,
            ),
            "strong" if row.role == "proxy" else "",
        )
        for name, row in zip(names(rows), rows, strict=True)
    ]  # fmt: skip
    return ReportTable(visible(title(rows)), SCORE_COLUMNS, tuple(lines))


def names(rows: Sequence[RoleRow]) -> list[str]:
    """What rows of a task are called: the role, with the system where it is not the first one's."""
    return [row.label if row.system == rows[0].system else f"{row.system}: {row.label}" for row in rows]


def _score_cells(row: RoleRow) -> tuple[str, str]:
    """The value and its interval, or why there is none."""
    if row.score is None:
        return row.shown, ""
    value, _, interval = row.shown.partition(" ")
    return value, interval.strip("[]").replace(", ", " to ")


# Figures


def score_figure(rows: Sequence[RoleRow]) -> Figure | None:
    """Every role's score with its interval, or why it has none; None where no role has one."""
    if all(row.score is None for row in rows):
        return None
    task, called = rows[0].task, [visible(name) for name in names(rows)]
    number = any(row.score is not None and row.score.unit == "number" for row in rows)
    domain: dict[str, Any] = {} if number else {"domain": [0, 100]}
    x = charts.axis("score", visible(rows[0].metric) + ("" if number else ", %"), **domain)
    y = {**charts.axis("name", "", "nominal"), "sort": called, "title": None}
    layers: list[charts.Layer] = []
    for name, row in zip(called, rows, strict=True):
        if row.score is None:
            layers.append(charts.words([{"name": name, "text": row.shown}], EDGE, y, "muted"))
            continue
        value = in_percent(row.score.value, row.score)
        datum = {
            "name": name, "score": value, "low": in_percent(row.score.low, row.score),
            "high": in_percent(row.score.high, row.score), "text": f"{value:.1f}",
            "label": f"{name}; {row.shown}; {row.examples} examples",
        }  # fmt: skip
        shape = "diamond" if row.forced else "circle"
        layers += [
            charts.intervals([datum], x, y, row.role, along="x"),
            charts.points([datum], x, y, row.role, size=80, shape=shape),
            charts.words([datum], EDGE, y, row.role, fontWeight="bold" if row.role == "proxy" else "normal"),
        ]
    return Figure(
        name=f"score-{task}",
        title=visible(title(rows)),
        caption=f"{', '.join(dict.fromkeys(row.examples for row in rows))} examples; lines are 95% intervals",
        table=score_table(rows),
        layers=tuple(layers),
        height=27 * len(rows),
    )


def gap_figure(rows: Sequence[RoleRow], paper: Mapping[str, Sequence[Published]]) -> Figure | None:
    """The gap closed on each task beside what the paper's models closed there; None where nothing closed a
    firm gap."""
    ours = [row for row in rows if row.role == "proxy" and row.gap_closed is not None]
    if not ours:
        return None
    data = [
        {
            "row": visible(f"{row.task}: {row.system}"),
            "gap": 100 * (row.gap_closed or 0),
            "text": row.cells[3],
        }
        for row in ours
    ]
    printed = [
        {"row": f"{task}: paper, table {entry['table']}", "gap": entry["gap"], "text": entry["size"]}
        for task in dict.fromkeys(row.task for row in ours)
        for entry in paper.get(task, ())
        if entry["gap"] is not None
    ]
    for datum in (*data, *printed):
        own = "" if datum["text"].endswith("%") else f", {datum['text']}"
        datum["label"] = f"{datum['row']}{own}; {datum['gap']:.1f}% of the gap closed"
    both = sorted((*data, *printed), key=lambda datum: datum["row"].partition(":")[0])
    rows_shown = list(dict.fromkeys(datum["row"] for datum in both))
    values = [datum["gap"] for datum in both]
    low, high = min(0, math.floor(min(values) / 20) * 20), max(100, math.ceil(max(values) / 20) * 20)
    x = charts.axis("gap", "gap closed, %", domain=[low, high])
    y = {**charts.axis("row", "", "nominal"), "sort": rows_shown, "title": None}
    theirs = "test(/: paper, table [0-9]+$/, datum.label)"
    y["axis"] = {
        "labelExpr": f"{theirs} ? replace(datum.label, /^.*: /, '') : replace(datum.label, ': ', ', ')",
        "labelFontWeight": {"condition": {"test": theirs, "value": "normal"}, "value": "bold"},
    }
    cells = [(d["row"], "" if d in data else d["text"], f"{d['gap']:.1f}") for d in both]
    return Figure(
        name="gap",
        title="Gap closed, beside the paper's",
        caption="(proxy - base) / (tuned - base). Hollow: published, 13B and 70B",
        table=ReportTable(
            "Gap closed", ("task and source", "model", "gap closed, %"), charts.rows_of(cells), words=2
        ),
        layers=(
            charts.level(100, x, "muted", along="x"),
            charts.hollow(printed, x, y),
            *_outward(printed, x, y),
            charts.points(data, x, y, "proxy", size=95),
            charts.words(data, x, y, "proxy", "left", fontWeight="bold"),
        ),
        height=21 * len(rows_shown),
    )


def _outward(printed: Sequence[charts.Datum], x: Any, y: Any) -> list[charts.Layer]:
    """The names of published points of a row: left of the lowest, right of the highest."""
    layers = []
    for row in dict.fromkeys(datum["row"] for datum in printed):
        own = sorted((d for d in printed if d["row"] == row), key=lambda d: float(d["gap"]))
        for place, datum in enumerate(own):
            side: charts.Side = "right" if place == len(own) - 1 else "left" if place == 0 else "above"
            layers.append(charts.words([datum], x, y, "published", side))
    return layers


def price_figure(rows: Sequence[RoleRow], what: Literal["memory", "time"]) -> Figure | None:
    """Score against memory, or against time per token; None where that was not recorded."""
    priced = [row for row in rows if (row.memory if what == "memory" else row.ms_per_token)]
    known = [row for row in priced if row.score is not None]
    scores = [row.score for row in known if row.score is not None]
    if len(known) < 2:
        return None
    prices = [row.memory / 1e6 if what == "memory" else float(row.ms_per_token or 0) for row in known]
    words = "memory of weights and KV cache, MB" if what == "memory" else "time per generated token, ms"
    low, high = min(prices) / 1.6, max(prices) * 1.9
    shares = scores[0].unit != "number"
    x = charts.log_axis("price", words + " (log scale)", low, high)
    bounds: dict[str, Any] = {"domain": [-4, 106]} if shares else {}
    y = charts.axis("score", visible(known[0].metric) + (", %" if shares else ""), **bounds)
    if shares:
        y["axis"] = {"values": [0, 20, 40, 60, 80, 100]}
    data: list[charts.Datum] = []
    unit = "MB" if what == "memory" else "ms per token"
    for name, row, score, price in zip(names(known), known, scores, prices, strict=True):
        description = visible(f"{name}; {row.shown}; {row.examples} examples; {price:.3g} {unit}")
        data.append({
            "price": price, "score": in_percent(score.value, score), "role": row.role,
            "low": in_percent(score.low, score), "high": in_percent(score.high, score),
            "text": visible(name), "label": description,
        })  # fmt: skip
    top = 110 if shares else 1.1 * max(d["score"] for d in data)
    places = [
        (
            charts.INSIDE * math.log(d["price"] / low) / math.log(high / low),
            charts.HEIGHT * (d["score"] + 4) / top,
        )
        for d in data
    ]
    layers: list[charts.Layer] = []
    for datum, side in zip(data, charts.sides(places, [d["text"] for d in data]), strict=True):
        layers += [
            charts.intervals([datum], x, y, datum["role"], along="y"),
            charts.points([datum], x, y, datum["role"], size=80),
            charts.words([datum], x, y, datum["role"], side),
        ]
    task = known[0].task
    table = ReportTable(
        f"{task}: score and {words}", ("as", words, "score, %"),
        charts.rows_of([(d["text"], f"{d['price']:.3g}", f"{d['score']:.1f}") for d in data]),
    )  # fmt: skip
    return Figure(
        name=f"price-{what}-{task}",
        title=f"{task}: score against {'memory' if what == 'memory' else 'time'}",
        caption=f"{'down' if known[0].facts.lower_is_better else 'up'} and to the left is better; "
        "lines are 95% intervals",
        table=table,
        layers=tuple(layers),
    )
