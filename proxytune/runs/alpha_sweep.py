"""Evaluate the proxy under many alphas at once: one process, models loaded once, one engine in which every
row has its own alpha and the alphas of an example share its prompt.

Every alpha is a run of its own, stored as any other, and continues after an interruption in the same way.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path

import torch

from proxytune import __version__, results
from proxytune.config import AlphaSchedule, parse_alpha
from proxytune.errors import UserError
from proxytune.processes import own_folder
from proxytune.provenance import provenance
from proxytune.records import Completion, Example, Run
from proxytune.results import SWEEP, RunFolder
from proxytune.run_files import remove_strays, write_atomically
from proxytune.runs.decoders import RunDecoder
from proxytune.runs.evaluation import RESULTS, Evaluation, plan
from proxytune.runs.session import CHECKPOINT_SECONDS, RunPlan, Session, device_name, new_run
from proxytune.runs.verdicts import add_verdicts
from proxytune.terminal import Progress

MAX_ALPHAS = 100
"""Most alphas of one sweep: a mistyped step must not start ten thousand runs."""


def parse_alphas(text: str) -> list[AlphaSchedule]:
    """`0:2:0.2` (from, to and step; both ends included) or `0,0.5,first:4`, or both -> distinct alphas in
    this order."""
    found: list[AlphaSchedule] = []
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        found += _range(part) or [parse_alpha(part)]
    alphas = list(dict.fromkeys(found))
    if not 0 < len(alphas) <= MAX_ALPHAS:
        raise UserError(
            f"--alphas '{text}' names {len(alphas)} alphas: give 1 to {MAX_ALPHAS}, as 0:2:0.2 or 0,0.5,"
            "first:4"
        )
    return alphas


def _range(part: str) -> list[AlphaSchedule]:
    """FROM:TO:STEP in exact decimals, so that 0.2 * 3 is 0.6; [] for anything else."""
    try:
        start, end, step = (Decimal(number) for number in part.split(":"))
        finite = all(number.is_finite() for number in (start, end, step))
    except (InvalidOperation, ValueError):
        return []
    if not finite or step <= 0 or end < start or (end - start) / step > MAX_ALPHAS:
        raise UserError(
            f"--alphas '{part}' is no range: write FROM:TO:STEP, with FROM up to TO and a STEP above 0 that "
            f"gives at most {MAX_ALPHAS} alphas"
        )
    count = int((end - start) / step) + 1
    return [parse_alpha(f"{start + i * step:f}") for i in range(count)]


@dataclass
class SweptRun:
    """One alpha of a sweep: its run, and what is missing of it."""

    alpha: AlphaSchedule
    session: Session
    todo: dict[str, Example]
    saved: float = 0.0

    @property
    def folder(self) -> RunFolder:
        """The run's folder."""
        return self.session.folder


def sweep(
    evaluation: Evaluation, alphas: Sequence[AlphaSchedule], out: Path | None = None
) -> tuple[Path, list[Run]]:
    """Run the proxy under every alpha; -> the sweep's folder and the runs in the order of `alphas`.

    The folder is `out`, or `sweep/` in the folder that one run with the other settings has. Finished alphas
    are not run again. Raises UserError as `plan` and `RunFolder.open` do, and KeyboardInterrupt with the line
    that names what is kept.
    """
    system, options = evaluation.system, evaluation.options
    for alpha in alphas:
        alpha.check(allow_negative=options.allow_negative_alpha)
    job = plan(system, evaluation.task, "proxy", options.model_copy(update={"alpha": None}))
    if options.defer is not None:
        raise UserError("--defer has no alpha: leave it out of a sweep")
    folder = own_folder(out if out is not None else job.folder(RESULTS) / "sweep")
    evaluation.agree(job, responses=len(alphas))
    judging, sandbox = evaluation.judging, evaluation.sandbox
    runs = _run(job, alphas, folder, evaluation)
    done = [runs[alpha] for alpha in alphas]
    folders = [folder / run_name(alpha) for alpha in alphas]
    if sandbox is not None and job.task.execute is not None:
        items = {example.id: example.target for example in job.data.examples}
        done = [add_verdicts(path, items, sandbox) for path in folders]
    if judging is not None:
        evaluation.models.release(keep=[])  # a judge may be a large model as well
        done = [judging(path) for path in folders]
    return folder, done


def _run(
    job: RunPlan, alphas: Sequence[AlphaSchedule], folder: Path, evaluation: Evaluation
) -> dict[AlphaSchedule, Run]:
    """Decode what is missing of every alpha; -> the finished runs."""
    jobs = {a: dataclasses.replace(job, spec=job.spec.model_copy(update={"alpha": a})) for a in alphas}
    spec, decode = job.spec, evaluation.decode
    with contextlib.ExitStack() as stack:
        progress = stack.enter_context(
            Progress(f"{spec.system.name} {spec.task} sweep", job.task.headline, decode.progress)
        )
        made = provenance(__version__, device_name(), decode.threads or torch.get_num_threads())
        parts: list[SweptRun] = []
        runs: dict[AlphaSchedule, Run] = {}
        for alpha, one in jobs.items():
            new = new_run(one, made)
            opened = stack.enter_context(RunFolder.open(folder / run_name(alpha), new))
            if opened.run.status == "done":
                runs[alpha] = opened.run
            else:
                session = Session(one, opened, evaluation.sandbox, continued=opened.run is not new)
                parts.append(_part(alpha, session))
        remove_strays(folder)
        _mark(folder, job)
        if runs:
            progress.note(f"{len(runs)} of {len(jobs)} alphas in '{folder}' are done already")
        if parts:
            _decode(parts, job, folder, evaluation, progress)
        for part in parts:
            runs[part.alpha] = part.session.finish()
        _mark(folder, job)
        for alpha in alphas:
            for note in runs[alpha].notes:
                progress.note(f"{run_name(alpha)}: {note}")
        return runs


