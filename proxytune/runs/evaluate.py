"""Evaluate a role of a system on a task, and generate from prompts: examples -> decoder -> rows -> scores ->
Run. How one run is started, continued and closed is in run_session.py.
"""

from __future__ import annotations

import dataclasses
import hashlib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from proxytune.config import (
    ROLES,
    SOURCES,
    AlphaSchedule,
    Mode,
    Role,
    RunSpec,
    Sampling,
    System,
    TraceKind,
    parse_alpha,
)
from proxytune.decoding import Decoder
from proxytune.errors import UserError
from proxytune.models import Models
from proxytune.records import Completion, Example, Metric, Prompt, Run
from proxytune.runs.session import Job, Resources, run_job
from proxytune.speculate import Speculate, speculation
from proxytune.tasks import Dataset, Task, get_task, read_source

__all__ = [
    "ORDER",
    "RESULTS",
    "Job",
    "Options",
    "Resources",
    "alpha_for",
    "evaluate",
    "evaluate_all",
    "generate",
    "plan",
    "planned_folder",
    "run_job",
    "score_of",
]

RESULTS = Path("results")
"""Where runs go unless another folder is named."""
ORDER = ROLES
"""The order in which all roles are evaluated: the second large model comes last, when the others can go."""


@dataclass(frozen=True)
class Options:
    """What decides a run's outputs beside the system, the task and the role; None is the system's or the
    task's own."""

    alpha: AlphaSchedule | float | str | None = None
    sampling: Sampling | None = None
    data: str | None = None
    limit: int | None = None
    shots: int = 0
    shots_from: str | None = None
    trace: TraceKind = "off"
    seed: int = 0
    """Of the sampling noise and of the few-shot items; 0 leaves the seed of `sampling`."""
    forced: str | None = None
    mode: Mode = "generate"
    allow_negative_alpha: bool = False


def plan(system: System, task: str, as_: str, options: Options) -> Job:
    """Check all settings of a run and read its examples; UserError where something does not fit."""
    found, role = get_task(task, options.mode), system.require(as_)
    for named in (*system.data, *system.judges):
        get_task(named)  # a mistyped task there would silently mean the hub
    if options.mode == "likelihood" and options.trace != "off":
        raise UserError("a trace is of generated tokens: leave --trace out with --mode likelihood")
    if options.trace == "agreement":
        system.require_agreement(role)
    source = system.data.get(task, "hub") if options.data is None else options.data
    data = read_source(
        found, source, options.limit, shots=options.shots, shots_from=options.shots_from, seed=options.seed
    )
    return _job(system, role, options, found, data)


def planned_folder(system: System, task: str, role: Role, options: Options, root: Path) -> Path:
    """Where a run from the system's usual data will be kept, without reading the data."""
    source = system.data.get(task, "hub")
    name = source if source in SOURCES else Path(source).name
    return _job(system, role, options, get_task(task, options.mode), Dataset((), name, "")).folder(root)


def _job(system: System, role: Role, options: Options, task: Task, data: Dataset) -> Job:
    """The settings of a run and what they are by default."""
    alpha = alpha_for(system, role, options.alpha, allow_negative=options.allow_negative_alpha)
    usual = system.data.get(task.name, "hub")
    settings = task.sampling if options.sampling is None else options.sampling
    spec = RunSpec(
        task=task.name,
        system=system,
        role=role,
        alpha=alpha or system.alpha,
        sampling=settings.model_copy(update={"seed": options.seed}) if options.seed else settings,
        data=data.name,
        data_sha256=data.sha256,
        limit=options.limit,
        shots=options.shots,
        trace=options.trace,
        mode=options.mode,
        forced=options.forced,
    )
    plain: dict[str, Any] = {"limit": None, "shots": 0, "trace": "off", "mode": "generate", "forced": None}
    usual_name = usual if usual in SOURCES else Path(usual).name
    plain |= {"alpha": system.alpha, "sampling": task.sampling, "data": usual_name}
    return Job(task, data, spec, spec.model_copy(update=plain))


def alpha_for(
    system: System, role: Role, asked: AlphaSchedule | float | str | None, *, allow_negative: bool
) -> AlphaSchedule | None:
    """The checked alpha of the proxy; None for the other roles, for which asking for one is a UserError."""
    if role == "proxy":
        return parse_alpha(system.alpha if asked is None else asked).check(allow_negative=allow_negative)
    if asked is not None:
        raise UserError(f"alpha acts on the proxy only: leave it out when running as '{role}'")
    return None


