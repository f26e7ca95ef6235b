"""Evaluate a role of a system on a task: examples -> decoder -> rows -> scores -> Run.

How one run is started, continued and closed: session.py."""

from __future__ import annotations

import sys
from collections.abc import Collection
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from proxytune import results
from proxytune.black_box import ApiClient
from proxytune.config import (
    SOURCES,
    AlphaSchedule,
    Role,
    RunSpec,
    System,
    as_system,
    parse_alpha,
)
from proxytune.errors import UserError
from proxytune.models import Models
from proxytune.options import DecodeOptions, JudgeOptions, RunOptions
from proxytune.processes import own_folder
from proxytune.records import Run
from proxytune.runs.decoders import OpenDecoder, client_of, decoder_here
from proxytune.runs.judging import Dialogue, Judging, judging_of
from proxytune.runs.session import RunPlan, run_job
from proxytune.runs.spending import agree, forecast_of
from proxytune.runs.verdicts import open_sandbox
from proxytune.sandbox import Sandbox
from proxytune.tasks import Dataset, Task, get_task, read_source
from proxytune.tasks.own import read_task

RESULTS = Path("results")
"""Where runs go unless another folder is named."""


def plan(system: System, task: str, as_: str, options: RunOptions) -> RunPlan:
    """Check all settings of a run and read its examples; UserError where something does not fit."""
    found, role = read_task(task, options.mode), system.require(as_)
    for named in (*system.data, *system.judges):
        get_task(named)  # a mistyped task there would silently mean the hub
    if options.mode != "generate" and options.trace != "off":
        raise UserError(f"a trace is of generated tokens: leave --trace out with --mode {options.mode}")
    if options.defer is not None and system.endpoint is None:
        raise UserError(f"--defer is for a base behind an API: that of system '{system.name}' is here")
    if options.trace == "agreement":
        system.require_agreement(role)
    source = system.data.get(found.name, "hub") if options.data is None else options.data
    data = read_source(
        found, source, options.limit, shots=options.shots, shots_from=options.shots_from, seed=options.seed
    )
    return _job(system, role, options, found, data)


def planned_folder(system: System, task: str, role: Role, options: RunOptions, root: Path) -> Path:
    """Where a run from the system's usual data will be kept, without reading the data."""
    source = system.data.get(task, "hub")
    name = source if source in SOURCES else Path(source).name
    return _job(system, role, options, get_task(task, options.mode), Dataset((), name, "")).folder(root)


def _job(system: System, role: Role, options: RunOptions, task: Task, data: Dataset) -> RunPlan:
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
        defer=options.defer if role == "proxy" else None,
        forced=options.forced,
    )
    plain: dict[str, Any] = {"limit": None, "shots": 0, "trace": "off", "mode": "generate", "forced": None}
    plain |= {"defer": None}
    usual_name = usual if usual in SOURCES else Path(usual).name
    plain |= {"alpha": system.alpha, "sampling": task.sampling, "data": usual_name}
    return RunPlan(task, data, spec, spec.model_copy(update=plain))


def alpha_for(
    system: System, role: Role, asked: AlphaSchedule | float | str | None, *, allow_negative: bool
) -> AlphaSchedule | None:
    """The checked alpha of the proxy; None for the other roles, for which asking for one is a UserError."""
    if role == "proxy":
        return parse_alpha(system.alpha if asked is None else asked).check(allow_negative=allow_negative)
    if asked is not None:
        raise UserError(f"alpha acts on the proxy only: leave it out when running as '{role}'")
    return None


