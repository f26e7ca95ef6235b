"""One process's part of a run: decode what is missing, store it, and close the run with its metrics.

What is finished is stored at once (proxytune/results.py). Metrics are computed at the end from the stored
rows, so that a run that was interrupted and continued has the same figures as one that was not.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from proxytune import __version__, results
from proxytune.black_box import BlackBoxDecoder
from proxytune.config import RunSpec
from proxytune.decoding import notes_on, stored_response
from proxytune.errors import UserError
from proxytune.options import DecodeOptions
from proxytune.provenance import provenance
from proxytune.records import (
    FAULT,
    Completion,
    Cost,
    Example,
    JsonRow,
    Provenance,
    RoleMemory,
    Run,
    Took,
    WorkerFacts,
)
from proxytune.results import RunFolder
from proxytune.runs.decoders import OpenDecoder, RunDecoder
from proxytune.runs.verdicts import add_verdicts
from proxytune.sandbox import Sandbox
from proxytune.tasks import Dataset, Execution, Task
from proxytune.terminal import Progress

CHECKPOINT_SECONDS = 10.0
"""How often the cost so far is written to run.json while a run is going on."""
COUNTS = tuple(one.name for one in fields(Took))
"""What each example took, by name."""


@dataclass(frozen=True)
class RunPlan:
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


def run_job(
    job: RunPlan,
    path: Path,
    open_decoder: OpenDecoder,
    decode: DecodeOptions,
    sandbox: Sandbox | None = None,
) -> Run:
    """Start or continue a run in the folder `path`, and return it finished. Code that was stored without a
    verdict, by an earlier session that was not allowed to run it, is run at the end where there is a sandbox.

    Raises UserError as `RunFolder.open` does, and KeyboardInterrupt with the line that names what is kept.
    """
    run = _decode_job(job, path, open_decoder, decode, sandbox)
    if sandbox is None or job.task.execute is None:
        return run
    items = {example.id: example.target for example in job.data.examples}
    return add_verdicts(path, items, sandbox)


def _decode_job(
    job: RunPlan, path: Path, open_decoder: OpenDecoder, decode: DecodeOptions, sandbox: Sandbox | None
) -> Run:
    """Decode, score and store what is missing."""
    made = provenance(__version__, device_name(), decode.threads or torch.get_num_threads())
    new = new_run(job, made)
    with (
        RunFolder.open(path, new) as folder,
        Progress(_title(job), job.task.headline, decode.progress) as progress,
    ):
        if folder.run.status == "done":
            progress.note(
                f"'{path}' is done already: this is its stored result (delete the folder to run it again)"
            )
            for note in folder.run.notes:
                progress.note(note)
            return folder.run
        if folder.cut:
            progress.note(
                f"'{path / results.PREDICTIONS}': cut off a last line that was torn when the run was stopped"
            )
        if folder.run is not new:
            progress.note(
                f"continuing '{path}': {len(folder.done)} of {len(job.data.examples)} examples are done"
            )
        session = Session(job, folder, sandbox, continued=folder.run is not new)
        folder.save(folder.run.model_copy(update={"cost": session.before}))  # a kill must not undo the count
        try:
            session.decode(open_decoder, decode, progress)
        except KeyboardInterrupt:
            done, n = len(folder.done), len(job.data.examples)
            raise KeyboardInterrupt(
                f"interrupted: {done} of {n} examples are kept in '{path}'; the same command continues"
            ) from None
        run = session.finish()
        for note in run.notes:
            progress.note(note)
        return run


def new_run(job: RunPlan, made: Provenance) -> Run:
    """A run of which nothing is done."""
    task = job.task
    return Run(
        status="running", spec=job.spec, headline=task.headline, facts=task.facts, started=now(), made=made
    )


class Session:
    """One process's part of a run."""

    def __init__(
        self, job: RunPlan, folder: RunFolder, sandbox: Sandbox | None = None, *, continued: bool
    ) -> None:
        """`sandbox` runs the code that responses hold; without one they are stored without verdicts."""
        self.job, self.folder, self.sandbox = job, folder, sandbox
        foreign = folder.done - {example.id for example in job.data.examples}
        if foreign:
            path = folder.path / results.PREDICTIONS
            raise UserError(f"'{path}' is damaged: '{min(foreign)}' is no example of this run")
        before = folder.run.cost
        self.before = before.model_copy(update={"sessions": before.sessions + 1}) if continued else before
        self.decoder: RunDecoder | None = None

    def decode(self, open_decoder: OpenDecoder, how: DecodeOptions, progress: Progress) -> None:
        """Decode, score and store the examples that are missing."""
        done = self.folder.done
        todo = [example for example in self.job.data.examples if example.id not in done]
        if not todo:
            return
        with contextlib.closing(open_decoder(self.job.spec, how)) as decoder:
            self.decoder = decoder
            self._decode(decoder, todo, progress)

    def _decode(self, decoder: RunDecoder, todo: Sequence[Example], progress: Progress) -> None:
        self.folder.save(self.so_far())  # what the models take, for a session that is killed
        for note in decoder.notes():
            progress.note(note)
        for note in self.job.data.notes:
            progress.note(note)
        counts = {example.id: self.job.responses(example) for example in todo}
        n = len(self.job.data.examples)
        progress.begin(n, len(self.folder.done), self.scores_so_far(), decoder.work)
        saved = time.monotonic()
        try:
            for example, completions in whole_examples(self._stream(decoder, todo), todo, counts):
                row = self.store(example, completions)
                progress.advance(row["scores"].get(self.job.task.headline))
                if time.monotonic() - saved > CHECKPOINT_SECONDS:
                    self.folder.save(self.so_far())
                    saved = time.monotonic()
        except BaseException:
            with contextlib.suppress(UserError):  # the disk may be what failed
                self.folder.save(self.so_far())
            raise

    def _stream(self, decoder: RunDecoder, todo: Sequence[Example]) -> Iterator[Completion]:
        """Completions of the missing examples: generated, or given texts with their log-probabilities."""
        spec = self.job.spec
        alpha = spec.alpha if spec.role == "proxy" else None
        if self.job.task.continuations is not None:
            return decoder.likelihoods(todo, self.job.task.continuations, alpha=alpha, task=spec.task)
        return decoder.stream(
            todo, spec.sampling, alpha=alpha, task=spec.task, trace=spec.trace, forced=spec.forced
        )

    def store(self, example: Example, completions: Sequence[Completion]) -> JsonRow:
        """Append the row of one finished example, and its traces."""
        row = self._row(example, completions)
        traces = [
            {"id": example.id, "sample": c.sample, "tokens": [token.row() for token in c.trace]}
            for c in completions
            if self.job.spec.trace != "off"
        ]
        assert self.decoder is not None, "rows come out of a decoder"
        if not set(self.decoder.remarks) <= set(self.folder.run.notes):
            self.folder.save(self.so_far())  # before the rows that they are about
        took = asdict(total([c.took for c in completions]))
        self.folder.append(row, traces, {**took, **self.decoder.place(example.id)})
        return row

    def _row(self, example: Example, completions: Sequence[Completion]) -> JsonRow:
        """The row of an example. Where the sandbox does not start any more, code is stored without a verdict
        from here on; it is run when the run ends, which says what is wrong if that is still so."""
        try:
            return prediction(self.job.task, example, completions, self.sandbox)
        except UserError:
            if self.sandbox is None:
                raise
            self.sandbox = None
            return prediction(self.job.task, example, completions)

    def scores_so_far(self) -> list[float]:
        """The headline scores of the rows that an earlier session stored."""
        scores = (
            row.get("scores", {}).get(self.job.task.headline) for row in results.read_rows(self.folder.path)
        )
        return [score for score in scores if score is not None]

    def so_far(self) -> Run:
        """The run as it is now."""
        update = {"n": len(self.folder.done), "cost": self._cost(), "notes": self._notes()}
        return self.folder.run.model_copy(update=update)

    def _notes(self) -> tuple[str, ...]:
        """What all sessions did to prompts."""
        remarks = [] if self.decoder is None else self.decoder.remarks
        return tuple(dict.fromkeys([*self.folder.run.notes, *remarks]))

    def _cost(self) -> Cost:
        """What the stored examples took."""
        records, before = list(self.folder.records.values()), self.before
        memory = before.memory if self.decoder is None else {**before.memory, **self.decoder.memory}
        peaks = [before.process_peak, *(record.get("process_peak", 0) for record in records)]
        known = [{name: record.get(name, 0) for name in COUNTS} for record in records]
        return Cost(
            memory={name: _at_its_fullest(name, one, records) for name, one in memory.items()},
            process_peak=max(peaks),
            sessions=before.sessions,
            workers=self._workers(),
            **asdict(total([Took(**one) for one in known])),
        )

    def _workers(self) -> dict[str, WorkerFacts]:
        """The processes that decoded the stored examples, and what each did."""
        known = dict(self.before.workers) | dict({} if self.decoder is None else self.decoder.workers)
        return {name: _did(facts, self.folder.records.values()) for name, facts in known.items()}

    def _spent(self) -> Iterator[str]:
        """What calls to a base behind an API came to."""
        cost = self._cost()
        if cost.api_calls:
            tokens = cost.api_prompt_tokens, cost.api_completion_tokens
            usd = self.decoder.client.usd(tokens) if isinstance(self.decoder, BlackBoxDecoder) else None
            price = "" if usd is None else f", {usd:.4f} USD"
            yield f"the base took {cost.api_calls:,} calls, {tokens[0]:,} + {tokens[1]:,} tokens{price}"

    def _unknown(self) -> Iterator[str]:
        """What the cost cannot say."""
        if (times := self.before.sessions - 1) > 0:
            often = "once" if times == 1 else f"{times} times"
            yield f"continued {often}: what a session had under way when it was stopped is in no figure"
        records = self.folder.records.values()
        if unknown := sum("seconds" not in record for record in records):
            yield f"what {unknown} of {len(records)} examples took is not known, but for their tokens"

    def finish(self) -> Run:
        """Compute the metrics from the stored rows, in the order of the examples, and close the run."""
        order = [example.id for example in self.job.data.examples]
        rows = {row["id"]: row for row in results.read_rows(self.folder.path)}
        metrics = self.job.task.metrics([rows[example_id] for example_id in order])
        found = notes_on([response for row in rows.values() for response in row["responses"]])
        update = {
            "status": "done",
            "metrics": metrics,
            "headline": self.job.task.headline_of(metrics),
            "finished": now(),
            "notes": (*self._notes(), *found, *self._spent(), *self._unknown()),
        }
        run = self.so_far().model_copy(update=update)
        self.folder.finish(run, order)
        return run


