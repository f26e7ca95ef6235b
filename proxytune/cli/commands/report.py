"""`proxytune report`: the stored runs as tables, as a page, as figures."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from proxytune.cli.console import show, show_table
from proxytune.errors import UserError
from proxytune.records import Run
from proxytune.run_files import write_atomically

if TYPE_CHECKING:
    from proxytune.paper import recipes

DEMO_TABLE = re.compile(r"(<!-- demo-table -->\n).*?(<!-- /demo-table -->)", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class TableOptions:
    """How the tables of a report are shown."""

    markdown: bool = False
    write: bool = False
    paper: bool = False
    examples: int = 0
    show_hateful: bool = False


def report(
    results: Annotated[Path, typer.Argument(help="A folder of results.")] = Path("results"),
    html: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write one page that needs nothing else: tables, curves, tokens."),
    ] = None,
    figures: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write every figure as an SVG file into this folder.")
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown instead of tables.")] = False,
    write: Annotated[
        bool,
        typer.Option(
            "--write", help="Write RESULTS/README.md, and the table in README.md where it has a place for it."
        ),
    ] = False,
    paper: Annotated[
        bool,
        typer.Option(
            "--paper",
            help="Also the paper's tables, with our figures beside its own; without this only where a system "
            "of the paper was run.",
        ),
    ] = False,
    examples: Annotated[
        int,
        typer.Option(help="Also the responses of each role to the first N examples of every task.", min=0),
    ] = 0,
    show_hateful: Annotated[
        bool, typer.Option("--show-hateful", help="Show ToxiGen's texts, which are hidden otherwise.")
    ] = False,
) -> None:
    """The stored runs as tables (score, gap closed, memory and time per token of every role), or as a page
    with figures and a token-level view. Only runs on the same items, with the same sampling and judge, stand
    in one table.

    Example: proxytune report results --html report.html
    """
    shown = TableOptions(
        markdown=markdown, write=write, paper=paper, examples=examples, show_hateful=show_hateful
    )
    if html is not None or figures is not None:
        print_page(results, shown, html=html, figures=figures)
    else:
        print_tables(results, shown)


def print_page(root: Path, asked: TableOptions, *, html: Path | None, figures: Path | None) -> None:
    """Write the page and the figures of the runs under `root`; with --markdown, print the tables with the
    figures under them."""
    if not root.is_dir():
        raise UserError(f"no folder '{root}': `proxytune eval` makes it, or name another")
    if asked.write:
        raise UserError("--write is for README files: give it without --html and --figures")
    if html is not None and html.is_dir():
        raise UserError(
            f"--html '{html}' is a folder: name the file to write, such as {html / 'report.html'}"
        )

    from proxytune.report import escape, page

    made = page.Report.read(root)
    if html is not None:
        made.write_html(html)
    paths = [] if figures is None else made.write_figures(figures)
    if asked.markdown:
        print_tables(root, asked)
        for path, figure in zip(paths, made.figures if paths else [], strict=True):
            show(f"![{escape.in_markdown(figure.title)}]({path.as_posix()})\n")
        return
    if html is not None:
        show(f"wrote {html} ({html.stat().st_size / 1e6:.1f} MB)")
    if figures is not None:
        show(f"wrote {len(paths)} figures in {figures}")


def print_tables(root: Path, asked: TableOptions) -> None:
    """The finished runs under `root`: tables on stdout, or README.md files."""
    from proxytune.paper import published
    from proxytune.report import escape, paper_tables, tables

    if not root.is_dir():
        raise UserError(f"no folder '{root}': `proxytune eval` makes it, or name another")
    if asked.write:
        runs = [run for _, run in tables.main_runs(_published(root))[0]]
        write_atomically(
            root / "README.md", paper_tables.results_readme(published.read_paper(), runs).encode()
        )
        show(f"wrote {root / 'README.md'}")
        _write_demo_table(Path("README.md"), runs)
        return
    found, others = tables.main_runs(root)
    if not found:
        raise UserError(f"no finished run in '{root}': `proxytune eval` makes one")
    for own in tables.alike(tables.role_rows([run for _, run in found])):
        if asked.markdown:
            show(f"### {escape.in_markdown(tables.title(own))}\n\n{tables.markdown_table(own)}")
        else:
            show_table(tables.rich_table(own))
    print_beside_paper([run for _, run in found], as_markdown=asked.markdown, asked=asked.paper)
    _print_examples(found, asked)
    if others:
        show(f"{others} finished runs with other settings are not shown: name their folder to see them")


def print_beside_paper(
    runs: Sequence[Run], *, as_markdown: bool, asked: bool = False, only: recipes.Recipe | None = None
) -> None:
    """The paper's tables that runs of its systems belong to, or, where they were asked for, any of these
    runs; with our figures beside the paper's."""
    from proxytune.paper import published, recipes
    from proxytune.report import escape
    from proxytune.report import paper_tables as beside

    paper, by_key = published.read_paper(), recipes.runs_by_key(runs)
    for recipe in beside.compared(paper, by_key, asked=asked) if only is None else [only]:
        if as_markdown:
            show(f"### {beside.title(recipe)}\n\n{beside.markdown_side_by_side(recipe, paper, by_key)}")
        else:
            show_table(beside.rich_side_by_side(recipe, paper, by_key))
        if line := beside.gaps(recipe, paper, by_key):
            show(f"{escape.in_markdown(line) if as_markdown else line}\n")


def _print_examples(found: Sequence[tuple[Path, Run]], asked: TableOptions) -> None:
    """Responses of every role to the first examples of each task."""
    if not asked.examples:
        return
    from proxytune.report import examples

    for shown in examples.examples(found, asked.examples, show_hateful=asked.show_hateful):
        if asked.markdown:
            show(examples.markdown_example(shown))
        else:
            show_table(examples.rich_example(shown))


def _published(root: Path) -> Path:
    """The folder with the runs that the README files are about. In the checkout they have a folder of their
    own, so that other runs never mix with them."""
    own = root / "published"
    return own if own.is_dir() else root


def _write_demo_table(path: Path, runs: Sequence[Run]) -> None:
    """Put the demo's table between the markers of the README, where there are markers."""
    from proxytune.report import tables

    text = path.read_text(encoding="utf-8") if path.exists() else ""
    if not DEMO_TABLE.search(text) or all(run.spec.system.name != "demo" for run in runs):
        return
    filled = DEMO_TABLE.sub(lambda match: match[1] + tables.readme_table(runs) + match[2], text)
    write_atomically(path, filled.encode())
    show(f"wrote the demo table in {path}")