def evaluate(
    system: System,
    task: str,
    *,
    as_: str = "proxy",
    alpha: AlphaSchedule | float | str | None = None,
    sampling: Sampling | None = None,
    data: str | None = None,
    limit: int | None = None,
    shots: int = 0,
    shots_from: str | None = None,
    out: str | Path | None = None,
    trace: TraceKind = "off",
    mode: Mode = "generate",
    seed: int = 0,
    max_batch: int | None = None,
    kv_memory: int | None = None,
    speculate: Speculate = "auto",
    models: Models | None = None,
    progress: bool = True,
) -> Run:
    """Evaluate `system` on a task as one role, and return its Run.

    Writes to `out`, or to `results/<system>/<task>/<role>/`. An unfinished run with the same settings is
    continued; a finished one is returned as it is. Raises UserError for bad input and for a folder that holds
    other settings.
    """
    options = Options(
        alpha=alpha,
        sampling=sampling,
        data=data,
        limit=limit,
        shots=shots,
        shots_from=shots_from,
        trace=trace,
        mode=mode,
        seed=seed,
    )
    job = plan(system, task, as_, options)
    folder = Path(out) if out is not None else job.folder(RESULTS)
    resources = Resources(max_batch, kv_memory, progress, speculation(speculate))
    return run_job(job, folder, models or Models(system), resources)


def evaluate_all(
    system: System,
    task: str,
    options: Options,
    *,
    out: str | Path | None = None,
    resources: Resources | None = None,
    models: Models | None = None,
    judge: Callable[[Path], Run] | None = None,
) -> dict[Role, Run]:
    """Evaluate every role that the system has; each model is loaded once. `out` gets one folder per role.

    alpha is the proxy's. The models of the other roles are released before `tuned` is loaded. `judge` is
    given the folder of every finished run at the end and returns the judged run.
    """
    jobs: dict[Role, Job] = {}
    for role in system.roles:
        own = options if role == "proxy" else dataclasses.replace(options, alpha=None)
        if options.trace == "agreement" and role not in ("proxy", "tuned"):
            own = dataclasses.replace(own, trace="tokens")  # it is between these two
        jobs[role] = plan(system, task, role, own)
    own_models, runs = models or Models(system), dict[Role, Run]()
    folders = {
        role: Path(out) / role if out is not None else job.folder(RESULTS) for role, job in jobs.items()
    }
    for role, job in jobs.items():
        if role == "tuned":
            own_models.release(keep=["proxy", role] if options.trace == "agreement" else [role])
        runs[role] = run_job(job, folders[role], own_models, resources or Resources())
    if judge is None:
        return runs
    own_models.release(keep=[])  # a judge may be a large model as well
    return {role: judge(folder) for role, folder in folders.items()}


def generate(
    system: System,
    prompts: Sequence[str | Prompt],
    *,
    as_: str = "proxy",
    sampling: Sampling | None = None,
    alpha: AlphaSchedule | float | str | None = None,
    speculate: Speculate = "auto",
    allow_negative_alpha: bool = False,
    max_batch: int | None = None,
    kv_memory: int | None = None,
    models: Models | None = None,
) -> list[Completion]:
    """Responses to `prompts`, in their order (`sampling.n` in a row for each). A text is the plain prompt of
    all roles. `kv_memory` is in bytes, for all KV pools together.

    `speculate` never changes the tokens: "auto" lets the expert draft where that measures faster, a number
    is a fixed draft length, "off" decodes plainly.
    """
    how = speculation(speculate)
    if isinstance(prompts, str) or not all(isinstance(prompt, str | Prompt) for prompt in prompts):
        raise UserError('prompts must be a list of texts: write generate(system, ["..."])')
    role = system.require(as_)
    schedule = alpha_for(system, role, alpha, allow_negative=allow_negative_alpha)
    examples = named_by_content([Prompt(plain=p, user=p) if isinstance(p, str) else p for p in prompts])
    chosen = Sampling() if sampling is None else sampling
    decoder = Decoder(
        models or Models(system), role, max_batch=max_batch, kv_memory=kv_memory, speculation=how
    )
    for note in decoder.notes():
        warnings.warn(note, stacklevel=2)
    place = {example.id: i for i, example in enumerate(examples)}
    found = list(decoder.stream(examples, chosen, alpha=schedule))
    return sorted(found, key=lambda completion: (place[completion.example_id], completion.sample))


def named_by_content(prompts: Sequence[Prompt]) -> list[Example]:
    """Examples whose ids, and so whose sampling noise, depend on the prompt and on how often it came before:
    not on what else is asked, or in which order."""
    seen: dict[Prompt, int] = {}
    examples = []
    for prompt in prompts:
        seen[prompt] = seen.get(prompt, 0) + 1
        content = repr(dataclasses.astuple(prompt)).encode("utf-8", "backslashreplace")
        digest = hashlib.sha256(content).hexdigest()[:16]
        examples.append(Example(id=f"{digest}-{seen[prompt]}", prompt=prompt))
    return examples


def score_of(run: Run) -> Metric:
    """The metric that tables show."""
    return run.metrics[run.headline]
