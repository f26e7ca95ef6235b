"""What commands print and ask: JSON, tables, notes on stderr, and the consent to what costs money."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, cast

from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from proxytune.config import ModelSpec, System, load_system
from proxytune.errors import UserError
from proxytune.options import CodeOptions
from proxytune.records import Run
from proxytune.terminal import json_text, put, visible
from proxytune.terminal import say as say
from proxytune.terminal import show as show
from proxytune.terminal import write_data as write_data

if TYPE_CHECKING:
    from proxytune.models import Models
    from proxytune.runs import judging
    from proxytune.sandbox import Sandbox
    from proxytune.tasks import Task

NOT_ALLOWED = (
    "code is stored but not run, so there is no score: --allow-code-execution runs it in a sandbox (the same "
    "command with it, or `proxytune judge TASK RUN`, adds the verdicts to a finished run)"
)


def print_json(content: object) -> None:
    """The one JSON object of --json."""
    whole = (sys.stdout.encoding or "utf-8").lower().replace("-", "") == "utf8"
    put(sys.stdout, json_text(content, ascii_only=not whole) + "\n")


def console() -> Console:
    """stdout for tables: as wide as they are where it is no terminal. No text in them is markup."""
    width = None if sys.stdout.isatty() else 140
    return Console(width=width, markup=False, emoji=False, highlight=False)


def write_label(text: str) -> None:
    """A few words before what is written next on stdout, in bold where there are styles."""
    screen = console()
    with screen.capture() as drawn:
        screen.print(Text(visible(text), "bold"), end="")
    put(cast(TextIO, screen.file), drawn.get())


def show_table(table: Table, screen: Console | None = None) -> None:
    """Print a table, whatever its cells, its headings and its title hold; as records where the terminal is
    too narrow for the words in its columns."""
    _write_out(table)
    screen = screen or console()
    with screen.capture() as drawn:
        if _needed(table, screen) <= screen.width:
            screen.print(table)
        else:
            _print_records(table, screen)
    put(cast(TextIO, screen.file), drawn.get())


def _write_out(table: Table) -> None:
    """Write out what is suspect in a table."""
    for column in table.columns:
        column.header, column._cells = _plain(column.header), [_plain(cell) for cell in column._cells]
    table.title = None if table.title is None else _plain(table.title)


def _plain(cell: RenderableType) -> Text:
    """The text of a cell with what is suspect in it written out. Styles are lost with it."""
    if isinstance(cell, Text) and cell.plain == visible(cell.plain):
        return cell
    return Text(visible(str(cell)))


def print_table(columns: tuple[str, ...], rows: list[tuple[Any, ...]]) -> None:
    """A plain table that wraps in its cells."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    show_table(table)


def _print_records(table: Table, screen: Console) -> None:
    """A row under the other, each named by its first cell, or by its first two where the first is no name."""
    if table.title:
        screen.print(table.title, style="italic")
    cells = [[_text(screen, cell) for cell in column.cells] for column in table.columns]
    names = 2 if len({name.plain for name in cells[0]}) < len(cells[0]) else 1
    names = 0 if len(cells[0]) == 1 else names
    for row, own in zip(table.rows, zip(*cells, strict=True), strict=True):
        record = Table.grid(padding=(0, 2))
        record.add_column(style="dim", no_wrap=True)
        record.add_column(overflow="fold")
        for column, cell in list(zip(table.columns, own, strict=True))[names:]:
            if cell.plain:
                record.add_row(column.header, cell)
        if names:
            screen.print(Text(", ").join(own[:names]), style=row.style or "bold")
        screen.print(Padding(record, (0, 0, 1, 2), expand=False))


def _needed(table: Table, screen: Console) -> int:
    """The columns of a terminal in which no word of a table has to be broken."""
    edges = 3 * len(table.columns) + 1 if table.box is not None else 2 * len(table.columns)
    widths = []
    for column in table.columns:
        sizes = [
            _text(screen, cell).__rich_measure__(screen, screen.options)
            for cell in (column.header, *column.cells)
        ]
        widths.append(max(size.maximum if column.no_wrap else size.minimum for size in sizes))
    return sum(widths) + edges


