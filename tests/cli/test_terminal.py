"""Text of others on a terminal: it is shown, never obeyed. In a file or a pipe, data is exact."""

from __future__ import annotations

import ast
import csv
import io
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table
from rich.text import Text

from proxytune.cli import app as cli
from proxytune.cli import console
from proxytune.cli.commands.generate import Speaker
from proxytune.records import Completion, TracedToken
from proxytune.terminal import WorkSoFar, json_text, say, show, visible, write_data
from proxytune.terminal.text import is_suspect
from tests.support import hostile
from tests.support.checkout import ROOT
from tests.support.command_line import proxytune
from tests.support.made_runs import response, token, write

pytestmark = pytest.mark.usefixtures("somewhere_else")

EVIL = (
    "\x1b[2J \x1b]0;title\x07 \x9b31m \r\x08\x7f \u202eevil\u202c \u2066x \ufeff \ud800 "
    "[/nope] [red] \\[/x] :bomb:"
)
"""Escape sequences in both forms, controls, marks of direction, half a surrogate pair, and markup."""
SHOWN = (
    "\u2039U+001B\u203a[2J \u2039U+001B\u203a]0;title\u2039U+0007\u203a \u2039U+009B\u203a31m "
    "\u2039U+000D\u203a\u2039U+0008\u203a\u2039U+007F\u203a \u2039U+202E\u203aevil\u2039U+202C\u203a "
    "\u2039U+2066\u203ax \u2039U+FEFF\u203a \u2039U+D800\u203a [/nope] [red] \\[/x] :bomb:"
)


class Screen(io.TextIOWrapper):
    """A stream that says that it is a terminal."""

    def __init__(self, encoding: str = "utf-8", *, terminal: bool = True) -> None:
        super().__init__(io.BytesIO(), encoding=encoding, newline="")
        self.terminal = terminal

    def isatty(self) -> bool:
        """As asked."""
        return self.terminal

    @property
    def text(self) -> str:
        """What was written."""
        self.flush()
        assert isinstance(self.buffer, io.BytesIO)
        return self.buffer.getvalue().decode(self.encoding)


@pytest.fixture(params=[True, False], ids=["terminal", "pipe"])
def out(request: pytest.FixtureRequest) -> Screen:
    """What stdout is to be: a terminal, and a pipe."""
    return Screen(terminal=request.param)


def unstyled(text: str) -> str:
    """Without the styles of our own tables: bold, dim, slanted, reverse."""
    return re.sub(r"\x1b\[(0|[12347](;[12347])*)m", "", text)


