"""Write docs/cli.md from the commands themselves, so that it is what `--help` prints.

python docs/make_cli.py            # write it
python docs/make_cli.py --check    # exit code 1 if the committed file is another one
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from proxytune.cli.app import app

TARGET = Path(__file__).parent / "cli.md"
WIDTH = 100
HEAD = """# The command line

Written by `make docs` from the commands themselves; do not edit. `proxytune COMMAND --help` shows the same.

Exit codes: 0 done; 2 a user error, in one line; 1 a bug, with its traceback; 130 interrupted (what is
finished is kept). `--json` prints one JSON object on stdout and nothing else; progress goes to stderr.
"""


def commands(group: Any, path: str = "proxytune") -> Iterator[tuple[str, Any]]:
    """Every command under its full name, in the order of `--help`; groups before what they contain."""
    for name, command in group.commands.items():
        if command.hidden:
            continue
        full = f"{path} {name}"
        yield full, command
        if hasattr(command, "commands"):
            yield from commands(command, full)


def wrapped(words: str, indent: int, first: str = "") -> str:
    """A paragraph in lines of `WIDTH`, indented; `first` comes before it."""
    gap = " " * indent
    filled = textwrap.fill(
        " ".join(words.split()),
        WIDTH,
        initial_indent=gap,
        subsequent_indent=gap,
        break_on_hyphens=False,
        break_long_words=False,
    )
    if len(first) > indent:
        return f"{first.rstrip()}\n{filled}"
    return first.ljust(indent) + filled[indent:]


def lines_of(param: Any, context: Any) -> str:
    """One option or argument with its help, as `--help` has it."""
    names, text = param.get_help_record(context)
    return wrapped(text, 32, f"  {names} ")


def section(full: str, command: Any) -> str:
    """One command: what it does, its arguments, its options in their groups."""
    context = typer.Context(command, info_name=full)
    paragraphs = [part for part in (command.help or "").strip().split("\n\n") if part.strip()]
    prose = [p for p in paragraphs if not p.lstrip().startswith("Example:")]
    examples = [" ".join(p.split()).removeprefix("Example: ") for p in paragraphs if p not in prose]
    shown = [example.partition(", where ") for example in examples]
    parts = [f"## {full}", *(wrapped(p, 0) for p in prose)]
    for example, _, where in shown:
        parts += [f"```bash\n{example}\n```", *([wrapped(f"Here {where}.", 0)] if where else [])]
    groups: dict[str, list[str]] = {}
    for param in command.params:
        if param.name == "help" or param.get_help_record(context) is None:
            continue
        kind = "Arguments" if param.param_type_name == "argument" else "Options"
        panel = getattr(param, "rich_help_panel", None) or kind
        groups.setdefault(panel, []).append(lines_of(param, context))
    body = "\n\n".join("\n".join([f"{panel}:", *lines]) for panel, lines in groups.items())
    return "\n\n".join([*parts, *([f"```text\n{body}\n```"] if body else [])]) + "\n"


def page() -> str:
    """The whole page."""
    found = list(commands(typer.main.get_command(app)))
    rows = [f"- [`{full}`](#{full.replace(' ', '-')}): {short(command)}" for full, command in found]
    return "\n".join([HEAD, *rows, "", *(section(full, command) for full, command in found)])


def short(command: Any) -> str:
    """The first sentence of a command's help."""
    return " ".join((command.help or "").split("\n\n")[0].split()).split(". ")[0].rstrip(".") + "."


def main(arguments: list[str]) -> int:
    """Write the page, or compare it with the committed one."""
    if arguments == ["--check"]:
        same = TARGET.exists() and TARGET.read_text(encoding="utf-8") == page()
        print(f"{TARGET.name} is {'current' if same else 'not current: run `make docs`'}")
        return 0 if same else 1
    TARGET.write_text(page(), encoding="utf-8")
    print(f"wrote {TARGET}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
