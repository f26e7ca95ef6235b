"""The recipes that reproduce the published figures (configs/recipes): which runs belong to the cells of which
table. Reads files only.

To add a recipe for another table: a YAML file. One that shows something else than a table of the paper (a
figure, an analysis) gets a field here and its last step in cli/commands/reproduce.py. What it evaluates,
the plan with its costs, resuming and judging stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import Field, ValidationError, model_validator

from proxytune.comparison import conditions, gap, models_of
from proxytune.config import Role, shipped, system_names
from proxytune.errors import UserError, did_you_mean
from proxytune.paper.published import read_paper
from proxytune.records import Run
from proxytune.schema import Record, explain
from proxytune.tasks import TASKS
from proxytune.yaml_files import read_yaml

Key = tuple[str, str, Role]
"""What a cell shows: the name of a system, a task, a role."""


class Column(Record):
    """A column of a table: what of ours is shown beside the paper's figures."""

    task: str
    metrics: tuple[str, ...] = Field(min_length=1)
    """The first that a run has is shown; where it is not the first of these, with its name."""


class Recipe(Record):
    """A table of the paper, and the runs that fill it."""

    name: str
    title: str
    table: str
    """Its key in paper.json."""
    systems: dict[str, str]
    """The paper's model size -> a system; `{task}` in its name is the column's task. Lines of other sizes are
    the expert of the first system."""
    columns: tuple[Column, ...]
    """In the order of the table's."""
    unpublished: dict[str, str] = Field(default_factory=dict)
    """Models that nobody published: name (./models/NAME in the systems' files) -> what it is."""

    @model_validator(mode="after")
    def _known(self) -> Recipe:
        table = read_paper()["tables"].get(self.table)
        if table is None or len(table["columns"]) != len(self.columns):
            raise ValueError(f"paper.json has no table {self.table} with {len(self.columns)} columns")
        for column in self.columns:
            if column.task not in TASKS:
                raise ValueError(str(did_you_mean("task", column.task, TASKS)))
            for pattern in self.systems.values():
                if pattern.format(task=column.task) not in system_names():
                    raise ValueError(f"no system '{pattern.format(task=column.task)}'")
        return self


@dataclass(frozen=True)
class Line:
    """A line of a table: what it is called, and the run behind each of its cells."""

    size: str
    role: str
    keys: tuple[Key, ...]
    published: Mapping[str, Any] | None
    """The line of paper.json; None for a system that is not the paper's."""


def recipe_names() -> list[str]:
    """The recipes in configs/recipes."""
    return sorted(path.stem for path in shipped("configs/recipes").glob("*.yaml"))


def load_recipe(name: str) -> Recipe:
    """The recipe of that name; UserError with the nearest names."""
    if name not in recipe_names():
        raise did_you_mean("recipe", name, recipe_names())
    path = shipped("configs/recipes") / f"{name}.yaml"
    try:
        return Recipe.model_validate({"name": name, **read_yaml(path)})
    except ValidationError as error:
        raise UserError(f"'{path}': {explain(error)}") from None


def published_lines(recipe: Recipe, paper: Mapping[str, Any]) -> list[Line]:
    """The lines of the paper's table with the runs of ours that reproduce them."""
    first = next(iter(recipe.systems.values()))
    found = []
    for row in paper["tables"][recipe.table]["rows"]:
        pattern, role = recipe.systems.get(row["size"]), row["role"]
        if pattern is None:
            pattern, role = first, "expert"
        keys = tuple((pattern.format(task=c.task), c.task, role) for c in recipe.columns)
        found.append(Line(row["size"], row["role"], keys, row))
    return found


def own_lines(recipe: Recipe, paper: Mapping[str, Any], system: str, roles: Sequence[Role]) -> list[Line]:
    """The same table for another system: the roles that the paper's has, as far as the system has them."""
    asked = {key[2] for line in published_lines(recipe, paper) for key in line.keys}
    return [
        Line(system, role, tuple((system, column.task, role) for column in recipe.columns), None)
        for role in roles
        if role in asked
    ]


def runs_by_key(runs: Sequence[Run]) -> dict[Key, Run]:
    """The runs that can be in a cell: generated responses, no forced opener.

    Per system and task they are runs of one item set, sampling and judge: those with which most roles were
    run, and of equals those with most examples.
    """
    groups: dict[tuple[str, str], dict[object, dict[Role, Run]]] = {}
    for run in runs:
        spec = run.spec
        if spec.mode == "generate" and spec.forced is None:
            together = groups.setdefault((spec.system.name, spec.task), {})
            roles = together.setdefault((conditions(run), models_of(run)), {})
            if spec.role not in roles or _is_usual(run) > _is_usual(roles[spec.role]):
                roles[spec.role] = run
    found: dict[Key, Run] = {}
    for (system, task), together in groups.items():
        roles = max(together.values(), key=lambda roles: (len(roles), next(iter(roles.values())).n))
        found |= {(system, task, role): run for role, run in roles.items()}
    return found


def _is_usual(run: Run) -> bool:
    """Whether a run has its system's own alpha."""
    return run.spec.alpha == run.spec.system.alpha


def unlike_the_paper(run: Run) -> list[str]:
    """The settings of a run that are not the paper's: `temperature 0.7`, `shots 4`, `alpha 0.4`."""
    spec, usual = run.spec, TASKS[run.spec.task].sampling
    changed = [name for name, value in spec.sampling if value != getattr(usual, name)]
    found = [f"{name} {getattr(spec.sampling, name)}" for name in changed]
    found += [f"shots {spec.shots}"] if spec.shots else []
    return found + ([f"alpha {spec.alpha.text}"] if spec.role == "proxy" and not _is_usual(run) else [])


def shown_metric(column: Column, run: Run) -> str | None:
    """The metric of a run that a column shows; None where it has none of them (not judged, for example)."""
    return next((name for name in column.metrics if run.figure(name) is not None), None)


def our_gap_closed(
    recipe: Recipe, lines: Sequence[Line], runs: Mapping[Key, Run]
) -> tuple[float, int] | None:
    """The mean over the columns of the share of the gap closed, as the paper takes it, and over how many:
    those that have base, proxy and tuned and a firm gap (see `comparison.gap`). None without any."""
    by_role = {line.role: line for line in lines}
    shares = []
    for i, column in enumerate(recipe.columns):
        cells = [runs.get(by_role[role].keys[i]) for role in ("base", "proxy", "tuned") if role in by_role]
        found = [run for run in cells if run is not None and run.spec.remark is None]
        names = {shown_metric(column, run) for run in found}
        if len(found) == 3 and len(names) == 1 and (name := names.pop()) is not None:
            base, proxy, tuned = found
            share = gap(base, proxy, tuned, name)
            shares += [] if share is None else [share]
    return (sum(shares) / len(shares), len(shares)) if shares else None
