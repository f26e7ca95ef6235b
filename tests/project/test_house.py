"""The house: sizes of files and functions, what the package declares, and a wheel that works in an empty
folder."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.checkout import ROOT
from tests.support.require import require_or_skip

SOURCES = sorted([*(ROOT / "proxytune").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py")])
MAX_FILE, MAX_FUNCTION = 450, 60


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Every function and method of a file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_functions_stay_small(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_FILE
    long = {
        f.name: f.end_lineno - f.lineno + 1
        for f in functions(path)
        if f.end_lineno - f.lineno >= MAX_FUNCTION
    }
    assert long == {}


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_modules_and_public_names_are_documented(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), "a module says what it owns"
    public = [
        n for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef) and not n.name.startswith("_")
    ]
    assert [n.name for n in public if not ast.get_docstring(n)] == []


def test_no_drawers_for_leftovers() -> None:
    assert [p.name for p in SOURCES if p.stem in {"utils", "util", "common", "helpers", "misc"}] == []


def test_every_dependency_is_constrained() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [
        *project["dependencies"],
        *(d for extra in project["optional-dependencies"].values() for d in extra),
    ]
    pinned = {
        line.split("==")[0].lower()
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    }
    names = {re.split(r"[\[>=<~! ]", requirement)[0].lower() for requirement in asked}
    assert names - {"build"} <= pinned


def test_make_help_lists_the_targets() -> None:
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for target in (
        "setup",
        "demo",
        "test",
        "check",
        "check-all",
        "fix",
        "report",
        "bench",
        "demo-models",
        "demo-report",
        "clean",
    ):
        assert re.search(rf"make {target} ", shown), target


def test_system_files_are_shipped() -> None:
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel["force-include"] == {
        "configs": "proxytune/configs",
        "results/paper.json": "proxytune/results/paper.json",
    }


def wheel_or_reason(folder: Path) -> Path:
    """Build the wheel into `folder`. Where a build is impossible (no registry), skip, or fail when
    PROXYTUNE_REQUIRE says so."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--wheel-dir",
        str(folder),
        str(ROOT),
    ]
    built = subprocess.run(command, capture_output=True, text=True)
    if built.returncode != 0:
        require_or_skip("wheel", f"the wheel was not built: {built.stderr.strip()[-500:]}")
    return next(folder.glob("*.whl"))


@pytest.mark.slow
def test_the_installed_wheel_runs_the_demo_in_an_empty_folder(tmp_path: Path) -> None:
    site, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    wheel = wheel_or_reason(tmp_path)
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--target",
        str(site),
        str(wheel),
    ]
    subprocess.run(install, check=True)

    def proxytune(*arguments: str) -> str:
        code = f"import sys, runpy; sys.path.insert(0, {str(site)!r}); "
        code += "runpy.run_module('proxytune', run_name='__main__')"
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], cwd=empty, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert (site / "proxytune" / "configs" / "systems" / "demo.yaml").exists()
    where = proxytune("--version")
    assert "demo" in proxytune("systems") and where.startswith("proxytune ")
    tasks = json.loads(proxytune("demo", "--limit", "8", "--json"))["tasks"]
    assert set(tasks) >= {"gsm", "truthfulqa", "truthfulqa_mc"}
    assert list(empty.iterdir()) == [], "the demo writes nothing unless asked to"
