"""The sections of the page: which runs of a folder of results each of them is about, and what is missing."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from proxytune.analysis import failures, positions, sweeps, tokens
from proxytune.comparison import comparable, conditions, models_of
from proxytune.errors import UserError
from proxytune.paper import published
from proxytune.records import Run
from proxytune.report import findings
from proxytune.report.analyses import (
    MANY,
    agreement_figures,
    equations_figure,
    ngrams_figure,
    positions_figures,
    positions_table,
    published_ngrams,
)
from proxytune.report.charts import Figure, ReportTable
from proxytune.report.figures import beside_table, gap_figure, price_figure, published_scores, score_figure
from proxytune.report.runs import (
    cost_table,
    find_trainings,
    loss_figure,
    made_table,
    notes_table,
    systems_table,
    trainings_table,
)
from proxytune.report.sweeps import failure_counts, failure_tables, skip_figures, sweep_figures
from proxytune.report.tables import RoleRow, alike, role_rows
from proxytune.report.token_view import TraceSet, plainness, trace_sets
from proxytune.results import PREDICTIONS, find_runs
from proxytune.tasks.own import facts_of
from proxytune.terminal import say

MIN_COUNTS = (100, 30, 10, 3)
"""How often a token must have been generated to be ranked: the paper's number, or the largest of these that
leaves enough of them in smaller runs."""
ENOUGH = 8
by_position = partial(positions.positions, singles=MANY)
agreement = partial(positions.agreement, singles=MANY)
"""Of the positions that a curve shows one by one: a response may have a million."""
Found = TypeVar("Found")


@dataclass(frozen=True)
class Part:
    """Figures and tables that belong together."""

    figures: tuple[Figure, ...] = ()
    tables: tuple[ReportTable, ...] = ()
    further: tuple[Figure, ...] = ()
    """Figures of the same kind, which are opened by a click."""
    sensitive: bool = False
    """Whether it shows text that is hateful by design."""


@dataclass(frozen=True)
class Section:
    """A section of the page; without parts it names what is missing and the command that makes it."""

    id: str
    short: str
    """In the bar at the top."""
    title: str
    intro: tuple[str, ...]
    parts: tuple[Part, ...] = ()
    missing: str = ""
    command: str = ""
    finding: str = ""
    """What the section shows, in a sentence."""


@dataclass(frozen=True)
class Inputs:
    """What lies in a folder of results."""

    root: Path
    found: tuple[tuple[Path, Run], ...]
    rows: tuple[RoleRow, ...]
    """Of the runs that tables are about, one for each system, task, role and control."""
    others: int
    """Finished runs with other settings."""
    sets: tuple[TraceSet, ...]
    paper: Any

    @property
    def usual(self) -> tuple[str, str]:
        """The system and the task that hints name."""
        first = next((row for row in self.rows if row.role == "proxy"), self.rows[0])
        return first.system, first.facts.file or first.task

    def command(self, what: str, *rest: str) -> str:
        """A command for that system and task."""
        system, task = self.usual
        return " ".join(["proxytune", what, shlex.quote(task), "--system", system, *rest])


def read_inputs(root: Path) -> Inputs:
    """The finished runs under `root`; UserError where there is none."""
    found = find_runs(root)
    if not found:
        raise UserError(f"no finished run in '{root}': `proxytune eval` makes one")
    runs = table_runs(root, found)
    rows = tuple(role_rows(runs))
    return Inputs(
        root, tuple(found), rows, len(found) - len(runs), tuple(trace_sets(found)), published.read_paper()
    )


def table_runs(root: Path, found: Sequence[tuple[Path, Run]]) -> list[Run]:
    """The runs that the tables are about: per system and task, one for each role and control.

    These are of one item set, sampling and judge: the conditions of the runs with default settings
    (`root/<system>/<task>/<as>`) where there are any, and those that most roles were run under.
    """
    groups: dict[tuple[str, str], list[tuple[Path, Run]]] = {}
    for pair in sorted(found, key=plainness):
        groups.setdefault((pair[1].spec.system.name, pair[1].spec.task), []).append(pair)
    chosen = list[Run]()
    for pairs in groups.values():
        usual = [run for folder, run in pairs if len(folder.relative_to(root).parts) == 3]
        roles: dict[object, set[str]] = {}
        for run in usual or [run for _, run in pairs]:
            roles.setdefault((conditions(run), models_of(run)), set()).add(run.spec.role)
        most = max(roles, key=lambda key: len(roles[key]))
        own: dict[tuple[str, bool], Run] = {}
        for run in (*usual, *(run for _, run in pairs)):
            if (conditions(run), models_of(run)) == most:
                own.setdefault((run.spec.role, bool(run.spec.forced)), run)
        chosen += own.values()
    places = {id(run): i for i, (_, run) in enumerate(found)}
    return sorted(chosen, key=lambda run: places[id(run)])


def sections(inputs: Inputs) -> list[Section]:
    """All sections, in their order."""
    steered = [one for chosen in inputs.sets if (one := attempt(by_position, chosen.folder))]
    return [
        results_section(inputs),
        tokens_section(inputs, steered),
        price_section(inputs),
        positions_section(inputs, steered),
        ngrams_section(inputs),
        equations_section(inputs),
        alpha_section(inputs),
        skip_section(inputs),
        agreement_section(inputs),
        failures_section(inputs),
        *training_sections(inputs.root),
        runs_section(inputs),
    ]


def attempt(make: Callable[..., Found], *folders: Path | None) -> Found | None:
    """What an analysis finds in folders; None, with a note on stderr, where it does not fit the runs."""
    try:
        return make(*folders)
    except UserError as error:
        say(f"note: left out of the page: {error}")
        return None


def parts_of(
    figures: Sequence[Figure | None],
    *tables: ReportTable,
    sensitive: bool = False,
    shown: int | None = None,
) -> Iterator[Part]:
    """One part, or none where there is nothing in it; the first `shown` figures are open."""
    drawn = tuple(figure for figure in figures if figure is not None)
    if drawn or tables:
        open_ = len(drawn) if shown is None else shown
        yield Part(drawn[:open_], tables, drawn[open_:], sensitive)


def either(section: Section, parts: Sequence[Part], missing: str, command: str) -> Section:
    """The section with its parts, or with the line that names the command which makes them."""
    if parts:
        return dataclasses.replace(section, parts=tuple(parts))
    return dataclasses.replace(section, intro=(), finding="", missing=missing, command=command)


# Runs


def results_section(inputs: Inputs) -> Section:
    """Scores with the paper's beside them, and the gap closed."""
    tasks = dict.fromkeys(row.task for row in inputs.rows)
    paper = {task: published_scores(inputs.paper, task) for task in tasks}
    figures = [*(score_figure(rows) for rows in alike(inputs.rows)), gap_figure(inputs.rows, paper)]
    means = " and ".join(
        f"{100 * published.paper_gap_closed(inputs.paper, '2', s):.1f}% ({s})" for s in ("13B", "70B")
    )
    intro = [
        "Gap closed is (proxy - base) / (tuned - base), not capped; n/a where base and tuned do not differ "
        f"firmly. The paper's mean over the five columns of its table 2 is {means}."
    ]
    if any(row.forced for row in inputs.rows):
        intro.append("“Opener forced” is a control: the untuned base made to begin as a tuned model does.")
    if inputs.others:
        intro.append(
            f"{inputs.others} finished runs with other settings are not in these tables; all are listed "
            "under Runs."
        )
    parts = parts_of(figures, beside_table(inputs.rows, paper))
    return Section(
        "results", "Results", "Results, beside the paper's", tuple(intro), tuple(parts),
        finding=findings.on_results(inputs.rows),
    )  # fmt: skip


