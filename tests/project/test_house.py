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
MAX_FILE, MAX_FUNCTION, MAX_PARAMETERS = 450, 60, 8


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


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """How many parameters a function has, self and cls left out."""
    given = function.args
    names = [a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    return len(names) - (names[:1] in (["self"], ["cls"]))


def is_a_form(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether others decide its parameters: a Typer command, a Triton kernel, or an interface that hands over
    more than is wanted."""
    decorators = {ast.unparse(d).split("(")[0] for d in function.decorator_list}
    others = function.args.kwarg is not None and function.args.kwarg.arg == "_"
    return others or bool(decorators & {"grouped", "triton.jit", "analyze.command"})


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_more_than_eight_parameters_are_a_record(path: Path) -> None:
    many = {f.name: parameters(f) for f in functions(path) if not is_a_form(f)}
    assert {name: count for name, count in many.items() if count > MAX_PARAMETERS} == {}


def test_no_class_name_stands_twice() -> None:
    """A name has one meaning in the package."""
    places: dict[str, list[str]] = {}
    for path in (p for p in SOURCES if "proxytune" in p.relative_to(ROOT).parts):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name, []).append(str(path.relative_to(ROOT)))
    assert {name: found for name, found in places.items() if len(found) > 1} == {}


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


APART = {"vllm"}
"""What pins versions of its own, and so lives in an environment of its own (make test-vllm)."""


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
    assert names - {"build"} - APART <= pinned


def test_the_oldest_constraints_are_the_lower_bounds() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *(d for e in project["optional-dependencies"].values() for d in e)]
    lines = (ROOT / "constraints-oldest.txt").read_text().splitlines()
    pins = {
        name.lower().replace("_", "-"): version
        for name, _, version in (line.strip().partition("==") for line in lines if "==" in line)
        if not name.startswith("#")
    }
    for requirement in asked:
        match = re.match(r"([\w.-]+)(?:\[\w+\])?>=([\d.]+)", requirement)
        assert match is not None, requirement
        if match[1] in APART:
            continue
        pinned = pins[match[1].lower().replace("_", "-")]
        assert pinned == match[2] or pinned.startswith(f"{match[2]}."), requirement


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
    tasks = json.loads(proxytune("demo", "--limit", "3", "--json"))["tasks"]
    assert set(tasks) >= {"gsm", "truthfulqa", "truthfulqa_mc"}
    assert list(empty.iterdir()) == [], "the demo writes nothing unless asked to"


@pytest.mark.xdist_group("house")
def test_groups_of_tests_stay_in_one_process(request: pytest.FixtureRequest) -> None:
    """xdist 3.8.0 writes a group into the name of its tests; under pytest 9.2.0 that is lost."""
    if getattr(request.config.option, "loadgroup", False):
        assert request.node.nodeid.endswith("@house")