def test_what_is_suspect_is_written_out_and_nothing_else() -> None:
    assert visible(EVIL) == SHOWN and not any(map(is_suspect, visible(EVIL)))
    kept = "line\n\ttab é漢字 \U0001f468\u200d\U0001f469\u200d\U0001f467 \u0646\u0645\u06cc\u200c\u062e \xa0"
    assert visible(kept) == kept
    controls = [chr(code) for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"]
    assert all(map(is_suspect, controls))


def test_lines_for_a_person_are_written_out_everywhere(out: Screen, monkeypatch: pytest.MonkeyPatch) -> None:
    errors = Screen(terminal=out.terminal)
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", errors)
    show(EVIL)
    say(f"{EVIL}\nerror: forged")
    assert out.text == f"{SHOWN}\n"
    assert errors.text.endswith(" error: forged\n") and errors.text.count("\n") == 1
    assert not any(map(is_suspect, errors.text))


def test_data_is_exact_in_a_pipe_and_written_out_on_a_terminal(
    out: Screen, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", out)
    for piece in ("a\x1b", "[31m", "b\x9b", "2J\r\n", "\ud800"):  # sequences that are split over pieces
        write_data(piece)
    escaped = "a\u2039U+001B\u203a[31mb\u2039U+009B\u203a2J\u2039U+000D\u203a\n\u2039U+D800\u203a"
    assert out.text == (escaped if out.terminal else "a\x1b[31mb\x9b2J\r\n\\ud800")


def test_json_is_the_same_content_and_holds_nothing_to_obey(
    out: Screen, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", out)
    content = {EVIL: [EVIL, "\U000e0041 é漢字"]}
    console.print_json(content)
    assert json.loads(out.text) == content == json.loads(json_text(content))
    assert not any(map(is_suspect, out.text)) and "é漢字" in out.text


def test_an_encoding_that_lacks_a_letter_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen("ascii")
    monkeypatch.setattr(sys, "stdout", screen)
    console.print_json({"é": "漢\x1b"})
    assert json.loads(screen.text) == {"é": "漢\x1b"}
    screen = Screen("ascii")
    monkeypatch.setattr(sys, "stdout", screen)
    show("é \x1b")
    write_data("漢")
    table = Table("é")
    table.add_row("漢")
    console.show_table(table)
    assert screen.text.startswith("\\xe9 \\u2039U+001B\\u203a\n\\u6f22") and screen.text.count("\\u6f22") == 2


def test_tables_show_what_they_hold(out: Screen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.setattr(sys, "stdout", out)
    table = Table(title=EVIL, box=None, padding=0)
    table.add_column(f"column {EVIL}", overflow="fold", header_style="none")
    for cell in (EVIL, Text(EVIL), Text("plain")):
        table.add_row(cell)
    console.show_table(table)
    shown = unstyled(out.text)
    assert not any(map(is_suspect, shown)), shown
    words = "".join(shown.split())  # lines are broken where the width ends
    assert words.count("".join(SHOWN.split())) == 3 and "plain" in words
    assert words.count("[/nope][red]\\[/x]:bomb:") == 4


@dataclass
class HostileDecoder:
    """In place of a model: its text is escape sequences and markup, one sequence split over two pieces."""

    remarks = ()

    def work(self) -> WorkSoFar:
        """Nothing that costs money."""
        return WorkSoFar()

    def stream(self, examples: Any, sampling: Any, **options: Any) -> Iterator[Completion]:
        """The same response, whoever asks."""
        pieces = ("safe \x1b", "[31m red \x9b", "2J [/nope]")
        if (hear := options.get("on_text")) is not None:
            for piece in pieces:
                hear("0", 0, piece)
        traced = TracedToken("\x1b[2J[/nope]", 5, {}, {"base": "x"}, 1.0)
        for sample in range(sampling.n):
            yield Completion("0", sample, "".join(pieces), (5,), "length", 0.0, trace=(traced,))


def test_a_model_cannot_steer_the_terminal(out: Screen, monkeypatch: pytest.MonkeyPatch) -> None:
    """`generate` streams, prints several responses under each other, and the roles side by side."""
    monkeypatch.setattr(Speaker, "decoder", lambda *_: HostileDecoder())
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setenv("NO_COLOR", "1")
    text = "safe \x1b[31m red \x9b2J [/nope]\n"
    shown = visible(text) if out.terminal else text
    for options, expected in (((), shown), (("-n", "2"), f"--- 1\n{shown}--- 2\n{shown}")):
        out.truncate(out.seek(0))
        cli.app(["generate", "Ann \x1b[2J", *options], standalone_mode=False)
        assert out.text == expected
    out.truncate(out.seek(0))
    cli.app(["generate", "Ann", "--compare"], standalone_mode=False)
    left = unstyled(out.text)
    assert not any(map(is_suspect, left)) and left.count("\u2039U+001B\u203a") >= 5


def test_text_and_markup_of_others_in_every_command_that_reads_runs(tmp_path: Path) -> None:
    """Systems, questions, responses, tokens, metrics and file names, all of them hostile."""
    hostile.make_results(tmp_path / "results")
    tokens = [
        token(piece, 0.1, 0.4, kl=(0.1, 0.2), top_base="x") for piece in (EVIL, " 1", "+", "2", "=", "3", ".")
    ]
    said = response(f"{EVIL} 1+2=3.", reason="length", tokens=7)
    row = {"question": EVIL, "answer": EVIL, "responses": said, "scores": {EVIL: 1.0}}
    wrong = {**row, "scores": {EVIL: 0.0}}
    name = "run \x1b[31m[nope]\u202e"
    more = {"traces": [tokens], "trace": "agreement", "metric": EVIL.replace("\ud800", "")}
    proxy = write(tmp_path / name / "a" / "gsm" / "proxy", [row], **more)
    base = write(
        tmp_path / name / "a" / "gsm" / "base", [wrong], role="base", forced="\x1b[1m", metric=more["metric"]
    )
    commands: list[tuple[object, ...]] = [
        ("report", "results", "--examples", 12, "--show-hateful"),
        ("report", "results", "--examples", 12, "--markdown"),
        ("report", name, "--examples", 2),
        ("analyze", "positions", proxy),
        ("analyze", "ngrams", proxy, "--min-count", 1),
        ("analyze", "equations", proxy),
        ("analyze", "agreement", proxy),
        ("analyze", "failures", base, proxy, "--metric", EVIL),
        ("score", "gsm", f"{name}.jsonl"),
        ("report", name + "x"),
        ("eval", EVIL),
        ("eval", "gsm", "--system", EVIL),
        ("nope\x1b[31m",),
        ("eval", "gsm", "--limit", "\x1b[31m"),
    ]
    for command in commands:
        found = proxytune(*command)
        assert found.exception is None or isinstance(found.exception, SystemExit), (command, found.exception)
        assert not any(map(is_suspect, found.output)), (command, found.output)
        assert found.exit_code == 0 or found.stderr.splitlines()[-1].startswith("error: ")
    for command in commands[:8]:
        assert (found := proxytune(*command)).exit_code == 0, (command, found.stderr)


def test_csv_and_json_of_a_run_are_exact(tmp_path: Path) -> None:
    text = "\x1b[31m [/nope] \u202e"
    folder = write(
        tmp_path / "a",
        [{"question": text, "scores": {"exact_match": 1.0}, "responses": response(text)}],
    )
    other = write(tmp_path / "b", [{"scores": {"exact_match": 0.0}}])
    made = ("analyze", "failures", folder, other)
    [line] = csv.DictReader(io.StringIO(proxytune(*made, "--csv").stdout))
    [item] = json.loads(proxytune(*made, "--json").stdout)["items"]
    assert line["question"] == item["question"] == text


def test_progress_shows_names_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    from proxytune.terminal import WorkSoFar, progress

    drawn = Screen()
    monkeypatch.setattr(sys, "stderr", drawn)
    monkeypatch.setattr(
        progress,
        "Console",
        lambda **_: Console(file=drawn, force_terminal=True, width=200, color_system=None),
    )
    with progress.Progress("\x1b[31mred \x9b", "[/nope]\x1b[2K") as bar:
        bar.begin(2, 0, [1.0], WorkSoFar)
        bar.advance(1.0)
    assert "\x1b[31m" not in drawn.text and "\x9b" not in drawn.text
    assert "\u2039U+001B\u203a[31mred" in drawn.text and "[/nope]\u2039U+001B\u203a[2K" in drawn.text


# The source


DOORS = {"terminal/text.py", "cli/console.py"}
LIVE = {"terminal/progress.py", "tuning/training.py", "tuning/watch.py"}
"""Bars, which are drawn again and again: their texts go through `visible`."""
OWN_PROCESS = {"sandbox/worker.py", "decoding/template_worker.py"}
"""What runs in a process of its own, whose stdout is a channel."""


def prints(tree: ast.AST) -> Iterator[str]:
    """Calls that put text on a terminal."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        streams = called.startswith(("sys.stdout.", "sys.stderr.")) and not called.endswith(".isatty")
        methods = called.endswith((".print", ".echo", ".secho", ".print_exception"))
        if called in ("print", "rprint", "Console", "rich.print") or streams or methods:
            yield called


def test_nothing_else_prints() -> None:
    package = ROOT / "proxytune"
    found = {}
    for path in package.rglob("*.py"):
        name = path.relative_to(package).as_posix()
        if name not in DOORS | OWN_PROCESS and (calls := list(prints(ast.parse(path.read_text("utf-8"))))):
            found[name] = calls
    assert found == {name: ["Console"] for name in LIVE}, "print with show, say or write_data (terminal.py)"
    assert list(
        prints(ast.parse("print(1); sys.stdout.write('x'); screen.print(t); typer.echo('x'); Console()"))
    )
