"""Tables and the progress line where a terminal has 60 columns."""

from __future__ import annotations

import io

import pytest
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from proxytune.cli import console
from proxytune.report import tables
from proxytune.terminal import Progress, WorkSoFar
from tests.support.reports import run


def printed(table: Table, width: int) -> str:
    """What a terminal of that width shows."""
    file = io.StringIO()
    console.show_table(table, Console(width=width, file=file))
    return file.getvalue()


def rows() -> list[tables.RoleRow]:
    """Three roles of a system."""
    return tables.role_rows([run("base", 0.1), run("proxy", 0.82), run("tuned", 0.9)])


def test_a_table_that_fits_is_a_table() -> None:
    assert "┃ as    ┃" in printed(tables.rich_table(rows()), 100)


def test_a_table_that_does_not_fit_is_records() -> None:
    text = printed(tables.rich_table(rows()), 60)
    lines = text.splitlines()
    assert "┃" not in text and max(map(len, lines)) <= 60
    assert [line for line in lines if line and not line.startswith(" ")] == [
        "gsm: exact_match, %", "base", "proxy", "tuned",
    ]  # fmt: skip
    proxy = text.partition("\nproxy")[2].partition("\ntuned")[0]
    for cell in rows()[1].cells[2:]:
        assert f"  {cell}" in proxy, cell
    assert "gap closed" not in text.partition("\nproxy")[0], "what is empty has no line"


def test_records_are_named_apart_and_show_markup() -> None:
    table = Table("system", "as", "note")
    for role in ("base", "proxy"):
        table.add_row("one", role, Text("[red]not red[/red] " + "word" * 12))
    text = printed(table, 40)
    assert "one, base\n" in text and "one, proxy\n" in text and "[red]not red[/red]" in text
    assert max(map(cell_len, text.splitlines())) <= 40


def test_a_single_row_has_no_name() -> None:
    table = Table("base", "proxy")
    table.add_row("some words", "w" * 50)
    lines = printed(table, 40).splitlines()
    assert lines[0].rstrip() == "  base   some words" and lines[1].startswith("  proxy  www")


def test_a_plain_table_wraps_as_long_as_no_word_is_broken() -> None:
    table = Table("name", "what", box=None)
    table.add_row("one", "some words that wrap in their cell, however many of them there are")
    table.add_row("two", "others")
    assert printed(table, 40).splitlines()[0].split() == ["name", "what"]
    table.add_row("three", "x" * 50)
    assert "three\n  what  xxx" in printed(table, 40)


@pytest.mark.parametrize(
    ("title", "metric", "shown"),
    [
        ("demo gsm", "acc", "/4000, 0:06 left, acc 1.000"),
        ("demo gsm as proxy with several words", "reference_accuracy", "/4000, 0:06 left"),
    ],
)
def test_the_progress_line_keeps_its_bar(
    title: str, metric: str, shown: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "60")
    work = WorkSoFar(open=((10, 30), (40, 50)), decode_seconds=10.0)
    with Progress(title, metric) as state:
        state.begin(4000, 1200, [1.0], lambda: work)
        state.advance(1.0)
    drawn = Text.from_ansi(capsys.readouterr().err.splitlines()[0].rpartition("\x1b[2K")[2]).plain
    assert drawn.count("━") + drawn.count("╸") == 12 and shown in drawn and title[:20] in drawn
    assert cell_len(drawn) <= 60


def test_what_does_not_fit_goes_in_order() -> None:
    state = Progress("demo gsm", "exact_match")
    work = WorkSoFar(open=((10, 30), (40, 50)), decode_seconds=10.0)
    state.total, state.done, state.scores, state.work = 40, 12, [1.0], lambda: work
    whole = "12/40, 5 tokens/s, 0:06 left, exact_match 1.000"
    found = [state.line(room=room) for room in (len(whole), len(whole) - 1, 30, 5)]
    assert found == [whole, "12/40, 0:06 left, exact_match 1.000", "12/40, 0:06 left", "12/40"]
