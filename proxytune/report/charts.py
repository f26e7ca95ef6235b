"""Drawings: records of figures -> Vega-Lite -> SVG (vl-convert, without a browser or a network).

Every mark carries its figures as text (`label`), which the page shows as a tooltip and screen readers read.
The same figures are in a table beside the drawing. Every role has its colour; the page replaces the colours
by variables of its colour scheme.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

from proxytune.errors import needs_extra
from proxytune.report.escape import visible

Datum = dict[str, Any]
Layer = dict[str, Any]
Side = Literal["right", "left", "above", "below"]

COLORS = {
    "base": "#5f6871", "antiexpert": "#9a5084", "expert": "#9a5c00", "proxy": "#0068a8", "tuned": "#007a58",
    "published": "#59636d", "ink": "#1b2126", "muted": "#59636c", "rule": "#e3e5e4", "card": "#ffffff",
}  # fmt: skip
"""One colour per name and no two the same: the light values of design.css."""
FONT = "Arial, 'Liberation Sans', Helvetica, sans-serif"
"""Of one width on all systems, so that what was measured here fits there."""
WIDTH = 336
"""Of a whole drawing with its axes and words: what a phone of 390 pixels shows without shrinking the text."""
HEIGHT = 165
"""Of the area inside the axes."""
INSIDE = 285
"""About the width inside the axes, where they have numbers only."""
FEW = 20
"""Tokens under which a point of a curve is faded."""
FAINT = 0.4
"""Its opacity."""


@dataclass(frozen=True)
class ReportTable:
    """A table of the page."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[TableRow, ...]
    note: str = ""
    texts: frozenset[int] = frozenset()
    """Columns that hold text of models."""
    words: int = 1
    """How many columns on the left are words; the others are figures, set to the right."""
    folded: bool = False
    """Whether it is opened by a click."""

    @property
    def numbers(self) -> frozenset[int]:
        """The columns that are set to the right."""
        return frozenset(range(self.words, len(self.columns))) - self.texts


@dataclass(frozen=True)
class TableRow:
    """A line of a table."""

    cells: tuple[str, ...]
    mark: Literal["", "strong", "published"] = ""


@dataclass(frozen=True)
class Figure:
    """A drawing with its words and its figures as a table."""

    name: str
    """Of the SVG file, and in the page's addresses."""
    title: str
    caption: str
    table: ReportTable
    layers: tuple[Layer, ...]
    height: int = HEIGHT
    system: str = ""
    """The system that it is of; named in the title where a page shows several."""


def rows_of(cells: Sequence[Sequence[str]]) -> tuple[TableRow, ...]:
    """Plain lines of a table, harmless to show."""
    return tuple(TableRow(tuple(visible(cell) for cell in row)) for row in cells)


# Layers


def axis(name: str, title: str, kind: str = "quantitative", **scale: Any) -> dict[str, Any]:
    """An encoding with its axis; `scale` are keys of the Vega-Lite scale."""
    found: dict[str, Any] = {"field": name, "type": kind, "title": title, "scale": {"nice": True, **scale}}
    if kind == "quantitative":
        found["axis"] = {"tickCount": 6, "format": "~r"}
    return found


def log_axis(name: str, title: str, low: float, high: float) -> dict[str, Any]:
    """A logarithmic encoding with ticks at 1, 2 and 5 of every decade between the bounds."""
    ticks = [m * 10.0**k for k in range(-6, 16) for m in (1, 2, 5)]
    shown = [tick for tick in ticks if low <= tick <= high]
    found = axis(name, title, type="log", nice=False, domain=[low, high])
    return found | {"axis": {"values": shown, "format": "~r"}}


