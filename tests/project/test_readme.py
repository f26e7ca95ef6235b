"""The README does what it says: its blocks marked `demo` are run, in order, in an empty folder."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from proxytune.cli.app import app
from tests.support.checkout import ROOT, environment
from tests.support.require import require_demo

README = (ROOT / "README.md").read_text(encoding="utf-8")
WEIGHTS = ROOT / "proxytune" / "demo" / "weights" / "base"


def blocks(kind: str) -> list[str]:
    """The code blocks of the README that begin with ```<kind> demo."""
    return re.findall(rf"^```{kind} demo\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def run(code: str, folder: Path) -> str:
    """Run Python code in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all blocks run."""
    require_demo()
    return tmp_path_factory.mktemp("readme")


def test_the_commands_of_the_readme_run(folder: Path) -> None:
    [block] = blocks("bash")
    commands = [line.split("#")[0].strip() for line in block.splitlines() if line.strip()]
    assert len(commands) >= 5 and all(command.startswith("proxytune ") for command in commands)
    for command in commands:
        code = f"from proxytune.cli.app import app; app({command.split()[1:]!r})"
        assert run(code, folder).strip(), command
    assert (folder / "results" / "readme-gsm" / "run.json").exists()


def test_the_python_of_the_readme_runs(folder: Path) -> None:
    [code] = blocks("python")
    assert run(code, folder).strip()


def test_the_table_of_commands_is_complete() -> None:
    named = set(re.findall(r"`proxytune ([a-z-]+)", README))
    assert {command.name or command.callback.__name__ for command in app.registered_commands} <= named


def test_the_files_that_the_readme_names_exist() -> None:
    for name in re.findall(r"`((?:configs|results|tests)/[\w./-]+|[A-Z]+\.md)`", README):
        assert (ROOT / name).exists() or "<" in name, name
