"""`proxytune init`: files to start from, which work as they are."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from proxytune.cli import console
from proxytune.errors import UserError
from proxytune.run_files import disk_errors_in_one_line

init = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Files to start from, with comments: a task or a system of one's own. Nothing is overwritten.\n\n"
    "Example: proxytune init task",
)

TASK, ITEMS, SYSTEM = "my_task.py", "my_items.jsonl", "my_system.yaml"


@init.command()
def task(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The task's file, which ends in .py.")] = Path(
        TASK
    ),
) -> None:
    """Write a task of one's own and a few items for it. It works as it is; change it to what you need.

    Example: proxytune init task
    """
    _require_ending(file, ".py")
    items = file.with_name(f"{file.stem.removesuffix('_task')}_items.jsonl")
    names = {TASK: file, ITEMS: items}
    _write(names)
    console.show(f"wrote {file} and {items}")
    console.show(f"then: proxytune eval {_shown(file)} --system demo --data {shlex.quote(str(items))}")


@init.command()
def system(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="The system's file, which ends in .yaml.")
    ] = Path(SYSTEM),
) -> None:
    """Write a system of one's own, with the miniature models until you name yours.

    Example: proxytune init system
    """
    _require_ending(file, ".yaml", ".yml")
    _write({SYSTEM: file})
    console.show(f"wrote {file}")
    console.show(f"then: proxytune check {shlex.quote(str(file))}")


def _require_ending(file: Path, *endings: str) -> None:
    if file.suffix not in endings:
        raise UserError(f"'{file}' must end in {' or '.join(endings)}: by that a command knows a file")


def _shown(file: Path) -> str:
    """A path as a command names it: one that is no name of a task."""
    return shlex.quote(str(file) if len(file.parts) > 1 else f"./{file}")


def _write(files: Mapping[str, Path]) -> None:
    """Write templates under the names that they get here, by which they call each other. UserError, and
    nothing is written, where one is there already."""
    for path in files.values():
        if path.exists():
            raise UserError(f"'{path}' is there already, and stays as it is: name another FILE")
        if not path.parent.is_dir():
            raise UserError(f"no folder '{path.parent}' to write to")
    folder = Path(__file__).parent
    for template, path in files.items():
        text = (folder / template).read_text(encoding="utf-8")
        for name, other in files.items():
            text = text.replace(name, other.name)
        with disk_errors_in_one_line(path), path.open("x", encoding="utf-8") as out:
            out.write(text)
