"""The body of `proxytune eval`, and what it shares with the other commands that run models."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from pydantic import ValidationError
from rich.console import Console

from proxytune.config import Mode, ModelSpec, Sampling, System, TraceKind, explain, load_system
from proxytune.errors import UserError
from proxytune.records import Run
from proxytune.sandbox.sandbox import Sandbox
from proxytune.tasks.task import Task

if TYPE_CHECKING:
    from proxytune.models.loading import Models
    from proxytune.runs.evaluate import Options, Resources

NOT_ALLOWED = (
    "code is stored but not run, so there is no score: --allow-code-execution runs it in a sandbox (the same "
    "command with it, or `proxytune judge TASK RUN`, adds the verdicts to a finished run)"
)
_UNITS = {
    "": 1,
    "K": 10**3,
    "M": 10**6,
    "G": 10**9,
    "T": 10**12,
    "KI": 2**10,
    "MI": 2**20,
    "GI": 2**30,
    "TI": 2**40,
}


@dataclass(frozen=True)
class Code:
    """What the options said about running model-written code."""

    allowed: bool
    sandbox: str
    python: str | None

    def open(self, task: Task) -> Sandbox | None:
        """The sandbox, tried out; None where it was not asked for. UserError for a task that has no code."""
        if not self.allowed:
            return None
        if task.execute is None:
            raise UserError(f"task '{task.name}' runs no code: leave --allow-code-execution out")
        found = Sandbox.open(self.sandbox, self.python or sys.executable)
        print(f"code runs in the sandbox '{found.backend}'", file=sys.stderr, flush=True)
        return found


@dataclass(frozen=True)
class Decoding:
    """What the options said about how to decode; nothing here changes a token."""

    batch: int | None
    kv_memory: str | None
    speculate: str
    drafter: str | None

    def resources(self, sandbox: Sandbox | None) -> Resources:
        """The same, checked."""
        if self.batch is not None and self.batch < 1:
            raise UserError(f"--batch {self.batch} must be at least 1")
        kv_memory = None if self.kv_memory is None else parse_size(self.kv_memory)

        from proxytune.runs.evaluate import Resources
        from proxytune.speculate import speculation

        return Resources(
            max_batch=self.batch,
            kv_memory=kv_memory,
            speculation=speculation(self.speculate, self.drafter),
            sandbox=sandbox,
        )


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the options of `eval` said."""

    task: str
    as_: str
    alpha: str | None
    changed: Mapping[str, int | float]
    """Sampling settings that replace the task's."""
    data: str | None
    limit: int | None
    shots: int
    shots_from: str | None
    out: Path | None
    trace: TraceKind
    mode: str
    seed: int
    how: Decoding
    allow_negative_alpha: bool
    trust_remote_code: bool
    code: Code


def evaluate(
    system: System, asked: Request, *, json_only: bool, judge: Callable[[Path], Run] | None = None
) -> None:
    """Run one role, or all of them, judge the runs, and print the result."""
    from proxytune.tasks import get_task

    task = get_task(asked.task, read_mode(asked.mode))  # an unknown task must not wait for torch
    if asked.as_ != "all":
        system.require(asked.as_)
    options, resources, models = prepared(system, task, asked)

    from proxytune.runs import evaluate as run

    if asked.as_ == "all":
        runs = run.evaluate_all(
            system, asked.task, options, out=asked.out, resources=resources, models=models, judge=judge
        )
        print_all(list(runs.values()), json_only=json_only)
    else:
        job = run.plan(system, asked.task, asked.as_, options)
        folder = asked.out or job.folder(run.RESULTS)
        made = run.run_job(job, folder, models, resources)
        models.release(keep=[])  # a judge may be a large model as well
        print_one(made if judge is None else judge(folder), folder, json_only=json_only)


def prepared(system: System, task: Task, asked: Request) -> tuple[Options, Resources, Models]:
    """What the options of a command say, checked, in the terms of `run`; nothing is loaded yet."""
    sampling = sampling_from(**{**task.sampling.model_dump(), **asked.changed}) if asked.changed else None
    sandbox = asked.code.open(task)
    if task.execute is not None and sandbox is None:
        print(f"note: {NOT_ALLOWED}", file=sys.stderr, flush=True)

    from proxytune.models.loading import Models
    from proxytune.runs import evaluate as run

    options = run.Options(
        alpha=asked.alpha,
        sampling=sampling,
        data=asked.data,
        limit=asked.limit,
        shots=asked.shots,
        shots_from=asked.shots_from,
        trace=asked.trace,
        mode=read_mode(asked.mode),
        seed=asked.seed,
        allow_negative_alpha=asked.allow_negative_alpha,
    )
    resources = asked.how.resources(sandbox)
    models = Models(system, trust_remote_code=asked.trust_remote_code, on_load=tell_loading)
    return options, resources, models


