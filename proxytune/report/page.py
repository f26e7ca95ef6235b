"""The report as one HTML file that needs nothing else, and its figures as SVG files."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from proxytune import __version__
from proxytune.errors import needs_extra
from proxytune.report.charts import Figure, ReportTable, svg, themed_svg
from proxytune.report.escape import embedded, visible
from proxytune.report.figures import in_percent
from proxytune.report.sections import Inputs, Section, read_inputs, sections
from proxytune.report.tables import RoleRow, alike
from proxytune.report.token_view import token_data
from proxytune.results import write_atomically


@dataclass(frozen=True)
class Drawn:
    """A figure and its drawing, which is the only markup that a part brings."""

    figure: Figure
    svg: str


@dataclass(frozen=True)
class DrawnPart:
    """A part of a section with its drawings."""

    figures: tuple[Drawn, ...]
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
        return cls(inputs, tuple(distinct(sections(inputs))))

    @property
    def figures(self) -> list[Figure]:
        """All figures."""
        return [figure for section in self.sections for part in section.parts for figure in part.figures]

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
        early, js = asset("theme.js"), asset("report.js")
        page = Environment(autoescape=True, undefined=StrictUndefined).from_string(asset("report.html.j2"))
        return page.render(
            title="Proxy-tuning report",
            subtitle=_subtitle(self.inputs),
            version=__version__,
            tiles=tiles(self.inputs.rows),
            sections=[
                {**_fields(section), "parts": [_drawn_part(part) for part in section.parts]}
                for section in self.sections
            ],
            css=asset("report.css"),
            early=early,
            js=js,
            hashes=f"{_hash(early)} {_hash(js)}",
            data=embedded(token_data(self.inputs.sets)),
        )


def distinct(found: Sequence[Section]) -> list[Section]:
    """The sections with figures of different names; where they are of several systems, the titles say of
    which."""
    systems = {figure.system for one in found for part in one.parts for figure in part.figures} - {""}
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

    return [
        replace(one, parts=tuple(replace(p, figures=tuple(named(f) for f in p.figures)) for p in one.parts))
        for one in found
    ]


def asset(name: str) -> str:
    """A file of proxytune/report/assets."""
    return (Path(__file__).parent / "assets" / name).read_text(encoding="utf-8")


def _hash(script: str) -> str:
    """The source expression that lets exactly this script run."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return f"'sha256-{digest}'"


def _fields(section: Section) -> dict[str, Any]:
    return {name: getattr(section, name) for name in ("id", "short", "title", "intro", "missing", "command")}


def _drawn_part(part: Any) -> DrawnPart:
    return DrawnPart(
        tuple(Drawn(figure, themed_svg(figure)) for figure in part.figures),
        part.tables,
        part.sensitive,
    )


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
        found.append({
            "system": visible(system), "task": task, "metric": visible(own["proxy"].metric),
            "gap": "n/a" if gap is None else f"{100 * gap:.1f}%",
            "caption": "no firm gap between base and tuned" if gap is None else "of the gap closed",
            **{f"{role}_at": f"{min(max(place, -2), 102):.1f}" for role, place in places.items()},
            **{role: f"{values[role]:.1f}" for role in places},
        })  # fmt: skip
    return found