def _text(screen: Console, cell: RenderableType) -> Text:
    """The words of a cell."""
    return cell if isinstance(cell, Text) else screen.render_str(str(cell))


def print_run(run: Run, folder: Path, *, json_only: bool) -> None:
    """One run: its metrics, its price, its folder."""
    if json_only:
        print_json(run.model_dump(mode="json"))
        return
    from proxytune.report import tables

    row = tables.role_rows([run])[0]
    remark = "" if run.spec.remark is None else f" ({run.spec.remark})"
    show(f"{run.spec.system.name} as {run.spec.role} on {run.spec.task}: {run.n} examples{remark}")
    for name, metric in sorted(run.metrics.items(), key=lambda pair: pair[0] != run.headline):
        figure = tables.figure(name, metric)
        show(f"  {name:22} {figure:28} {tables.coverage(name, metric, run.n)}".rstrip())
    cost, memory = run.cost, tables.size(row.memory)
    if cost.process_peak:
        memory += f" (the process {tables.size(cost.process_peak)})"
    if row.ms_per_token is not None:
        prefill = f", prompts {cost.prefill_seconds:.1f} s" if cost.prefill_seconds else ""
        show(
            f"  {cost.generated_tokens} tokens in {cost.decode_seconds:.1f} s ({row.ms_per_token:.2f} ms "
            f"each){prefill}, memory {memory}"
        )
    if row.ms_per_item is not None:
        show(f"  {run.n} items in {cost.seconds:.1f} s ({row.ms_per_item:.1f} ms each), memory {memory}")
    if run.cost.acceptance is not None and run.cost.tokens_per_step is not None:
        show(
            f"  speculation: {run.cost.acceptance:.0%} of drafts accepted, "
            f"{run.cost.tokens_per_step:.2f} tokens per step"
        )
    show(f"stored in {folder}")


def read_system(name: str, vocab: str | None = None) -> System:
    """The system, with --vocab applied."""
    system = load_system(name)
    if vocab is None:
        return system
    if vocab not in ("strict", "intersect"):
        raise UserError(f"--vocab '{vocab}' must be strict or intersect")
    return system.model_copy(update={"vocab": vocab})


def show_loading(name: str, spec: ModelSpec) -> None:
    """Print on stderr which model is being loaded."""
    say(f"loading {name}: {spec.model or spec.adapter}")


def models_of(system: System, *, trust_remote_code: bool = False) -> Models:
    """The models of a system, each named on stderr when it is loaded."""
    from proxytune.models import Models

    return Models(system, trust_remote_code=trust_remote_code, on_load=show_loading)


def sandbox_for(task: Task, code: CodeOptions) -> Sandbox | None:
    """The sandbox that was allowed, named on stderr."""
    from proxytune.runs import verdicts

    found = verdicts.open_sandbox(task, code)
    if found is not None:
        name_sandbox(found)
    return found


def name_sandbox(sandbox: Sandbox) -> None:
    """Name on stderr the sandbox in which code will run, and what it does not keep in."""
    say(f"code runs in the sandbox '{sandbox.backend}'")
    if sandbox.warning:
        say(f"warning: {sandbox.warning}")


def asked_on_terminal() -> bool:
    """Whether the user goes on."""
    say("go on? [y/N] ", end="")
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def dialogue() -> judging.Dialogue:
    """How judging reports and asks: on stderr, with a question where there is a terminal."""
    from proxytune.runs import judging

    ask = asked_on_terminal if sys.stdin.isatty() else None
    return judging.Dialogue(note=say, ask=ask, on_progress=judging_progress())


def judging_progress() -> Callable[[int, int], None]:
    """Prints on stderr how far judging is, ten times at most."""
    shown = 0

    def show(done: int, total: int) -> None:
        nonlocal shown
        if 10 * done // total > shown:
            shown = 10 * done // total
            say(f"judged {done}/{total}")

    return show
