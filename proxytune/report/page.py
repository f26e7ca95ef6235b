"""The report as one HTML file that needs nothing else, and its figures as SVG files."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any, Literal

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from proxytune import __version__
from proxytune.analysis import read_once
from proxytune.errors import needs_extra
from proxytune.report.charts import Figure, ReportTable, svg, themed_svg
from proxytune.report.design import THEME, TOKENS, asset, source_hash, styles
from proxytune.report.escape import embedded, visible
from proxytune.report.figures import in_percent
from proxytune.report.sections import Inputs, Part, Section, read_inputs, sections
from proxytune.report.tables import RoleRow, alike
from proxytune.report.token_view import token_data
from proxytune.run_files import write_atomically

TRACK, CHARACTER = 152, 6.7
"""Pixels of a tile's track where it is narrowest, and of a character of its labels."""
TILES = 5
"""Tiles in a line on a wide screen, at most."""
Span = Literal["third", "half", "whole"]
"""How much of a line a figure takes on a wide screen."""


@dataclass(frozen=True)
class Drawn:
    """A figure and its drawing, which is the only markup that a part brings."""

    figure: Figure
    svg: str
    span: Span


@dataclass(frozen=True)
class DrawnPart:
    """A part of a section with its drawings."""

    figures: tuple[Drawn, ...]
    further: tuple[Drawn, ...]
    tables: tuple[ReportTable, ...]
    sensitive: bool