@dataclass(frozen=True)
class Evaluation:
    """A task to be evaluated on a system, as any of its roles. What scores it, a sandbox and a judge, is
    checked when the first run is about to start."""

    system: System
    task: str
    options: RunOptions = field(default_factory=RunOptions)
    decode: DecodeOptions = field(default_factory=DecodeOptions)
    judge: JudgeOptions = field(default_factory=JudgeOptions)
    dialogue: Dialogue = field(default_factory=Dialogue)
    loaded: Models | None = None
    """Models that are loaded already, or how they are to be loaded."""
    open_decoder: OpenDecoder | None = None
    """What decodes in place of this process's own models: workers elsewhere."""

    @cached_property
    def models(self) -> Models:
        """The models of the system, each loaded when it is first needed."""
        return self.loaded or Models(self.system)

    @property
    def opener(self) -> OpenDecoder:
        """What opens the decoder of a run."""
        return self.open_decoder or decoder_here(self.models, self.client)

    @cached_property
    def client(self) -> ApiClient | None:
        """What asks the base, where it is behind an API."""
        return client_of(self.system, self.decode.api)

    @cached_property
    def sandbox(self) -> Sandbox | None:
        """What runs the task's code; None where that was not allowed."""
        return open_sandbox(read_task(self.task, self.options.mode), self.judge.code)

    @cached_property
    def judging(self) -> Judging | None:
        """Who judges the runs; None where nobody has to."""
        task = read_task(self.task, self.options.mode)
        return judging_of(self.system, task, self.judge, self.options.mode, self.dialogue)

    def check(self) -> None:
        """Find out now, and not after hours of decoding, that a judge or a sandbox is missing."""
        _ = self.judging, self.sandbox
        if self.client is not None:
            self.client.check()

    def agree(self, job: RunPlan, responses: int = 1) -> None:
        """The consent to what a run costs with a base behind an API. UserError without it."""
        if self.client is not None and job.spec.role in ("base", "proxy"):
            agree(self.client, self.dialogue, forecast_of(self.client, job, responses))

    def run(self, as_: str, out: Path | None = None) -> tuple[Run, Path]:
        """Evaluate one role; -> its Run and its folder: `out`, or `results/<system>/<task>/<role>/`."""
        role, judging, sandbox = self.system.require(as_), self.judging, self.sandbox
        job = plan(self.system, self.task, role, self.options)
        folder = own_folder(out or job.folder(RESULTS))
        if not is_done(folder):
            self.agree(job)
        made = run_job(job, folder, self.opener, self.decode, sandbox)
        if judging is None:
            return made, folder
        self.models.release(keep=[])  # a judge may be a large model as well
        return judging(folder), folder

    def run_all(self, out: Path | None = None, roles: Collection[Role] | None = None) -> dict[Role, Run]:
        """Evaluate these roles, or every role that the system has; each model is loaded once. `out` gets one
        folder per role.

        alpha is the proxy's. The models of the other roles are released before `tuned` is loaded, and all
        models before the judge."""
        judging, sandbox, runs = self.judging, self.sandbox, dict[Role, Run]()
        jobs = {
            role: plan(self.system, self.task, role, self._options_of(role))
            for role in self.system.roles
            if roles is None or role in roles
        }
        folders = {
            role: own_folder(out / role if out is not None else job.folder(RESULTS))
            for role, job in jobs.items()
        }
        shared = False  # in multiple choice the base and the proxy share their calls
        for role, job in jobs.items():
            if not is_done(folders[role]) and not shared:
                self.agree(job)
                shared = job.task.continuations is not None and role in ("base", "proxy")
        for role, job in jobs.items():
            if role == "tuned":
                agreement = self.options.trace == "agreement"
                self.models.release(keep=["proxy", role] if agreement else [role])
            runs[role] = run_job(job, folders[role], self.opener, self.decode, sandbox)
        if judging is None:
            return runs
        self.models.release(keep=[])
        return {role: judging(folder) for role, folder in folders.items()}

    def _options_of(self, role: Role) -> RunOptions:
        """alpha is of the proxy, and a trace of agreement of proxy and tuned: the others do without."""
        own: dict[str, Any] = {} if role == "proxy" else {"alpha": None, "defer": None}
        if self.options.trace == "agreement" and role not in ("proxy", "tuned"):
            own["trace"] = "tokens"
        return self.options.model_copy(update=own)


def evaluate(
    system: System | str | Path,
    task: str,
    *,
    as_: str = "proxy",
    limit: int | None = None,
    out: str | Path | None = None,
    options: RunOptions | None = None,
    decode: DecodeOptions | None = None,
    judge: JudgeOptions | str | None = None,
) -> Run:
    """Evaluate `system` (a System, a name or the path of a YAML file) on a task as one role, and return its
    Run: what `proxytune eval` does.

    Writes to `out`, or to `results/<system>/<task>/<role>/`. An unfinished run with the same settings is
    continued; a finished one is returned as it is. `limit` takes only the first items, as in `options`.
    `judge` is who judges (a model, "default" or "none"), or the record that also gives the consent to pay and
    to run code; `decode.api` is the consent to pay for a base behind an API. Raises UserError for bad input
    and for a folder that holds other settings.
    """
    show_in_notebooks()
    asked, who = asked_for(options, limit, judge)
    evaluation = Evaluation(as_system(system), task, asked, decode or DecodeOptions(), who)
    return evaluation.run(as_, None if out is None else Path(out))[0]


def is_done(folder: Path) -> bool:
    """Whether a folder holds a finished run."""
    return (folder / results.RUN).exists() and results.read_run(folder).status == "done"


def show_in_notebooks() -> None:
    """In a notebook, show runs and responses as the report does."""
    if "IPython" in sys.modules:
        from proxytune.report import notebook

        notebook.show_in_notebooks()


def asked_for(
    options: RunOptions | None, limit: int | None, judge: JudgeOptions | str | None
) -> tuple[RunOptions, JudgeOptions]:
    """The records of what Python callers may write in short."""
    asked = options or RunOptions()
    if limit is not None:
        asked = asked.model_copy(update={"limit": limit})
    return asked, JudgeOptions(judge=judge) if isinstance(judge, str) else judge or JudgeOptions()
