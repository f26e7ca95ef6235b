"""The tables that `proxytune analyze` prints."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from proxytune.analysis import Analysis
from proxytune.analysis import failures as analysis_failures
from proxytune.analysis import positions as analysis_positions
from proxytune.analysis import sweeps as analysis_sweep
from proxytune.analysis import tokens as analysis_tokens
from proxytune.cli.console import print_json, show, show_table, write_data
from proxytune.errors import UserError
from proxytune.records import UNSCORED, Metric
from proxytune.report import tables

WIDTH = 300
"""Characters of a text that a table shows."""


def positions(run: Path, *, json_only: bool, csv_only: bool) -> None:
    """`analyze positions`."""
    found = analysis_positions.positions(run)
    if _printed(found, json_only, csv_only):
        return
    paper = (
        "" if found.paper_changed is None else f" (the paper, of its models: {100 * found.paper_changed:.1f})"
    )
    table = _table(
        f"{found.source.title}: influence by position", "position", "tokens", "changed, %", "shift"
    )
    for row in found.bands:
        table.add_row(_range(row.first, row.last), str(row.n), tables.percent(row.changed), number(row.shift))
    show_table(table)
    show(f"changed over all {found.tokens} tokens, %: {tables.percent(found.changed)}{paper}")
    show(f"mean shift over all tokens: {number(found.shift)}")
    show("changed: the proxy's first choice is not the base's. shift: p_proxy - p_base of the chosen token.")


def ngrams(
    run: Path, min_count: int, top: int, words: str | None, *, json_only: bool, csv_only: bool
) -> None:
    """`analyze ngrams`."""
    if words is None and run.is_file():
        raise UserError(
            f"'{run}' is a file of predictions, without a trace: say which --words (paper, or A,B)"
        )
    given = analysis_tokens.paper_words() if words == analysis_tokens.PAPER else None
    if words is not None and given is None:
        given = [word for word in words.split(",") if word]
    found = analysis_tokens.ngrams(run, min_count=min_count, top=top, words=given)
    if _printed(found, json_only, csv_only):
        return
    title = str(run) if found.source is None else found.source.title
    columns = ["token", "n", "mean shift", "most common 4-gram", *(["the paper's"] if given else [])]
    table = _table(f"{title}: most promoted tokens and their phrases", *columns)
    for row in found.rows:
        shift = "" if row.shift is None else number(row.shift)
        cells = [_text(row.token), str(row.n or ""), shift, _text(row.phrase)]
        table.add_row(*cells, *([_text(row.paper or "")] if given else []))
    show_table(table)
    compared = [row for row in found.rows if given and row.paper is not None]
    if compared:
        equal = sum(row.phrase == row.paper for row in compared)
        show(f"{equal} of {len(compared)} rows equal the paper's")


def equations(run: Path, *, json_only: bool, csv_only: bool) -> None:
    """`analyze equations`."""
    found = analysis_tokens.equations(run)
    if _printed(found, json_only, csv_only):
        return
    columns = ("rule", "left: tokens", "mean shift", "right: tokens", "mean shift", "Welch's t", "df", "p")
    table = _table(f"{found.source.title}: equations", *columns)
    for row in found.rows:
        sides = [cell for side in (row.left, row.right) for cell in (str(side.tokens), _mean(side))]
        tested = (row.t, row.df, row.p)
        table.add_row(row.rule, *sides, *("n/a" if value is None else f"{value:.4g}" for value in tested))
    show_table(table)
    show(f"{found.responses_with} of {found.responses} responses hold an equation (corrected rule)")


def _mean(side: analysis_tokens.Side) -> str:
    return "n/a" if side.mean is None else f"{side.mean:.3f}"


def skip(sweep: Path, control: Path | None, *, json_only: bool, csv_only: bool) -> None:
    """`analyze skip`."""
    found = analysis_sweep.skip(sweep, control)
    if _printed(found, json_only, csv_only):
        return
    source = found.source
    table = _table(f"{source.system} {source.task}: late skip", "corrected", *_curve_columns(found.metric))
    for point in found.points:
        named = "all tokens" if point.until is None else f"first {point.until}" if point.until else "none"
        table.add_row(named, *_curve_cells(found.metric, point))
    if found.control is not None:
        cells = _curve_cells(found.metric, found.control)
        table.add_row(_text(f"none, opener {found.forced!r} forced"), *cells)
    show_table(table)
    show(f"loops: {LOOPS}")


def sweep_table(found: analysis_sweep.Sweep) -> None:
    """The curve of a sweep, and the paper's points for TruthfulQA."""
    judged = any(point.truth is not None for point in found.points)
    source = found.source
    columns = ["alpha", *_curve_columns(found.metric), *(["true, %", "informative, %"] if judged else [])]
    table = _table(f"{source.system} {source.task}: score against alpha", *columns)
    for point in found.points:
        pair = [("" if m is None else tables.percent(m)) for m in (point.truth, point.info)] if judged else []
        table.add_row(point.alpha, *_curve_cells(found.metric, point), *pair)
    show_table(table)
    show(f"loops: {LOOPS}")
    if judged and found.paper:
        printed = (f"{p.alpha:g}: {100 * p.truth:.1f} / {100 * p.info:.1f}" for p in found.paper)
        show(f"the paper, 13B, alpha: true / informative, %: {'; '.join(printed)}")


