"""Evaluate a role of a system on a task, and generate from prompts: examples -> decoder -> rows -> scores ->
Run.

What is finished is stored at once (results.py); metrics are computed at the end from the stored rows, so that
a run that was interrupted and continued says the same as one that was not.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from proxytune import __version__, results
from proxytune.config import AlphaSchedule, Mode, Role, RunSpec, Sampling, System, TraceKind, parse_alpha
from proxytune.decode import Decoder, DecodeStats
from proxytune.errors import UserError
from proxytune.models import Models
from proxytune.progress import Progress
from proxytune.provenance import provenance
from proxytune.records import Completion, Cost, Example, Metric, Prompt, RoleMemory, Run
from proxytune.results import Row, RunFolder
from proxytune.run_rows import prediction, whole_examples
from proxytune.sandbox import Sandbox
from proxytune.tasks import Dataset, Task, get_task, read_source

CHECKPOINT_SECONDS = 10.0
"""How often the cost so far is written to run.json while a run is going on."""
RESULTS = Path("results")
"""Where runs go unless another folder is named."""
ORDER: tuple[Role, ...] = ("base", "expert", "antiexpert", "proxy", "tuned")
"""The order in which all roles are evaluated: the second large model comes last, when the others can go."""


@dataclass(frozen=True)
class Job:
    """A run that can be started: its settings, what they are by default, and its examples."""

    task: Task
    data: Dataset
    spec: RunSpec
    defaults: RunSpec

    def folder(self, root: Path) -> Path:
        """Where the run lives under a folder of results."""
        return results.folder_for(root, self.spec, self.defaults)

    def responses(self, example: Example) -> int:
        """How many completions an example gets."""
        texts = self.task.continuations
        return self.spec.sampling.n if texts is None else len(texts(example))


class Meter(Protocol):
    """What knows the price of a run so far: its decoder, or its share of one."""

    stats: DecodeStats

    @property
    def memory(self) -> dict[str, RoleMemory]:
        """Bytes per model."""
        ...


@dataclass(frozen=True)
class Resources:
    """How a run is computed; nothing here changes what is generated."""

    max_batch: int | None = None
    kv_memory: int | None = None
    """Bytes for the KV pools of all models."""
    progress: bool = True
    sandbox: Sandbox | None = None
    """Runs the code that responses hold; without one they are stored without verdicts."""


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
    for named in system.data:
        get_task(named)  # a mistyped task there would silently mean the hub
    if options.mode == "likelihood" and options.trace != "off":
        raise UserError("a trace is of generated tokens: leave --trace out with --mode likelihood")
    if options.trace == "agreement":
        system.require_agreement(role)
    alpha = alpha_for(system, role, options.alpha, allow_negative=options.allow_negative_alpha)
    usual = system.data.get(task, "hub")
    source = usual if options.data is None else options.data
    data = read_source(
        found, source, options.limit, shots=options.shots, shots_from=options.shots_from, seed=options.seed
    )
    settings = found.sampling if options.sampling is None else options.sampling
    spec = RunSpec(
        task=task,
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
    usual_name = usual if usual in ("generated", "hub") else Path(usual).name
    plain |= {"alpha": system.alpha, "sampling": found.sampling, "data": usual_name}
    return Job(found, data, spec, spec.model_copy(update=plain))


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
    out: str | Path | None = None,
    trace: TraceKind = "off",
    mode: Mode = "generate",
    seed: int = 0,
    max_batch: int | None = None,
    kv_memory: int | None = None,
    models: Models | None = None,
    progress: bool = True,
) -> Run:
    """Evaluate `system` on a task as one role, and return its Run.

    Writes to `out`, or to `results/<system>/<task>/<role>/`. An unfinished run with the same settings is
    continued; a finished one is returned as it is. Raises UserError for bad input and for a folder that holds
    other settings.
    """
    options = Options(
        alpha=alpha, sampling=sampling, data=data, limit=limit, shots=shots, trace=trace, mode=mode, seed=seed
    )
    job = plan(system, task, as_, options)
    folder = Path(out) if out is not None else job.folder(RESULTS)
    return run_job(job, folder, models or Models(system), Resources(max_batch, kv_memory, progress))


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
    for role in (role for role in ORDER if role in system.roles):
        own = options if role == "proxy" else dataclasses.replace(options, alpha=None)
        jobs[role] = plan(system, task, role, own)
    own_models, runs = models or Models(system), dict[Role, Run]()
    folders = {
        role: Path(out) / role if out is not None else job.folder(RESULTS) for role, job in jobs.items()
    }
    for role, job in jobs.items():
        if role == "tuned":
            own_models.release(keep=[role])
        runs[role] = run_job(job, folders[role], own_models, resources or Resources())
    return runs if judge is None else {role: judge(folder) for role, folder in folders.items()}


def run_job(job: Job, path: Path, models: Models, resources: Resources) -> Run:
    """Start or continue a run in the folder `path`, and return it finished.

    Raises UserError as `RunFolder.open` does, and KeyboardInterrupt with the line that says what is kept.
    """
    made = provenance(__version__, device_name(), torch.get_num_threads())
    new = Run(status="running", spec=job.spec, headline=job.task.headline, started=now(), made=made)
    with (
        RunFolder.open(path, new) as folder,
        Progress(_title(job), job.task.headline, resources.progress) as progress,
    ):
        if folder.run.status == "done":
            progress.note(
                f"'{path}' is done already: this is its stored result (delete the folder to run it again)"
            )
            return folder.run
        if folder.cut:
            progress.note(
                f"'{path / results.PREDICTIONS}': cut off a last line that was torn when the run was stopped"
            )
        if folder.run is not new:
            progress.note(
                f"continuing '{path}': {len(folder.done)} of {len(job.data.examples)} examples are done"
            )
        session = Session(job, folder, continued=folder.run is not new)
        folder.save(folder.run.model_copy(update={"cost": session.before}))  # a kill must not undo the count
        try:
            session.decode(models, resources, progress)
        except KeyboardInterrupt:
            done, n = len(folder.done), len(job.data.examples)
            raise KeyboardInterrupt(
                f"interrupted: {done} of {n} examples are kept in '{path}'; the same command continues"
            ) from None
        return session.finish()


class Session:
    """One process's part of a run."""

    def __init__(self, job: Job, folder: RunFolder, *, continued: bool) -> None:
        self.job, self.folder = job, folder
        before = folder.run.cost
        self.before = before.model_copy(update={"sessions": before.sessions + 1}) if continued else before
        self.meter: Meter | None = None

    def decode(self, models: Models, resources: Resources, progress: Progress) -> None:
        """Decode, score and store the examples that are missing."""
        spec, done = self.job.spec, self.folder.done
        todo = [example for example in self.job.data.examples if example.id not in done]
        if not todo:
            return
        decoder = Decoder(
            models,
            spec.role,
            max_batch=resources.max_batch,
            kv_memory=resources.kv_memory,
            agreement=spec.trace == "agreement",
        )
        self.meter = decoder
        for note in decoder.notes():
            progress.note(note)
        for note in self.job.data.notes:
            progress.note(note)
        counts = {example.id: self.job.responses(example) for example in todo}
        stats, n = decoder.stats, len(self.job.data.examples)
        progress.begin(n, len(done), self.scores_so_far(), lambda: stats.generated_tokens)
        saved = time.monotonic()
        try:
            for example, completions in whole_examples(self._stream(decoder, todo), todo, counts):
                row = self.store(example, completions, resources.sandbox)
                progress.advance(row["scores"].get(self.job.task.headline))
                if time.monotonic() - saved > CHECKPOINT_SECONDS:
                    self.folder.save(self.so_far())
                    saved = time.monotonic()
        except BaseException:
            with contextlib.suppress(UserError):  # the disk may be what failed
                self.folder.save(self.so_far())
            raise

    def _stream(self, decoder: Decoder, todo: Sequence[Example]) -> Iterator[Completion]:
        """Completions of the missing examples: generated, or given texts with their log-probabilities."""
        spec = self.job.spec
        alpha = spec.alpha if spec.role == "proxy" else None
        if self.job.task.continuations is not None:
            return decoder.likelihoods(todo, self.job.task.continuations, alpha=alpha)
        return decoder.stream(
            todo, spec.sampling, alpha=alpha, task=spec.task, trace=spec.trace, forced=spec.forced
        )

    def store(self, example: Example, completions: Sequence[Completion], sandbox: Sandbox | None) -> Row:
        """Append the row of one finished example, and its traces."""
        row = prediction(self.job.task, example, completions, sandbox)
        traces = [
            {"id": example.id, "sample": c.sample, "tokens": [token.row() for token in c.trace]}
            for c in completions
            if self.job.spec.trace != "off"
        ]
        self.folder.append(row, traces)
        return row

    def scores_so_far(self) -> list[float]:
        """The headline scores of the rows that an earlier session stored."""
        scores = (
            row.get("scores", {}).get(self.job.task.headline) for row in results.read_rows(self.folder.path)
        )
        return [score for score in scores if score is not None]

    def so_far(self) -> Run:
        """The run as it stands."""
        return self.folder.run.model_copy(update={"n": len(self.folder.done), "cost": self._cost()})

    def _cost(self) -> Cost:
        """What all sessions took."""
        if self.meter is None:
            return self.before
        stats, before = self.meter.stats, self.before
        return Cost(
            seconds=before.seconds + stats.seconds,
            prompt_tokens=before.prompt_tokens + stats.prompt_tokens,
            generated_tokens=before.generated_tokens + stats.generated_tokens,
            memory=_peaks(before.memory, self.meter.memory),
            preemptions=before.preemptions + stats.preemptions,
            sessions=before.sessions,
        )

    def finish(self) -> Run:
        """Compute the metrics from the stored rows, in the order of the examples, and close the run."""
        order = [example.id for example in self.job.data.examples]
        rows = {row["id"]: row for row in results.read_rows(self.folder.path)}
        metrics = self.job.task.metrics([rows[example_id] for example_id in order])
        update = {
            "status": "done",
            "metrics": metrics,
            "headline": self.job.task.headline_of(metrics),
            "finished": now(),
        }
        run = self.so_far().model_copy(update=update)
        self.folder.finish(run, order)
        return run