def price_section(inputs: Inputs) -> Section:
    """Score against memory and time."""
    drawn = [
        figure
        for rows in alike(inputs.rows)
        for figure in (price_figure(rows, "memory"), price_figure(rows, "time"))
    ]
    found = list(parts_of(drawn, shown=2))
    intro = (
        "The proxy needs three models at every step: memory is the weights and the KV cache at its fullest "
        "of all models that a role needs, and time is decoding time over generated tokens, all rows of a "
        "batch together.",
    )
    empty = Section(
        "price", "Price", "What a score costs", intro, finding=findings.on_price(inputs.rows)
    )  # fmt: skip
    return either(empty, found, "No run has recorded its memory and time", inputs.command("eval", "--as all"))


def runs_section(inputs: Inputs) -> Section:
    """Cost and provenance of every run."""
    root, found = inputs.root, inputs.found
    tables = (cost_table(root, found), *notes_table(root, found), systems_table(found), *made_table(found))
    return Section(
        "runs", "Runs", "Runs: cost, speed and provenance",
        ("Every finished run under the folder of results that this page was made from.",),
        (Part((), tables),), finding=findings.on_runs([run for _, run in found]),
    )  # fmt: skip


def training_sections(root: Path) -> list[Section]:
    """How the loss of every expert went that was tuned into this folder; none where none was."""
    found = find_trainings(root)
    drawn = [loss_figure(folder, record) for folder, record in found]
    parts = parts_of(drawn, trainings_table(root, found), shown=4)
    return [Section("tuning", "Tuning", "How the experts were tuned", (), tuple(parts))] if found else []