def stretches(data: Sequence[Datum]) -> list[tuple[bool, list[Datum]]]:
    """A curve in parts that are over many tokens, and parts that are over few (True) and reach to their
    neighbours."""
    parts: list[tuple[bool, list[Datum]]] = []
    for few, own in groupby(data, key=lambda datum: datum["n"] < FEW):
        part = list(own)
        if parts and few:
            part = [parts[-1][1][-1], *part]
        elif parts:
            parts[-1][1].append(part[0])
        parts.append((few, part))
    return parts


def band(data: Sequence[Datum], x: Any, y: Any, color: str, *, opacity: float = 0.16) -> Layer:
    """The area between `low` and `high`."""
    return {
        "data": {"values": list(data)},
        "mark": {"type": "area", "color": COLORS[color], "opacity": opacity, "aria": False},
        "encoding": {"x": x, "y": {**y, "field": "low"}, "y2": {"field": "high"}},
    }


def line(
    data: Sequence[Datum], x: Any, y: Any, color: str, *, dashed: bool = False, opacity: float = 1
) -> Layer:
    """A line through the points, in their order along x."""
    mark = {"type": "line", "color": COLORS[color], "strokeWidth": 2, "opacity": opacity, "aria": False}
    if dashed:
        mark["strokeDash"] = [5, 4]
    return {"data": {"values": list(data)}, "mark": mark, "encoding": {"x": x, "y": y}}


def path(data: Sequence[Datum], x: Any, y: Any, color: str) -> Layer:
    """A line through the points in the order of their `order`."""
    layer = line(data, x, y, color)
    layer["encoding"]["order"] = {"field": "order", "type": "quantitative"}
    return layer


def points(data: Sequence[Datum], x: Any, y: Any, color: str, **mark: Any) -> Layer:
    """Points whose tooltip is their `label`."""
    look = {"type": "point", "filled": True, "size": 55, "color": COLORS[color], "opacity": 1, **mark}
    encoding = {"x": x, "y": y, "description": {"field": "label"}}
    return {"data": {"values": list(data)}, "mark": look, "encoding": encoding}


def hollow(data: Sequence[Datum], x: Any, y: Any, color: str = "published", shape: str = "diamond") -> Layer:
    """Points that are not filled: published figures."""
    return points(data, x, y, color, filled=False, shape=shape, strokeWidth=1.6, size=60)


def intervals(data: Sequence[Datum], x: Any, y: Any, color: str, *, along: Literal["x", "y"]) -> Layer:
    """From `low` to `high`, along one axis; points without an interval are left out."""
    known = [datum for datum in data if datum.get("low") is not None and datum.get("high") is not None]
    across = {"x": x, "y": y}
    across[along] = {**across[along], "field": "low"}
    return {
        "data": {"values": known},
        "mark": {"type": "rule", "color": COLORS[color], "strokeWidth": 2, "opacity": 0.55, "aria": False},
        "encoding": {**across, f"{along}2": {"field": "high"}},
    }


def level(value: float, y: Any, color: str, *, along: Literal["x", "y"] = "y") -> Layer:
    """A dashed line across the drawing at a value."""
    mark = {"type": "rule", "color": COLORS[color], "strokeDash": [5, 4], "strokeWidth": 1.4, "aria": False}
    return {"data": {"values": [{y["field"]: value}]}, "mark": mark, "encoding": {along: y}}


_OFFSETS: dict[Side, dict[str, Any]] = {
    "right": {"align": "left", "baseline": "middle", "dx": 9},
    "left": {"align": "right", "baseline": "middle", "dx": -9},
    "above": {"align": "center", "baseline": "bottom", "dy": -8},
    "below": {"align": "center", "baseline": "top", "dy": 8},
}


def words(data: Sequence[Datum], x: Any, y: Any, color: str, side: Side = "right", **mark: Any) -> Layer:
    """The `text` of every datum, beside its point, with a rim that keeps it legible over lines."""
    look = {"type": "text", "fontSize": 11.5, "aria": False, **_OFFSETS[side], **mark}
    rim = {**look, "color": COLORS["card"], "stroke": COLORS["card"], "strokeWidth": 4, "strokeJoin": "round"}
    encoding = {"x": x, "y": y, "text": {"field": "text"}}
    drawn = [{"mark": {**look, "color": COLORS[color]}, "encoding": encoding}]
    return {"data": {"values": list(data)}, "layer": [{"mark": rim, "encoding": encoding}, *drawn]}


