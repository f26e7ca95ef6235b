"""The command line, in this process and in one of its own."""

from __future__ import annotations

import subprocess
import sys

from typer.testing import CliRunner, Result

from proxytune.cli import app as cli
from tests.support.checkout import environment


def proxytune(*arguments: object, stdin: str = "") -> Result:
    """Run a command in this process."""
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments], input=stdin)


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python code in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment()
    )


def refused(result: Result, *parts: str) -> str:
    """Check that a command ended with code 2 and one line that holds all `parts`."""
    assert result.exit_code == 2, (result.exit_code, result.output, result.exception)
    line = result.stderr.splitlines()[-1]
    assert line.startswith("error: ") and result.stdout == ""
    assert [text for text in result.stderr.splitlines() if not text.startswith(("loading ", "note: "))] == [
        line
    ]
    for part in parts:
        assert part in line
    return line