# Traces


def tokens_section(inputs: Inputs, found: Sequence[positions.Positions]) -> Section:
    """The token-level view; the page's script fills it from the embedded JSON."""
    intro = (
        "Every token of a response, shaded by how far the proxy moved its probability away from the base's. "
        "Hover over a token, or go through them with the arrow keys, to see what each model would choose.",
    )
    title = "Token by token"
    if not inputs.sets:
        return Section(
            "tokens", "Tokens", title, (), missing="No traced run of a proxy",
            command=inputs.command("eval", "--trace"),
        )  # fmt: skip
    return Section("tokens", "Tokens", title, intro, finding=findings.on_tokens(found))


def positions_section(inputs: Inputs, found: Sequence[positions.Positions]) -> Section:
    """Influence by position."""
    figures = [figure for one in found for figure in positions_figures(one)]
    parts = [Part(tuple(figures), (positions_table(found),))] if found else []
    intro = ("Where in a response the proxy chooses differently from the base (the paper's appendix C.2).",)
    empty = Section(
        "positions", "Position", "Influence by position", intro, finding=findings.on_positions(found)
    )
    return either(empty, parts, "No traced run of a proxy", inputs.command("eval", "--trace"))


def ngrams_section(inputs: Inputs) -> Section:
    """Influence by token."""
    ranked = [(chosen.run.spec.task, one) for chosen in inputs.sets if (one := _ngrams(chosen))]
    hateful = {chosen.run.spec.task for chosen in inputs.sets if facts_of(chosen.run).hateful}
    drawn = [(task, figure) for task, one in ranked if (figure := ngrams_figure(one, task))]
    plain = [figure for task, figure in drawn if task not in hateful]
    veiled = [figure for task, figure in drawn if task in hateful]
    parts = [*parts_of(plain, published_ngrams(inputs.paper)), *parts_of(veiled, sensitive=True)]
    if not drawn:
        parts = []
    intro = ("Which tokens the proxy makes more likely, and the phrase in which each mostly occurs (6.1).",)
    finding = findings.on_ngrams([(task, one) for task, one in ranked if task not in hateful])
    empty = Section("ngrams", "Words", "Influence by token and phrase", intro, finding=finding)
    return either(empty, parts, "No traced run of a proxy", inputs.command("eval", "--trace"))


def _ngrams(chosen: TraceSet) -> tokens.Ngrams | None:
    """The tokens of a traced run: by the paper's minimum count, or a lower one where that leaves too few."""
    for min_count in MIN_COUNTS:
        try:
            found = tokens.ngrams(chosen.folder, min_count=min_count, top=60)
        except UserError:
            continue  # no token is as frequent as that
        if len(found.rows) >= ENOUGH or min_count == MIN_COUNTS[-1]:
            return found
    return None


def equations_section(inputs: Inputs) -> Section:
    """Reasoning against arithmetic."""
    traced = [chosen.folder for chosen in inputs.sets if chosen.run.spec.task == "gsm"]
    found = [one for folder in traced if (one := attempt(tokens.equations, folder))]
    parts = list(parts_of([equations_figure(one) for one in found]))
    intro = (
        "Does the proxy change the reasoning (left of the equals sign) or the arithmetic (right of it)? "
        "(6.1) The paper's rule counts some tokens twice and stops at decimal points; the corrected one does "
        "not.",
    )
    empty = Section(
        "equations", "Equations", "Influence in equations", intro, finding=findings.on_equations(found)
    )
    system, _ = inputs.usual
    return either(
        empty, parts, "No traced gsm run of a proxy", f"proxytune eval gsm --system {system} --trace"
    )


