"""Imports point down: every import of the package is read from the source and compared with the layers of the
design."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.support.checkout import ROOT

PACKAGE = ROOT / "proxytune"

ORDER = [
    "errors",
    "config hub",
    "native",
    "records",
    "core",
    "vocabulary families adapters quantized speculate",
    "models blackbox demo",
    "prompts",
    "decode scoring sandbox",
    "judges",
    "tasks",
    "results provenance progress",
    "run",
    "paper",
    "scale analysis tune lmeval serve reproduce",
    "report demo_build",
    "cli",
    "__main__",
]
LAYERS = {name: number for number, names in enumerate(ORDER) for name in names.split()}
FOLDERS = {"core", "tasks", "demo"}
"""Inside these, files may import each other; so may the files into which one module was split (cli,
cli_show)."""
NOT_IN_CORE = {"transformers", "pathlib", "json", "httpx", "yaml", "os", "tokenizers"}
LIGHT = {"errors", "config", "records", "results", "cli"}
HEAVY = {"torch", "transformers", "peft", "datasets", "accelerate", "pandas"}


def unit(module: str) -> str:
    """The entry of LAYERS that a module belongs to: `core.cache` -> core, `cli_show` -> cli."""
    first = module.split(".")[0]
    if first in LAYERS:
        return first
    return next((name for name in LAYERS if first.startswith(f"{name}_")), first)


def modules() -> dict[str, Path]:
    """Dotted name inside the package -> file. The package's own __init__ is not part of the graph: it only
    names the API."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name:
            found[name] = path
    return found


def imports(path: Path, *, top_level_only: bool = False) -> Iterator[str]:
    """Absolute names of everything that a file imports, functions included."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@cache
def graph() -> dict[str, frozenset[str]]:
    """Module -> the modules of the package that it imports, at any depth of the file."""
    known = modules()

    def inside(name: str) -> str | None:
        tail = name.removeprefix("proxytune.")
        while tail and tail not in known:
            tail = tail.rpartition(".")[0]
        return tail or None

    return {
        module: frozenset(
            target for name in imports(path) if name.startswith("proxytune.") and (target := inside(name))
        )
        - {module}
        for module, path in known.items()
    }


def test_every_module_has_a_layer() -> None:
    assert sorted(module for module in modules() if unit(module) not in LAYERS) == []


@pytest.mark.parametrize("module", modules())
def test_imports_point_down(module: str) -> None:
    here = unit(module)
    for target in graph()[module]:
        there = unit(target)
        together = here == there and (here in FOLDERS or module.split(".")[0] == module)
        assert LAYERS[there] < LAYERS[here] or together, f"{module} may not import {target}"


def test_no_cycles() -> None:
    left = dict(graph())
    while left:
        free = [module for module, targets in left.items() if not targets & left.keys()]
        assert free, f"import cycle among {sorted(left)}"
        for module in free:
            del left[module]


@pytest.mark.parametrize("module", [m for m in modules() if unit(m) == "core"])
def test_the_core_knows_ids_and_logits_only(module: str) -> None:
    roots = {name.split(".")[0] for name in imports(modules()[module])}
    assert roots & NOT_IN_CORE == set()


@pytest.mark.parametrize("module", [m for m in modules() if unit(m) in LIGHT])
def test_light_modules_load_nothing_heavy(module: str) -> None:
    roots = {name.split(".")[0] for name in imports(modules()[module], top_level_only=True)}
    assert roots & HEAVY == set()


def test_the_scheduler_needs_no_torch() -> None:
    path = PACKAGE / "core" / "scheduler.py"
    if path.exists():
        assert "torch" not in {name.split(".")[0] for name in imports(path)}


def test_reports_need_no_models() -> None:
    """`report` and `analysis` run on a laptop: nothing that they reach loads a model."""
    starts = [module for module in graph() if unit(module) in ("report", "analysis")]
    assert {"report", "report_html", "analysis", "analysis_tokens"} <= set(starts)
    for start in starts:
        reached, todo = set[str](), [start]
        while todo:
            module = todo.pop()
            if module not in reached:
                reached.add(module)
                todo.extend(graph()[module])
        assert not {"models", "decode", "run"} & {unit(module) for module in reached}
