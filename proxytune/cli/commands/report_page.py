"""The body of `report --html` and `report --figures`."""

from __future__ import annotations

from pathlib import Path

from proxytune.cli.commands.show import ReportRequest
from proxytune.errors import UserError


def report(root: Path, asked: ReportRequest, *, html: Path | None, figures: Path | None) -> None:
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

    from proxytune.cli.commands import show as cli_show
    from proxytune.report.page import Report

    made = Report.read(root)
    if html is not None:
        made.write_html(html)
    paths = [] if figures is None else made.write_figures(figures)
    if asked.markdown:
        cli_show.report(root, asked)
        for path, figure in zip(paths, made.figures if paths else [], strict=True):
            print(f"![{figure.title}]({path.as_posix()})\n")
        return
    if html is not None:
        print(f"wrote {html} ({html.stat().st_size / 1e6:.1f} MB)")
    if figures is not None:
        print(f"wrote {len(paths)} figures in {figures}")