def print_one(run: Run, folder: Path, *, json_only: bool) -> None:
    """One run: its metrics, its price, its folder."""
    if json_only:
        print_json(run.model_dump(mode="json"))
        return
    from proxytune.report.tables import percent, role_rows, size

    row = role_rows([run])[0]
    remark = "" if run.spec.remark is None else f" ({run.spec.remark})"
    print(f"{run.spec.system.name} as {run.spec.role} on {run.spec.task}: {run.n} examples{remark}")
    for name, metric in sorted(run.metrics.items(), key=lambda pair: pair[0] != run.headline):
        print(f"  {name:22} {percent(metric)}")
    if row.ms_per_token is not None:
        told = (
            f"{run.cost.generated_tokens} tokens in {run.cost.seconds:.1f} s ({row.ms_per_token:.2f} ms each)"
        )
        print(f"  {told}, memory {size(row.memory)}")
    if run.cost.acceptance is not None and run.cost.tokens_per_step is not None:
        print(
            f"  speculation: {run.cost.acceptance:.0%} of drafts accepted, "
            f"{run.cost.tokens_per_step:.2f} tokens per step"
        )
    print(f"stored in {folder}")


def print_all(runs: list[Run], *, json_only: bool) -> None:
    """The roles of a system under each other, with the gap closed."""
    from proxytune.report.tables import rich_table, role_rows

    rows = role_rows(runs)
    if json_only:
        gap = next((row.gap_closed for row in rows if row.role == "proxy"), None)
        named = {run.spec.role: run.model_dump(mode="json") for run in runs}
        print_json({"task": runs[0].spec.task, "n": runs[0].n, "gap_closed": gap, "runs": named})
        return
    console().print(rich_table(rows))


def print_json(content: object) -> None:
    """The one JSON object of --json."""
    print(json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False))


def console() -> Console:
    """stdout for tables: as wide as they are where it is no terminal."""
    return Console() if sys.stdout.isatty() else Console(width=140)


def read_system(name: str, vocab: str | None) -> System:
    """The system, with --vocab applied."""
    system = load_system(name)
    if vocab is None:
        return system
    if vocab not in ("strict", "intersect"):
        raise UserError(f"--vocab '{vocab}' must be strict or intersect")
    return system.model_copy(update={"vocab": vocab})


def read_mode(text: str) -> Mode:
    """The value of --mode."""
    for mode in get_args(Mode):
        if text == mode:
            return mode  # type: ignore[no-any-return]
    raise UserError(f"--mode '{text}' must be {' or '.join(get_args(Mode))}")


def read_trace(text: str | None) -> TraceKind:
    """The value of --trace."""
    if text is None:
        return "off"
    for kind in get_args(TraceKind):
        if text == kind:
            return kind  # type: ignore[no-any-return]
    raise UserError(f"--trace '{text}' must be {' or '.join(get_args(TraceKind)[1:])}")


def sampling_from(**values: Any) -> Sampling:
    """Sampling settings of which those that are None keep their default; UserError names the one that is out
    of bounds."""
    try:
        return Sampling(**{name: value for name, value in values.items() if value is not None})
    except ValidationError as error:
        name, _, reason = explain(error).partition(": ")
        raise UserError(f"--{name.replace('_', '-')}: {reason}") from None


def parse_size(text: str) -> int:
    """`4GB`, `512 MiB` or a number of bytes -> bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?", text.strip().upper())
    if match is None or match[2] not in _UNITS or not (found := int(float(match[1]) * _UNITS[match[2]])):
        raise UserError(f"--kv-memory '{text}' is no amount of memory: write 4GB, 512MB or a number of bytes")
    return found


def tell_loading(name: str, spec: ModelSpec) -> None:
    """Say on stderr which model is being loaded."""
    print(f"loading {name}: {spec.model or spec.adapter}", file=sys.stderr, flush=True)