def generate(
    system: System,
    prompts: Sequence[str | Prompt],
    *,
    as_: str = "proxy",
    sampling: Sampling | None = None,
    alpha: AlphaSchedule | float | str | None = None,
    speculate: Literal["auto", "off"] | int = "auto",
    allow_negative_alpha: bool = False,
    max_batch: int | None = None,
    kv_memory: int | None = None,
    models: Models | None = None,
) -> list[Completion]:
    """Responses to `prompts`, in their order (`sampling.n` in a row for each). A text is the plain prompt of
    all roles. `kv_memory` is in bytes, for all KV pools together.

    `speculate` never changes the tokens. This version decodes without speculation, which is what "auto" and
    "off" (or 0) give; a draft length above 0 is a UserError.
    """
    if speculate not in ("auto", "off", 0):
        raise UserError(f"speculate = {speculate!r}: this version decodes plainly; give 'auto' or 'off'")
    if isinstance(prompts, str) or not all(isinstance(prompt, str | Prompt) for prompt in prompts):
        raise UserError('prompts must be a list of texts: write generate(system, ["..."])')
    role = system.require(as_)
    schedule = alpha_for(system, role, alpha, allow_negative=allow_negative_alpha)
    examples = named_by_content([Prompt(plain=p, user=p) if isinstance(p, str) else p for p in prompts])
    chosen = Sampling() if sampling is None else sampling
    decoder = Decoder(models or Models(system), role, max_batch=max_batch, kv_memory=kv_memory)
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


def device_name() -> str:
    """What the models run on unless a device map says otherwise."""
    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu"


def _peaks(a: dict[str, RoleMemory], b: dict[str, RoleMemory]) -> dict[str, RoleMemory]:
    """Per model the larger KV peak of two sessions."""
    peak = {name: max(side[name].kv_peak for side in (a, b) if name in side) for name in {**a, **b}}
    return {name: {**a, **b}[name].model_copy(update={"kv_peak": kv}) for name, kv in peak.items()}


def _title(job: Job) -> str:
    """What the progress display calls a run."""
    alpha = f" alpha {job.spec.alpha.text}" if job.spec.role == "proxy" and job.spec.alpha.text != "1" else ""
    return f"{job.spec.system.name} {job.spec.task} {job.spec.role}{alpha}" + (
        " (opener forced)" if job.spec.forced else ""
    )


def now() -> str:
    """The time, in UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def score_of(run: Run) -> Metric:
    """The metric that tables show."""
    return run.metrics[run.headline]