def sides(
    places: Sequence[tuple[float, float]], texts: Sequence[str], width: float = INSIDE, height: float = HEIGHT
) -> list[Side]:
    """Where each label goes so that labels hide neither points nor each other, as far as four sides allow.
    `places` are pixels from the drawing's lower left corner."""
    taken = [(x - 5, y - 5, x + 5, y + 5) for x, y in places]
    order: tuple[Side, ...] = ("right", "left", "above", "below")
    found: list[Side] = []
    for (x, y), text in zip(places, texts, strict=True):
        long = 6.2 * len(text)
        boxes: dict[Side, tuple[float, float, float, float]] = {
            "right": (x + 8, y - 7, x + 8 + long, y + 7),
            "left": (x - 8 - long, y - 7, x - 8, y + 7),
            "above": (x - long / 2, y + 7, x + long / 2, y + 21),
            "below": (x - long / 2, y - 21, x + long / 2, y - 7),
        }

        def cost(
            side: Side, boxes: Mapping[Side, tuple[float, float, float, float]] = boxes
        ) -> tuple[float, int]:
            left, low, right, high = boxes[side]
            hit = sum(left < c and a < right and low < d and b < high for a, b, c, d in taken)
            outside = max(0, -left) + max(0, right - width) + max(0, -low) + max(0, high - height)
            return hit + outside / 20, order.index(side)

        best = min(order, key=cost)
        found.append(best)
        left, low, right, high = boxes[best]
        taken.append((left, low, right, high))
    return found


# SVG


def svg(figure: Figure) -> str:
    """The drawing in the light colours, on white: a file of its own."""
    return _drawn(figure, COLORS["card"])


def themed_svg(figure: Figure) -> str:
    """The drawing for the page: no background, and colours that follow its scheme."""
    drawn = _drawn(figure, None)
    for name, color in COLORS.items():
        drawn = drawn.replace(f'"{color}"', f'"var(--{name})"')
    return drawn


def _drawn(figure: Figure, background: str | None) -> str:
    """Vega-Lite's drawing. Raises UserError where vl-convert is not installed."""
    needs_extra("the HTML report", "vl_convert", "report")
    import vl_convert

    specification = {
        "autosize": {"type": "fit-x", "contains": "padding"},
        "width": WIDTH,
        "height": figure.height,
        "description": figure.title,
        "layer": list(figure.layers),
        "config": _CONFIG,
        "padding": 4,
        "background": background,
    }
    found: str = vl_convert.vegalite_to_svg(harmless(specification), vl_version="5.20", allowed_base_urls=[])
    return found


def harmless(part: Any) -> Any:
    """A specification with every text in it harmless to show, whoever it comes from."""
    if isinstance(part, str):
        return visible(part)
    if isinstance(part, dict):
        return {visible(key): harmless(value) for key, value in part.items()}
    return [harmless(one) for one in part] if isinstance(part, list) else part


_TEXT = {
    "labelColor": COLORS["muted"],
    "titleColor": COLORS["muted"],
    "labelFontSize": 11.5,
    "titleFontSize": 12,
}
_CONFIG = {
    "font": FONT,
    "view": {"stroke": None},
    "axis": {
        **_TEXT,
        "titleFontWeight": "normal",
        "gridColor": COLORS["rule"],
        "domainColor": COLORS["rule"],
        "tickColor": COLORS["rule"],
        "labelPadding": 5,
        "titlePadding": 9,
        "labelLimit": 120,
        "labelFlush": False,
    },
    "axisX": {"grid": False},
    "axisQuantitative": {"grid": True, "domain": False, "ticks": False},
}
