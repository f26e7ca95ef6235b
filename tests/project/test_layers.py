"""Packages have floors and doors: imports point to lower floors, never round in a circle, and into another
package only through its `__init__`. Everything is read from the source."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.support.checkout import ROOT, environment

PACKAGE = ROOT / "proxytune"

FLOORS = (
    "errors lazy schema terminal api_spec yaml_files config options records intervals run_files results "
    "comparison hub processes provenance cpu_load token_texts training_record",
    "demo sandbox engine endpoints",
    "models tasks",
    "decoding analysis paper",
    "judges report checks black_box",
    "runs",
    "tuning integrations exports scale server",
    "cli",
)
"""From the ground up. The package's own `__init__` and `__main__` stand above all."""
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms.split()}
MOST_FILES, MOST_PUBLIC = 15, 8
OUTSIDE_THE_ENGINE = {"transformers", "pathlib", "json", "httpx", "yaml", "os", "tokenizers"}
"""What the engine does not know. Its kernels are compiled, for which they need files."""
HEAVY = {"torch", "transformers", "peft", "datasets", "accelerate", "trl"}


def modules() -> dict[str, Path]:
    """Dotted name -> file, the package's own `__init__` left out."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name != "proxytune":
            found[name] = path
    return found


MODULES = modules()
PACKAGES = {name for name, path in MODULES.items() if path.name == "__init__.py"}


def room(module: str) -> str:
    """The package, or the ground module, that a module belongs to: `proxytune.engine.kv.cache` -> engine."""
    return module.split(".")[1]


def imports(path: Path, *, at_import: bool = False) -> Iterator[tuple[str, str | None]]:
    """What a file imports: (module, name), functions included unless only what importing it runs counts."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body if at_import else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module is not None, f"{path}: relative import"
            yield from ((node.module, alias.name) for alias in node.names)


def module_of(module: str, name: str | None) -> str:
    """The module that an import reaches: `from proxytune.demo import world` reaches the module world."""
    inner = f"{module}.{name}"
    return inner if inner in MODULES else module


@cache
def own_imports(module: str) -> tuple[tuple[str, str | None], ...]:
    """The imports of a module from the package itself."""
    found = imports(MODULES[module])
    return tuple(
        one for one in found if one[0].split(".")[0] == "proxytune" and one[0] != "proxytune.__main__"
    )


@cache
def public(package: str) -> tuple[str, ...]:
    """The names in a package's `__all__`."""
    for node in ast.parse(MODULES[package].read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and [ast.unparse(t) for t in node.targets] == ["__all__"]:
            return tuple(ast.literal_eval(node.value))
    return ()


@cache
def homes(package: str) -> dict[str, str]:
    """Public name -> the module of the package that it comes from, whichever way the door opens."""
    found: dict[str, str] = {}
    for node in ast.walk(ast.parse(MODULES[package].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith(f"{package}."):
            found |= {alias.name: node.module for alias in node.names}
    return found


@cache
def reached(module: str) -> frozenset[str]:
    """The modules of the package that a module imports, through doors to what lies behind them."""
    found = set()
    for source, name in own_imports(module):
        target = f"proxytune.{name}" if source == "proxytune" else module_of(source, name)
        if target in PACKAGES and name in homes(target):
            target = homes(target)[str(name)]
        if target in MODULES and target != module:
            found.add(target)
    return frozenset(found)


def test_every_module_has_a_floor() -> None:
    assert sorted({room(module) for module in MODULES} - FLOOR.keys() - {"__main__"}) == []
    assert sorted(FLOOR.keys() - {room(module) for module in MODULES}) == []
    assert len(FLOORS) <= 8


@pytest.mark.parametrize("module", [m for m in MODULES if room(m) != "__main__"])
def test_imports_point_down(module: str) -> None:
    here = room(module)
    for target in reached(module):
        there = room(target)
        assert there == here or FLOOR[there] < FLOOR[here] or FLOOR[here] == FLOOR[there] == 0, (
            f"{module} (floor {FLOOR[here]}) may not import {target} (floor {FLOOR[there]})"
        )


@pytest.mark.parametrize("module", MODULES)
def test_other_packages_are_entered_through_their_door(module: str) -> None:
    for source, name in own_imports(module):
        if (
            source == "proxytune"
            or room(source) == room(module)
            or f"proxytune.{room(source)}" not in PACKAGES
        ):
            continue
        assert source in PACKAGES, (
            f"{module}: 'from {source} import {name}' goes past a door: import it from "
        )
        assert name in public(source), f"{module}: {source} does not offer '{name}': it has {public(source)}"


@pytest.mark.parametrize("package", sorted(PACKAGES))
def test_doors_are_narrow_and_open(package: str) -> None:
    assert len(public(package)) <= MOST_PUBLIC, f"{package} offers {len(public(package))} names"
    for name in public(package):
        assert name in homes(package) or f"{package}.{name}" in MODULES or package == "proxytune.tasks", name


@pytest.mark.parametrize("package", sorted({m.rpartition(".")[0] for m in MODULES} - {"proxytune"}))
def test_packages_stay_small(package: str) -> None:
    folder = ROOT / package.replace(".", "/")
    files = sorted(path.name for path in folder.glob("*.py"))
    assert len(files) <= MOST_FILES, f"{package} has {len(files)} files: {files}"


def test_no_circles() -> None:
    """Neither among modules, nor among packages."""
    graph = {module: set(reached(module)) - {module} for module in MODULES}
    _no_circle({m: {t for t in targets if t not in PACKAGES} for m, targets in graph.items()})
    rooms: dict[str, set[str]] = {room(module): set() for module in MODULES}
    for module, targets in graph.items():
        rooms[room(module)] |= {room(target) for target in targets} - {room(module)}
    _no_circle(rooms)


def _no_circle(graph: dict[str, set[str]]) -> None:
    left = dict(graph)
    while left:
        free = [name for name, targets in left.items() if not targets & left.keys()]
        assert free, f"import circle among {sorted(left)}"
        for name in free:
            del left[name]


@pytest.mark.parametrize("module", [m for m in MODULES if room(m) == "engine"])
def test_the_engine_knows_ids_and_logits_only(module: str) -> None:
    roots = {source.split(".")[0] for source, _ in imports(MODULES[module])}
    known = OUTSIDE_THE_ENGINE - (
        {"os", "pathlib"} if module.startswith("proxytune.engine.kernels.") else set()
    )
    assert roots & known == set()


def reach(start: str) -> set[str]:
    """Everything that a module reaches."""
    found, todo = set[str](), [start]
    while todo:
        module = todo.pop()
        if module not in found:
            found.add(module)
            todo.extend(reached(module))
    return found


@pytest.mark.parametrize("start", [m for m in MODULES if room(m) in ("report", "analysis")])
def test_reports_need_no_models(start: str) -> None:
    """Reports and analyses run on a laptop: nothing that they reach loads a model."""
    assert not {"models", "engine", "decoding", "runs"} & {room(module) for module in reach(start)}


@pytest.mark.parametrize(
    "statement",
    [
        "import proxytune",
        "import proxytune.cli.app",
        "from proxytune import RunOptions, DecodeOptions, Sampling, load_system",
        "import proxytune.report.page, proxytune.analysis.tokens",
        "import proxytune.engine.scheduler, proxytune.engine.request",
    ],
)
def test_light_things_load_nothing_heavy(statement: str) -> None:
    """What answers at once (help, reports, records) imports no torch: tried in a process of its own."""
    code = f"import sys; {statement}; print(sorted({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment()
    )
    assert done.stdout.strip() == "[]"