def total(parts: Sequence[Took]) -> Took:
    """All of them together, the same in every order."""
    sums: dict[str, Any] = {}
    for name in COUNTS:
        values = [getattr(part, name) for part in parts]
        sums[name] = math.fsum(values) if name.endswith("seconds") else sum(values)
    return Took(**sums)


def prediction(
    task: Task, example: Example, completions: Sequence[Completion], sandbox: Sandbox | None = None
) -> JsonRow:
    """The stored row of one example: the task's own columns, its scores, and every response as it was
    generated. Code is run where there is a sandbox for it. An example that a fault ended has no scores."""
    row = task.row(example, completions)
    fault = next((c.fault for c in completions if c.fault is not None), None)
    if fault is not None:
        row = _as_numbers(row) | {FAULT: fault}
    elif sandbox is not None and task.execute is not None:
        (row,) = task.run_code([row], Execution(sandbox, {example.id: example.target}))
    responses = [stored_response(completion) for completion in completions]
    return {"id": example.id, **row, "scores": task.scores(row), "responses": responses}


def _as_numbers(value: Any) -> Any:
    """A row of JSON: null for what is no number."""
    if isinstance(value, dict):
        return {name: _as_numbers(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_as_numbers(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def whole_examples(
    stream: Iterator[Completion], examples: Sequence[Example], counts: Mapping[str, int]
) -> Iterator[tuple[Example, list[Completion]]]:
    """Each example with its completions in order, as soon as the last of its `counts` is there."""
    by_id = {example.id: example for example in examples}
    waiting: dict[str, list[Completion]] = {}
    for completion in stream:
        group = waiting.setdefault(completion.example_id, [])
        group.append(completion)
        if len(group) == counts[completion.example_id]:
            del waiting[completion.example_id]
            yield by_id[completion.example_id], sorted(group, key=lambda c: c.sample)


def device_name() -> str:
    """What the models run on without a device map."""
    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu"


def _at_its_fullest(name: str, memory: RoleMemory, records: Sequence[JsonRow]) -> RoleMemory:
    """What one model takes, with the largest KV cache that any session noted."""
    peaks = [memory.kv_peak, *(record.get("kv_peak", {}).get(name, 0) for record in records)]
    return memory.model_copy(update={"kv_peak": max(peaks)})


def _did(facts: WorkerFacts, records: Iterable[JsonRow]) -> WorkerFacts:
    """A worker with what the stored examples say of it."""
    own = [record for record in records if record.get("worker") == facts.name]
    return facts.model_copy(
        update={
            "examples": len(own),
            "generated_tokens": sum(record["generated_tokens"] for record in own),
            "seconds": math.fsum(record["seconds"] for record in own),
            "process_peak": max((record["process_peak"] for record in own), default=0),
        }
    )


def _title(job: RunPlan) -> str:
    """What the progress display calls a run."""
    alpha = f" alpha {job.spec.alpha.text}" if job.spec.role == "proxy" and job.spec.alpha.text != "1" else ""
    return f"{job.spec.system.name} {job.spec.task} {job.spec.role}{alpha}" + (
        " (opener forced)" if job.spec.forced else ""
    )


def now() -> str:
    """The time, in UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")