def agreement_section(inputs: Inputs) -> Section:
    """Agreement with direct tuning."""
    traced = [
        folder
        for folder, run in inputs.found
        if run.spec.trace == "agreement" and run.spec.role in ("proxy", "tuned")
    ]
    found = [one for folder in traced if (one := attempt(agreement, folder)) and len(one.rows) >= 4]
    found.sort(key=lambda one: one.source.role != "proxy")
    figures = [figure for one in found for figure in agreement_figures(one)]
    on_proxy = 2 * sum(one.source.role == "proxy" for one in found)
    parts = list(parts_of(figures, shown=on_proxy or len(figures)))
    intro = (
        "How near the proxy comes to the directly tuned model, token by token: the divergence of the two "
        "distributions, and how often their first choices are the same.",
    )
    empty = Section(
        "agreement", "Agreement", "Agreement with direct tuning", intro,
        finding=findings.on_agreement(found),
    )  # fmt: skip
    command = inputs.command("eval", "--trace agreement")
    return either(empty, parts, "No run with an agreement trace (it needs a tuned model)", command)


# Sweeps


def alpha_section(inputs: Inputs) -> Section:
    """Score against alpha."""
    found = [
        one
        for folder in sweeps.find_sweeps(inputs.root)
        if (one := attempt(sweeps.sweep, folder)) and sum(p.value is not None for p in one.points) > 2
    ]
    parts = list(parts_of([figure for one in found for figure in sweep_figures(one)]))
    intro = ("Alpha 0 is the base alone, 1 the paper's setting (6.2).",)
    finding = findings.on_alpha(found)
    empty = Section("alpha", "Alpha", "The strength of the shift", intro, finding=finding)
    return either(empty, parts, "No sweep over alpha", inputs.command("sweep-alpha", "--alphas 0:2:0.2"))


def skip_section(inputs: Inputs) -> Section:
    """What ending the correction early does."""
    folders = [
        folder
        for folder in sweeps.find_sweeps(inputs.root)
        if any(path.parent == folder and run.spec.alpha.kind == "first" for path, run in inputs.found)
    ]
    found = [one for f in folders if (one := attempt(sweeps.skip, f, _control(inputs, f)))]
    drawn = sorted(
        (figure for one in found for figure in skip_figures(one)), key=lambda f: "score" not in f.name
    )
    parts = list(parts_of(drawn, shown=len(found)))
    intro = (
        "The later tokens change little: can the correction be left out there? The proxy steers the first t "
        "tokens only, then the base goes on alone.",
    )
    finding = findings.on_skip(found)
    empty = Section("skip", "Late skip", "Ending the correction early", intro, finding=finding)
    alphas = "--alphas 0,first:1,first:4,first:16,1"
    return either(empty, parts, "No sweep over schedules first:t", inputs.command("sweep-alpha", alphas))


def _control(inputs: Inputs, folder: Path) -> Path | None:
    """The base with a forced opener on the items of a sweep."""
    swept = [run for path, run in inputs.found if path.parent == folder]
    same = {(conditions(run), models_of(run)) for run in swept}
    for path, run in inputs.found:
        if run.spec.forced and run.spec.role == "base" and (conditions(run), models_of(run)) in same:
            return path
    return None


# Failures


def failures_section(inputs: Inputs) -> Section:
    """Base against proxy, item by item."""
    found = [one for pair in _pairs(inputs) if (one := attempt(failures.failures, *pair))]
    parts: list[Part] = []
    for sensitive in (False, True):
        own = [one for one in found if one.first.hateful is sensitive]
        parts += parts_of([], *failure_tables(own), sensitive=sensitive)
    if found:
        parts.append(Part((), (failure_counts(found),)))
    intro = (
        "Items that one of the two has right and the other wrong. McNemar's exact test asks whether they "
        "differ in how often.",
    )
    finding = findings.on_failures(found)
    title = "Where the proxy fails and the base does not"
    empty = Section("failures", "Failures", title, intro, finding=finding)
    command = inputs.command("eval", "--as all")
    return either(empty, parts, "No base and proxy on the same items", command)


def _pairs(inputs: Inputs) -> Iterator[tuple[Path, Path]]:
    """Per system and task a base and a proxy on the same items, with their predictions."""
    seen = set[tuple[str, str]]()
    usable = [
        (folder, run)
        for folder, run in sorted(inputs.found, key=plainness)
        if not run.spec.forced and (folder / PREDICTIONS).exists()
    ]
    for folder, run in usable:
        key = run.spec.system.name, run.spec.task
        if run.spec.role != "base" or key in seen:
            continue
        for other, proxy in usable:
            same = comparable((run, proxy)) and models_of(run) == models_of(proxy)
            if proxy.spec.role == "proxy" and same:
                seen.add(key)
                yield folder, other
                break