@dataclass(frozen=True)
class Report:
    """What there is to show."""

    inputs: Inputs
    sections: tuple[Section, ...]

    @classmethod
    def read(cls, root: Path) -> Report:
        """The report on the runs under `root`. UserError where there is none, or vl-convert is missing."""
        needs_extra("the report with figures", "vl_convert", "report")
        inputs = read_inputs(root)
        with read_once():
            return cls(inputs, tuple(distinct(sections(inputs))))

    @property
    def figures(self) -> list[Figure]:
        """All figures."""
        parts = [part for section in self.sections for part in section.parts]
        return [figure for part in parts for figure in (*part.figures, *part.further)]

    def write_html(self, path: Path) -> None:
        """Write the page."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, self.html().encode("utf-8", "replace"))

    def write_figures(self, folder: Path) -> list[Path]:
        """Write every figure as `<name>.svg`; the paths."""
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / f"{figure.name}.svg" for figure in self.figures]
        for path, figure in zip(paths, self.figures, strict=True):
            write_atomically(path, svg(figure).encode())
        return paths

    def html(self) -> str:
        """The page."""
        early, js = asset(THEME), asset(TOKENS) + asset("report.js")
        found = tiles(self.inputs.rows)
        environment = Environment(autoescape=True, undefined=StrictUndefined, finalize=_harmless)
        return environment.from_string(asset("report.html.j2")).render(
            title="Proxy-tuning report",
            subtitle=_subtitle(self.inputs),
            version=__version__,
            tiles=found,
            columns=math.ceil(len(found) / max(1, math.ceil(len(found) / TILES))),
            sections=[
                {**_fields(section), "parts": [_drawn_part(part) for part in section.parts]}
                for section in self.sections
            ],
            css=styles(asset("report.css")),
            early=early,
            js=js,
            hashes=f"{source_hash(early)} {source_hash(js)}",
            data=embedded(token_data(self.inputs.sets)),
        )


def distinct(found: Sequence[Section]) -> list[Section]:
    """The sections with figures of different names; where they are of several systems, the titles say of
    which."""
    parts = [part for one in found for part in one.parts]
    systems = {figure.system for part in parts for figure in (*part.figures, *part.further)} - {""}
    taken = set[str]()

    def named(figure: Figure) -> Figure:
        title = figure.title
        if figure.system and len(systems) > 1:
            title = visible(f"{figure.system}, {title}")
        name = next(
            name for k in count(1) if (name := figure.name if k == 1 else f"{figure.name}-{k}") not in taken
        )
        taken.add(name)
        return replace(figure, name=name, title=title)

    def renamed(part: Part) -> Part:
        return replace(part, figures=tuple(map(named, part.figures)), further=tuple(map(named, part.further)))

    return [replace(one, parts=tuple(map(renamed, one.parts))) for one in found]


def _harmless(found: Any) -> Any:
    """What the template writes, harmless to show; what is marked safe is made by us."""
    return visible(found) if isinstance(found, str) and not isinstance(found, Markup) else found


def _fields(section: Section) -> dict[str, Any]:
    names = ("id", "short", "title", "finding", "intro", "missing", "command")
    return {name: getattr(section, name) for name in names}


def _drawn_part(part: Part) -> DrawnPart:
    return DrawnPart(_drawn(part.figures), _drawn(part.further), part.tables, part.sensitive)


def _drawn(figures: Sequence[Figure]) -> tuple[Drawn, ...]:
    return tuple(
        Drawn(figure, themed_svg(figure), span)
        for figure, span in zip(figures, spans(len(figures)), strict=True)
    )


def spans(count: int) -> list[Span]:
    """Lines of three figures and of two, so that none is left over; one figure alone takes a whole line."""
    if count == 1:
        return ["whole"]
    halves = (0, 4, 2)[count % 3]
    return ["third" if place < count - halves else "half" for place in range(count)]


def _subtitle(inputs: Inputs) -> str:
    """What the page is about."""
    systems = ", ".join(dict.fromkeys(run.spec.system.name for _, run in inputs.found))
    tasks = list(dict.fromkeys(run.spec.task for _, run in inputs.found))
    latest = max(run.finished or run.started for _, run in inputs.found)[:10]
    summary = f"{len(inputs.found)} runs on {', '.join(tasks)}; the latest of {latest}"
    return visible(f"Systems: {systems}. {summary}.")


def _roles_alike(rows: Sequence[RoleRow]) -> Iterator[dict[str, RoleRow]]:
    """The roles of every system and task under the same conditions."""
    for together in alike(rows):
        for system in dict.fromkeys(row.system for row in together):
            own = [row for row in together if row.system == system and row.forced is None]
            yield {row.role: row for row in reversed(own)}


def tiles(rows: Sequence[RoleRow]) -> list[Mapping[str, Any]]:
    """The headline of every system and task that has base, proxy and tuned."""
    found: list[Mapping[str, Any]] = []
    for own in _roles_alike(rows):
        values: dict[str, float] = {
            role: in_percent(row.score.value, row.score) or 0.0
            for role, row in own.items()
            if row.score is not None
        }
        if not {"base", "proxy", "tuned"} <= values.keys():
            continue
        system, task = own["proxy"].system, own["proxy"].task
        gap = own["proxy"].gap_closed
        places = {"base": 0.0, "tuned": 100.0, "proxy": 100 * (gap or 0)}
        if gap is None:
            places = {role: values[role] for role in places}
        places = {role: min(max(place, 0.0), 100.0) for role, place in places.items()}
        texts = {role: f"{role} {values[role]:.1f}" for role in places}
        lines = label_lines(places, texts)
        found.append({
            "system": visible(system), "task": task, "metric": visible(own["proxy"].metric),
            "gap": "n/a" if gap is None else f"{100 * gap:.1f}%",
            "caption": "no firm gap to close" if gap is None else "of the gap closed",
            "marks": [
                {"role": role, "at": f"{places[role]:.1f}", "text": texts[role], "line": lines[role]}
                for role in ("base", "tuned", "proxy")
            ],
            "lines": 1 + max(lines.values()),
        })  # fmt: skip
    return found


def label_lines(places: Mapping[str, float], texts: Mapping[str, str]) -> dict[str, int]:
    """The line under a tile's track on which each label stands, so that none hides another on the narrowest
    tile. A label lies around its dot: from its left end at 0 to its right end at 100."""
    taken: list[tuple[int, float, float]] = []
    found: dict[str, int] = {}
    for role in ("base", "proxy", "tuned"):
        long = CHARACTER * len(texts[role]) + 6
        left = places[role] / 100 * (TRACK - long)
        clear = (
            line
            for line in count()
            if not any(line == own and left < right and low < left + long for own, low, right in taken)
        )
        found[role] = next(clear)
        taken.append((found[role], left, left + long))
    return found