def run_name(alpha: AlphaSchedule) -> str:
    """The folder of one alpha: `alpha=0.4`, `alpha=first-16`."""
    return f"alpha={alpha.text.replace(':', '-')}"


def _part(alpha: AlphaSchedule, session: Session) -> SweptRun:
    """One alpha that is not finished."""
    folder = session.folder
    folder.save(folder.run.model_copy(update={"cost": session.before}))  # a kill must not undo the count
    examples = session.job.data.examples
    todo = {example.id: example for example in examples if example.id not in folder.done}
    return SweptRun(alpha, session, todo)


def _mark(folder: Path, job: RunPlan) -> None:
    """Write sweep.json, which marks the folder and adds up the seconds of its runs."""
    costs = [results.read_run(path.parent).cost for path in sorted(folder.glob(f"*/{results.RUN}"))]
    content = {
        "system": job.spec.system.name,
        "task": job.spec.task,
        "seconds": sum(cost.seconds for cost in costs),
        "sessions": max(cost.sessions for cost in costs),
    }
    write_atomically(folder / SWEEP, (json.dumps(content, indent=2) + "\n").encode())


def _decode(
    parts: Sequence[SweptRun], job: RunPlan, folder: Path, evaluation: Evaluation, progress: Progress
) -> None:
    """Decode, score and store what is missing of all parts."""
    n = len(job.data.examples) * len(parts)
    missing = sum(len(part.todo) for part in parts)
    if not missing:
        return
    if missing < n:
        progress.note(f"continuing '{folder}': {n - missing} of {n} examples of all alphas are done")
    with contextlib.closing(evaluation.opener(job.spec, evaluation.decode)) as decoder:
        _store(decoder, parts, job, folder, progress)


def _store(
    decoder: RunDecoder, parts: Sequence[SweptRun], job: RunPlan, folder: Path, progress: Progress
) -> None:
    """Store what comes, as it comes."""
    n = len(job.data.examples) * len(parts)
    missing = sum(len(part.todo) for part in parts)
    for note in (*decoder.notes(), *job.data.notes):
        progress.note(note)
    for part in parts:
        part.session.decoder, part.saved = decoder, time.monotonic()
        part.folder.save(part.session.so_far())
    scores = [score for part in parts for score in part.session.scores_so_far()]
    progress.begin(n, n - missing, scores, decoder.work)
    try:
        for part, example, completions in _finished(_stream(decoder, parts, job), parts):
            row = part.session.store(example, completions)
            progress.advance(row["scores"].get(job.task.headline))
            if time.monotonic() - part.saved > CHECKPOINT_SECONDS:
                part.folder.save(part.session.so_far())
                part.saved = time.monotonic()
    except KeyboardInterrupt:
        left = n - sum(len(part.folder.done) for part in parts)
        raise KeyboardInterrupt(
            f"interrupted: {n - left} of {n} examples of all alphas are kept in '{folder}'; the same command "
            "continues"
        ) from None
    finally:
        for part in parts:
            with contextlib.suppress(UserError):  # the disk may be what failed
                part.folder.save(part.session.so_far())


def _stream(
    decoder: RunDecoder, parts: Sequence[SweptRun], job: RunPlan
) -> Iterator[tuple[AlphaSchedule, Completion]]:
    """Completions of everything that is missing. Examples that lack the same alphas go together."""
    spec, lacking = job.spec, dict[tuple[AlphaSchedule, ...], list[Example]]()
    for example in job.data.examples:
        alphas = tuple(part.alpha for part in parts if example.id in part.todo)
        if alphas:
            lacking.setdefault(alphas, []).append(example)
    texts = job.task.continuations
    if texts is None:
        asked = [(example, alphas) for alphas, examples in lacking.items() for example in examples]
        yield from decoder.sweep(asked, spec.sampling, task=spec.task, trace=spec.trace, forced=spec.forced)
        return
    for alphas, examples in lacking.items():
        yield from decoder.likelihood_sweep(examples, texts, alphas)


def _finished(
    stream: Iterator[tuple[AlphaSchedule, Completion]], parts: Sequence[SweptRun]
) -> Iterator[tuple[SweptRun, Example, list[Completion]]]:
    """Every example of every part, as soon as all of its completions are there."""
    by_alpha = {part.alpha: part for part in parts}
    waiting: dict[tuple[AlphaSchedule, str], list[Completion]] = {}
    for alpha, completion in stream:
        part, where = by_alpha[alpha], (alpha, completion.example_id)
        group = waiting.setdefault(where, [])
        group.append(completion)
        example = part.todo[completion.example_id]
        if len(group) == part.session.job.responses(example):
            del waiting[where]
            yield part, example, sorted(group, key=lambda c: c.sample)
