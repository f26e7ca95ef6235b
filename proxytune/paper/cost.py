"""What a recipe would do and what it would take, from the systems' files and what is on disk: its runs, the
models to download, the memory of each system, and what its judges cost. Nothing is loaded or downloaded here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from proxytune import hub
from proxytune.config import DEMO_SCHEME, ROLES, ModelSpec, Role, System, load_system
from proxytune.errors import UserError
from proxytune.models import Models, checkpoint
from proxytune.paper.published import read_paper
from proxytune.paper.recipes import Line, Recipe, own_lines, published_lines
from proxytune.tasks import TASKS

MODELS_FOLDER = "models"
"""Where the systems' files look for models that nobody published, beside the current folder."""
BYTES = {"float64": 8.0, "float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "auto": 2.0}
QUANTISED = {"8bit": 1.0, "4bit": 0.5}
_LLAMA = {"7b": (6_738_415_616, 262_144), "13b": (13_015_864_320, 409_600), "70b": (68_976_648_192, 163_840)}
PUBLISHED: Mapping[str, tuple[int, int]] = {
    **{f"meta-llama/Llama-2-{size}{kind}-hf": _LLAMA[size] for size in _LLAMA for kind in ("", "-chat")},
    **{f"codellama/CodeLlama-{size}-Python-hf": _LLAMA[size] for size in _LLAMA},
    "allenai/truthfulqa-truth-judge-llama2-7B": _LLAMA["7b"],
    "allenai/truthfulqa-info-judge-llama2-7B": _LLAMA["7b"],
    "tomh/toxigen_roberta": (355_361_794, 0),
}
"""Parameters, and numbers in the KV cache per token, of models whose files need not be here to know them."""
JUDGE_BYTES = {"tomh/toxigen_roberta": 4.0}
"""Bytes per number of judges that are not stored in two."""
CONFIRM = 100_000_000
"""Bytes to download from which on the user is asked first."""


@dataclass(frozen=True)
class Need:
    """One model of a recipe and what it takes."""

    name: str
    """A folder or a hub id."""
    here: bool
    """Whether it is on disk (what the hub's cache has of it may still be incomplete)."""
    weights: float | None
    """Bytes in memory; None where it is unknown."""
    download: float | None
    """Bytes to fetch; 0 if it is here."""


@dataclass(frozen=True)
class SystemPlan:
    """One system of a recipe: its runs and its memory."""

    system: System
    runs: tuple[tuple[str, Role], ...]
    """Task and role, in the order in which they are run."""
    models: Mapping[str, Need]
    """Model of the system (base, expert, ...) -> what it takes."""
    missing: tuple[str, ...]
    """Models that are in no folder, as one line each."""
    left_out: tuple[str, ...]
    """What the recipe asks for and this system does not have, as one line each."""

    @property
    def memory(self) -> float | None:
        """Bytes of weights that are in memory at once, at most: the tuned model is loaded when the others
        have gone. None where a model's size is not known."""
        apart = {"tuned"}
        together = [need.weights for name, need in self.models.items() if name not in apart]
        alone = [need.weights for name, need in self.models.items() if name in apart]
        if None in together or None in alone:
            return None
        return max(sum(w for w in together if w), sum(w for w in alone if w))


@dataclass(frozen=True)
class RecipeChoice:
    """What the user asked for beside the recipe."""

    system: str | None = None
    """Run this system in place of the paper's."""
    paths: Mapping[str, Path] = field(default_factory=dict)
    """Unpublished model -> its folder."""
    skip_missing: bool = False


def plan_systems(recipe: Recipe, choice: RecipeChoice) -> list[SystemPlan]:
    """The systems of a recipe with the runs that its table needs; UserError for unknown names."""
    unknown = sorted(set(choice.paths) - set(recipe.unpublished))
    if unknown:
        known = ", ".join(recipe.unpublished) or "none: all models of this recipe are published"
        raise UserError(f"--path {unknown[0]}=...: the models that can be named are {known}")
    if choice.system is not None:
        system = load_system(choice.system)
        lines = own_lines(recipe, read_paper(), system.name, system.roles)
        return [_plan(system, lines, choice)]
    lines = published_lines(recipe, read_paper())
    names = dict.fromkeys(key[0] for line in lines for key in line.keys)
    return [_plan(with_paths(load_system(name), choice.paths), lines, choice) for name in names]


def _plan(system: System, lines: Sequence[Line], choice: RecipeChoice) -> SystemPlan:
    """The part of a plan that one system has."""
    asked = [(key[1], key[2]) for line in lines for key in line.keys if key[0] == system.name]
    tasks = list(dict.fromkeys(task for task, _ in asked))
    asked = sorted(  # one large model at a time: everything as tuned comes last
        dict.fromkeys(asked), key=lambda one: (one[1] == "tuned", tasks.index(one[0]), ROLES.index(one[1]))
    )
    with_data = [run for run in asked if not system.data or run[0] in system.data]
    without = dict.fromkeys(task for task, _ in asked if system.data and task not in system.data)
    left_out = [f"{task}: '{system.name}' names its own data, and none for this task" for task in without]
    models = Models(system)
    names = {role: models.names(role) for role in dict.fromkeys(role for _, role in with_data)}
    specs = {name: models.spec(name) for wanted in names.values() for name in wanted}
    lost = {name: reason for name, spec in specs.items() if (reason := absent(spec)) is not None}
    runs = [run for run in with_data if not (set(names[run[1]]) & set(lost) and choice.skip_missing)]
    dropped = [
        f"{task} as {role}: its models are missing" for task, role in with_data if (task, role) not in runs
    ]
    used = {name for _, role in runs for name in names[role]}
    return SystemPlan(
        system=system,
        runs=tuple(runs),
        models={name: need_of(spec) for name, spec in specs.items() if name in used and name not in lost},
        missing=tuple(f"{name}: {reason}" for name, reason in lost.items()),
        left_out=(*left_out, *dropped),
    )


def with_paths(system: System, paths: Mapping[str, Path]) -> System:
    """The system with unpublished models taken from these folders, each a whole model or a PEFT adapter (on
    the antiexpert; for the tuned model, on the base)."""
    here = (Path.cwd() / MODELS_FOLDER).resolve()
    places = {str(here / name): path.expanduser().resolve() for name, path in paths.items()}
    changed: dict[str, ModelSpec] = {}
    for role, below in (("expert", None), ("tuned", system.base.model)):
        spec: ModelSpec | None = getattr(system, role)
        if spec is None or spec.model not in places:
            continue
        folder = places[spec.model]
        adapter = (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file()
        new = {"model": below, "adapter": str(folder)} if adapter else {"model": str(folder)}
        changed[role] = spec.model_copy(update=new)
    return system.model_copy(update=changed)


def absent(spec: ModelSpec) -> str | None:
    """What is wrong with the path of a model or adapter; None if it is there or on the hub."""
    for place in (spec.model, spec.adapter):
        local = place is not None and place.startswith(("/", "./", "../", "~", DEMO_SCHEME))
        if place is None or (not local and place != spec.adapter):
            continue
        try:
            found = Path(checkpoint.resolve(place)).is_dir() if place == spec.model else Path(place).is_dir()
        except UserError:
            found = False
        if not found:
            return f"no folder '{place}'"
    return None


# What a model takes


def need_of(spec: ModelSpec) -> Need:
    """What one model takes; an adapter on another model's weights next to nothing."""
    if spec.model is None:
        return Need(f"adapter {spec.adapter}", True, 0.0, 0.0)
    per_number = QUANTISED.get(spec.quantization, BYTES[spec.dtype])
    local = spec.model.startswith(("/", "./", "../", "~", DEMO_SCHEME)) or Path(spec.model).is_dir()
    if local:
        return Need(spec.model, True, checkpoint.bytes_needed(spec), 0.0)
    here = hub.stored(spec.model)
    if spec.model not in PUBLISHED:
        return Need(spec.model, here, None, 0.0 if here else None)
    parameters, _ = PUBLISHED[spec.model]
    return Need(spec.model, here, parameters * per_number, 0.0 if here else parameters * 2.0)


def judge_need(model: str) -> Need:
    """What a judge that runs here takes."""
    name = model.partition("#")[0]
    if name.startswith(("/", "./", "../", "~", DEMO_SCHEME)):
        return Need(name, True, None, 0.0)
    parameters, _ = PUBLISHED.get(name, (None, 0))
    here = hub.stored(name)
    if parameters is None:
        return Need(name, here, None, 0.0 if here else None)
    size = parameters * JUDGE_BYTES.get(name, 2.0)
    return Need(name, here, size, 0.0 if here else size)


def kv_per_token(plan: SystemPlan) -> float | None:
    """Bytes of KV cache per token in flight as the proxy; None where a model's shape is not known here."""
    found = 0.0
    for name, need in plan.models.items():
        if name == "tuned":
            continue
        if need.name not in PUBLISHED:
            return None
        spec = Models(plan.system).spec(name)
        found += PUBLISHED[need.name][1] * BYTES[spec.dtype]
    return found


def sources(plans: Sequence[SystemPlan]) -> dict[str, str]:
    """Task -> where its items come from, for the tasks of all plans."""
    found = {}
    for plan in plans:
        for task, _ in plan.runs:
            found[task] = plan.system.data.get(task, "hub")
    return {task: _source(task, where) for task, where in found.items()}


def _source(task: str, where: str) -> str:
    """How a plan names a source."""
    known = TASKS[task].hub
    if where != "hub" or known is None:
        return where
    return f"{known.id} on the hub" + (" (on disk)" if hub.stored(known.id, "dataset") else " (to download)")