LOOPS = (
    f"responses that end in {analysis_sweep.REPEATS} or more copies of the same words "
    f"({analysis_sweep.LOOP_UNITS} words or marks at least)"
)


def agreement(run: Path, *, json_only: bool, csv_only: bool) -> None:
    """`analyze agreement`."""
    found = analysis_positions.agreement(run)
    if _printed(found, json_only, csv_only):
        return
    table = _table(
        f"{found.source.title}: agreement with the tuned model on these outputs",
        *("position", "tokens", "KL(tuned || proxy): median", "mean", "KL(tuned || base): median", "mean"),
        *("same first choice: proxy, %", "base, %"),
    )
    for row in found.bands:
        table.add_row(*_agreement_cells(row))
    show_table(table)
    show(
        f"over all {found.tokens} tokens: KL(tuned || proxy) {number(found.kl_proxy)}, KL(tuned || base) "
        f"{number(found.kl_base)} nats; same first choice: proxy {tables.percent(found.same_proxy)}%, base "
        f"{tables.percent(found.same_base)}%"
    )
    paper, first = found.paper_first_step, found.first_step
    show(
        f"medians at the first step: proxy {first.kl_proxy.median:.3f}, base {first.kl_base.median:.3f} "
        f"(the authors, AlpacaFarm 13B: {paper['proxy']:.3f}, {paper['base']:.3f})"
    )


def _agreement_cells(row: analysis_positions.AgreementRow) -> Sequence[str]:
    kls = [f"{value:.3f}" for kl in (row.kl_proxy, row.kl_base) for value in (kl.median, kl.mean)]
    same = [tables.percent(row.same_proxy), tables.percent(row.same_base)]
    return (_range(row.first, row.last), str(row.n), *kls, *same)


def failures(
    first: Path, second: Path, metric: str | None, most: int, *, json_only: bool, csv_only: bool
) -> None:
    """`analyze failures`."""
    found = analysis_failures.failures(first, second, metric)
    if _printed(found, json_only, csv_only):
        return
    names = {"first": f"first: {found.first.title}", "second": f"second: {found.second.title}"}
    over = f"{found.n}" if found.n == found.of else f"{found.n} of {found.of}"
    table = _table(f"{found.metric} on {over} items", "", "second right", "second wrong")
    table.add_row("first right", str(found.both_right), str(found.only_first))
    table.add_row("first wrong", str(found.only_second), str(found.both_wrong))
    show_table(table)
    show("\n".join(names.values()))
    show(f"McNemar's exact test: p = {found.p:.3g}")
    for kind, count in (("first", found.only_first), ("second", found.only_second)):
        items = [item for item in found.items if item.right == kind][:most]
        if not items:
            continue
        title = f"only the {kind} is right: {len(items)} of {count} items"
        listed = _table(title, "id", "question", "first", "second", "answer", lines=True)
        for item in items:
            listed.add_row(*map(_text, (item.id, item.question, item.first, item.second, item.answer)))
        show_table(listed)


# Cells


def _printed(found: Analysis, json_only: bool, csv_only: bool) -> bool:
    """Print the machine-readable form where it was asked for; -> whether it was."""
    if json_only and csv_only:
        raise UserError("--json and --csv both want stdout: give one of them")
    if json_only:
        print_json(found.model_dump(mode="json"))
    elif csv_only:
        write_data(found.csv())
    return json_only or csv_only


def _table(title: str, *columns: str, lines: bool = False) -> Table:
    """A table whose first column is text, and the others too where they hold phrases."""
    table = Table(title=title, title_justify="left", show_lines=lines)
    for index, column in enumerate(columns):
        words = lines or index == 0 or column.endswith(("4-gram", "paper's"))
        table.add_column(column, justify="left" if words else "right", overflow="fold")
    return table


def _text(text: str) -> str:
    """Model output, cut where it is long."""
    return text if len(text) <= WIDTH else text[: WIDTH - 3] + "..."


def number(metric: Metric) -> str:
    """A number with its interval."""
    if metric.low is None or metric.high is None:
        return f"{metric.value:.3f}"
    return f"{metric.value:.3f} [{metric.low:.3f}, {metric.high:.3f}]"


def _range(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"


def _curve_columns(metric: str) -> tuple[str, ...]:
    named = "score" if metric in UNSCORED else f"{metric}, %"
    return (named, "loops, %", "tokens", "n")


def _curve_cells(metric: str, point: analysis_sweep.SweepPoint) -> tuple[str, ...]:
    length = "" if point.tokens is None else f"{point.tokens.value:.1f}"
    loops = "" if point.loops is None else tables.percent(point.loops)
    return (tables.scored(metric, point.score), loops, length, tables.examples(point.score, point.n))
