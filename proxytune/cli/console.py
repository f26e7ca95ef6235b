"""What commands print and ask: JSON, tables, notes on stderr, and the consent to what costs money."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from proxytune.config import ModelSpec, System, load_system
from proxytune.errors import UserError
from proxytune.options import CodeOptions
from proxytune.records import Run

if TYPE_CHECKING:
    from proxytune.models import Models
    from proxytune.runs import judging
    from proxytune.sandbox import Sandbox
    from proxytune.tasks import Task

NOT_ALLOWED = (
    "code is stored but not run, so there is no score: --allow-code-execution runs it in a sandbox (the same "
    "command with it, or `proxytune judge TASK RUN`, adds the verdicts to a finished run)"
)


def say(line: str) -> None:
    """One line on stderr."""
    print(line, file=sys.stderr, flush=True)


def print_json(content: object) -> None:
    """The one JSON object of --json."""
    print(json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False))


def console() -> Console:
    """stdout for tables: as wide as they are where it is no terminal."""
    return Console() if sys.stdout.isatty() else Console(width=140)


def print_table(columns: tuple[str, ...], rows: list[tuple[Any, ...]]) -> None:
    """A plain table that wraps in its cells."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))
    console().print(table)


def print_run(run: Run, folder: Path, *, json_only: bool) -> None:
    """One run: its metrics, its price, its folder."""
    if json_only:
        print_json(run.model_dump(mode="json"))
        return
    from proxytune.report import tables

    row = tables.role_rows([run])[0]
    remark = "" if run.spec.remark is None else f" ({run.spec.remark})"
    print(f"{run.spec.system.name} as {run.spec.role} on {run.spec.task}: {run.n} examples{remark}")
    for name, metric in sorted(run.metrics.items(), key=lambda pair: pair[0] != run.headline):
        figure = tables.figure(name, metric)
        print(f"  {name:22} {figure:28} {tables.coverage(name, metric, run.n)}".rstrip())
    cost, memory = run.cost, tables.size(row.memory)
    if cost.process_peak:
        memory += f" (the process {tables.size(cost.process_peak)})"
    if row.ms_per_token is not None:
        prefill = f", prompts {cost.prefill_seconds:.1f} s" if cost.prefill_seconds else ""
        print(
            f"  {cost.generated_tokens} tokens in {cost.decode_seconds:.1f} s ({row.ms_per_token:.2f} ms "
            f"each){prefill}, memory {memory}"
        )
    if row.ms_per_item is not None:
        print(f"  {run.n} items in {cost.seconds:.1f} s ({row.ms_per_item:.1f} ms each), memory {memory}")
    if run.cost.acceptance is not None and run.cost.tokens_per_step is not None:
        print(
            f"  speculation: {run.cost.acceptance:.0%} of drafts accepted, "
            f"{run.cost.tokens_per_step:.2f} tokens per step"
        )
    print(f"stored in {folder}")


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
    """Name on stderr the sandbox in which code will run."""
    say(f"code runs in the sandbox '{sandbox.backend}'")


def asked_on_terminal() -> bool:
    """Whether the user goes on."""
    print("go on? [y/N] ", end="", file=sys.stderr, flush=True)
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
