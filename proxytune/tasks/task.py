"""What a task is, how its examples are read, and how stored rows are scored.

A task is one frozen record. The row of an example (`Task.row`) holds what the paper's repository stores,
under its names, and `Task.score_row` needs nothing else: the paper's files and our predictions.jsonl are
scored by the same code.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Literal

from proxytune.config import SMOKE, SOURCES, Sampling
from proxytune.errors import UserError
from proxytune.intervals import mean_metrics
from proxytune.records import FAULT, UNSCORED, Completion, Example, JsonRow, Metric, TaskFacts
from proxytune.sandbox import LOST, Sandbox
from proxytune.tasks.data import DataTable, Hub, generate, read_file, read_hub, read_smoke_data

JudgeName = Literal["toxicity", "truth", "pairwise"]
UNJUDGED = "unjudged"
"""The headline of tasks that say nothing without a judge."""
NOT_RUN = "not_run"
"""The headline of tasks that say nothing before their code is run."""
FAULTY = "faulty"
"""The metric that gives the share of examples that ended in a fault, which have no score; where there are
any."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """A benchmark: its data, its prompts, its settings and its scores."""

    name: str = ""
    """A task in a file of one's own is named after the file (own/files.py)."""
    summary: str
    data: str = ""
    """Where the data comes from."""
    licence: str = ""
    """The licence of the data."""
    formats: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """The forms in which rows can be read (a file's name, `hub`) -> their fields and what these hold."""
    items: int | None = None
    """Items that the paper's runs have; None where the paper gives no number."""
    hub: Hub | None = None
    """None where the hub does not have the data."""
    columns: tuple[str, ...]
    """Text columns that a row of the public data must have."""
    sampling: Sampling
    """The paper's generation settings."""
    examples: Callable[[DataTable, str], list[Example]]
    """Checked rows -> examples. The second argument is the text of the few-shot items, "" without."""
    row: Callable[[Example, Sequence[Completion]], JsonRow]
    """What is stored with an example and its completions; with several samples the first one is scored."""
    scored: tuple[str, ...]
    """Text columns that `score_row` needs."""
    asked: str
    """The column of a stored row that shows what was asked."""
    lower_is_better: bool = False
    """Whether its headline counts what is bad."""
    fault_column: str | None = None
    """A column of judged rows whose 1 says that the response is bad; for tasks whose verdict is no score."""
    hateful: bool = False
    """Whether prompts and responses are hateful text, which reports hide unless asked for it."""
    files: tuple[str, ...] = ("predictions.jsonl",)
    """Names under which predictions are stored, the paper's and ours; of a folder, the first is scored."""
    score_row: Callable[[JsonRow], Mapping[str, float | None]]
    """The scores of one stored row. A score that does not apply to the row is left out, and one that the row
    should have and lacks (not judged, too few samples) is None. Neither is in the mean."""
    metric_names: tuple[str, ...]
    """Metrics that every run has; one that no row had a score for is over no example."""
    headline: str
    """The metric that tables show."""
    judged_headlines: tuple[str, ...] = ()
    """The metrics of which the first that a judge's scores in the rows give takes its place."""
    judge_reads: tuple[str, ...] = ()
    """Text columns that its judge needs beside those that are scored."""
    judge: str | None = None
    """What `--judge default` judges with; None for a task that needs no judge."""
    judge_kind: JudgeName | None = None
    """Which entry of judges.JUDGES judges it; given where `judge` is."""
    totals: Callable[[Sequence[JsonRow]], dict[str, Metric]] | None = None
    """Metrics of all rows together that are no means of `score_row`; they come last and replace namesakes."""
    public: Callable[[JsonRow], JsonRow] | None = None
    """A row as any place publishes it -> the row of the public file; one that has that form stays as it is.
    Columns that it does not know are kept."""
    read: Callable[[Path], DataTable] | None = None
    """Reads a path whose public form is more than one table (for example a folder)."""
    prepare: Callable[[DataTable], DataTable] | None = None
    """Published rows, whichever way they were published, -> the columns above; the paper's choice of rows, in
    its order."""
    gather: Callable[[DataTable], DataTable] | None = None
    """Rows of a predictions file that hold one sample each -> one row per example."""
    execute: Callable[[Sequence[JsonRow], Execution], list[JsonRow]] | None = None
    """Runs the code in stored rows and gives the rows with their verdicts; None for a task without code."""
    identity: str | None = None
    """The column that names an item. Equal rows of one name are dropped, different ones numbered."""
    continuations: Callable[[Example], Sequence[str]] | None = None
    """Texts whose log-probabilities are taken in place of generating; `row` gets one completion for each."""
    likelihood: Task | None = None
    """The same task by likelihood: what `--mode likelihood` runs."""
    choices: Task | None = None
    """The same task by the probabilities of its choices' letters: what `--mode choices` runs."""
    shot: Callable[[JsonRow], str] | None = None
    """How an item is shown as a few-shot example; None, without a primer, refuses --shots."""
    libraries: tuple[str, ...] = ()
    """Modules that its problems import, where it runs code."""
    primer: tuple[str, ...] = ()
    """The benchmark's own few-shot items, of which --shots N takes the first N."""
    file: str | None = None
    """The Python file that it was read from, for a task of one's own."""

    @property
    def facts(self) -> TaskFacts:
        """What a run of it stores for reports."""
        return TaskFacts(
            asked=self.asked,
            lower_is_better=self.lower_is_better,
            hateful=self.hateful,
            fault_column=self.fault_column,
            file=self.file,
        )

    def scores(self, row: JsonRow) -> dict[str, float]:
        """The scores of one stored row; none where a fault ended its example."""
        known = {} if row.get(FAULT) else self.score_row(row)
        return {name: value for name, value in known.items() if value is not None}

    def metrics(self, rows: Sequence[JsonRow]) -> dict[str, Metric]:
        """The metrics of stored rows, each over those that have its score; with the shares of those that have
        none where there are any. The headline is always there; where nothing has it, over no example."""
        sound = [row for row in rows if not row.get(FAULT)]
        scores = [self.score_row(row) for row in sound]
        found = self.aggregate(scores)
        if self.totals is not None and sound:
            found |= self.totals(sound)
        if self.headline in UNSCORED and self.headline in found:
            found[self.headline] = part(sum(self.headline in row for row in scores), len(rows))
        if len(sound) < len(rows):
            found[FAULTY] = part(len(rows) - len(sound), len(rows))
        found.setdefault(self.headline_of(found), Metric(value=0.0, n=0))
        return found

    def run_code(self, rows: Sequence[JsonRow], execution: Execution) -> list[JsonRow]:
        """The rows with the verdicts of their code, which is run once more where a sandbox ended without one.
        What was no failure of a sample is no verdict: it is tried again when the run is started again."""
        assert self.execute is not None, f"'{self.name}' has no code"
        made = self.execute(rows, execution)
        lost = [place for place, row in enumerate(made) if any(map(_is_lost, row["result"]))]
        if lost:
            again = self.execute([rows[place] for place in lost], replace(execution))
            for place, row in zip(lost, again, strict=True):
                made[place] = row
        execution.lost += sum(_is_lost(result) for row in made for result in row["result"])
        return [_without_verdicts_on_others(row) for row in made]

    def aggregate(self, scores: Sequence[Mapping[str, float | None]]) -> dict[str, Metric]:
        """The metrics of per-example scores: means with intervals, the task's own first."""
        found = mean_metrics(scores)
        return {name: found.get(name, Metric(value=0.0, n=0)) for name in self.metric_names} | found

    def require_columns(self, rows: Sequence[JsonRow], origin: str) -> None:
        """UserError that names the line where stored rows lack a text that scoring or judging needs."""
        table = DataTable(origin, "line", tuple(rows), tuple(range(1, len(rows) + 1)))
        table.require((*self.scored, *self.judge_reads))

    @property
    def needs_judge(self) -> bool:
        """Whether a run says nothing before it is judged."""
        return self.headline == UNJUDGED

    def headline_of(self, metrics: Mapping[str, Metric]) -> str:
        """The metric that tables show for these metrics."""
        return next((name for name in self.judged_headlines if name in metrics), self.headline)


def part(count: int, n: int) -> Metric:
    """The share of n examples that `count` are."""
    return Metric(value=count / n, n=n)


# Examples


@dataclass(frozen=True)
class Dataset:
    """The examples of a run and the fingerprint of what is asked."""

    examples: tuple[Example, ...]
    name: str
    """generated, plumbing, hub, or the file's name, as in RunSpec."""
    sha256: str
    """Of the examples as used (prompts, few-shot items and targets): the same from a file, its .gz or the
    hub."""
    notes: tuple[str, ...] = ()
    """What a user should know about how the rows were read."""


def read_source(
    task: Task,
    source: str,
    limit: int | None = None,
    *,
    shots: int = 0,
    shots_from: str | None = None,
    seed: int = 0,
) -> Dataset:
    """The first `limit` examples of a source: `generated`, `plumbing`, `hub` or the path of a file.

    `shots` items are drawn by `seed`, the same for every example, from the train split (hub, demo world) or
    from the file `shots_from`; items whose question is asked are never drawn.
    """
    if limit is not None and limit < 1:
        raise UserError(f"--limit {limit} leaves nothing to run: it must be at least 1")
    table = _prepared(task, _table(task, source, limit)).head(limit)
    if not table.rows:
        raise UserError(f"{table.origin} has no rows")
    shown = _shots(task, source, table, shots, shots_from, seed)
    examples = tuple(task.examples(table, shown))
    content = json.dumps([asdict(example) for example in examples], sort_keys=True).encode()
    name = source if source in SOURCES else Path(source).name
    return Dataset(examples, name, hashlib.sha256(content).hexdigest(), table.notes)


def _table(task: Task, source: str, limit: int | None) -> DataTable:
    """The rows of a source as they were published."""
    if source == "generated":
        return generate(task.name, "test", limit)
    if source == SMOKE:
        return read_smoke_data(task.name, limit)
    if source == "hub":
        if task.hub is None and task.file is not None:
            raise UserError(
                f"the task in '{task.file}' names no data of its own: give its items with --data FILE"
            )
        if task.hub is None:
            where = f": {task.data}" if task.data else ""
            raise UserError(f"the hub has no '{task.name}'{where}. Give a file: --data FILE")
        return read_hub(task.hub, task.hub.split)
    return (task.read or read_file)(Path(source))


def _prepared(task: Task, table: DataTable) -> DataTable:
    """Published rows -> checked rows in the task's columns, each of its own name."""
    table = in_public_form(task, table)
    if task.prepare is not None:
        table = task.prepare(table)
    table = table.require(task.columns)
    return table if task.identity is None else table.unique(task.identity)


def in_public_form(task: Task, table: DataTable) -> DataTable:
    """Rows of a file or of the hub in the form of the public file, wherever they came from."""
    return table if task.public is None else table.map(task.public)


def _shots(task: Task, source: str, asked: DataTable, shots: int, shots_from: str | None, seed: int) -> str:
    """The text of the few-shot items."""
    if shots < 0:
        raise UserError(f"--shots {shots} is negative")
    if shots == 0 and shots_from is not None:
        raise UserError("--shots-from names a file to draw from: say how many with --shots N")
    if shots == 0:
        return ""
    if task.primer and shots_from is not None:
        raise UserError(f"'{task.name}' has few-shot items of its own in this mode: leave --shots-from out")
    if task.primer and shots <= len(task.primer):
        return "".join(task.primer[:shots])
    if task.primer:
        raise UserError(f"--shots {shots}: the primer of '{task.name}' has {len(task.primer)} items")
    if task.shot is None:
        raise UserError(f"task '{task.name}' has no few-shot form (no training split): leave --shots out")
    pool = _prepared(task, _pool(task, source, shots_from))
    questions = {row[task.columns[0]] for row in asked.rows}
    rows = [row for row in pool.rows if row[task.columns[0]] not in questions]
    if shots > len(rows):
        raise UserError(f"--shots {shots}: {pool.origin} has {len(rows)} items that are not asked")
    return "".join(task.shot(row) for row in random.Random(seed).sample(rows, shots))


def _pool(task: Task, source: str, shots_from: str | None) -> DataTable:
    """The rows that few-shot items are drawn from."""
    if shots_from is not None:
        return (task.read or read_file)(Path(shots_from))
    if source == "generated":
        return generate(task.name, "train", None)
    if source == "hub" and task.hub is not None and task.hub.train is not None:
        return read_hub(task.hub, task.hub.train)
    raise UserError(f"few-shot items for '{source}' must be named: --shots-from FILE (the train split, say)")


# Running code

NOT_EXECUTED = "not run: "
"""How the result of a sample begins that has no verdict, for a reason that is not its own."""


def _is_lost(result: str) -> bool:
    """Whether a sandbox was killed from outside, or had no memory left: the sample's, or that of its answers.
    Code can raise an error of any text, but its result begins in another way."""
    return result == LOST or (result.startswith(NOT_EXECUTED) and result.endswith(LOST))


def _without_verdicts_on_others(row: JsonRow) -> JsonRow:
    """The row with null as the verdict on every sample that did not fail by itself."""
    results = [f"{NOT_EXECUTED}{result}" if result == LOST else result for result in row["result"]]
    passed = [
        None if result.startswith(NOT_EXECUTED) else verdict
        for result, verdict in zip(results, row["passed"], strict=True)
    ]
    return {**row, "result": results, "passed": passed}


@dataclass
class Execution:
    """The leave to run the code of stored rows, with what that takes and an account of it."""

    sandbox: Sandbox
    items: Mapping[str, JsonRow]
    """Example id -> target, for what rows do not hold (unit tests)."""
    samples: int = 0
    passed: int = 0
    timed_out: int = 0
    broken: int = 0
    """Samples that were not run, because their problem could not be set up with the libraries that there
    are."""
    in_process: int = 0
    """Samples that their test had to judge within their own process, where code that wants to pass can."""
    lost: int = 0
    """Samples whose sandbox ended without a verdict, twice: killed from outside, or out of memory."""
    compared: int = 0
    """Samples that had a verdict before."""
    rerun: int = 0
    """Samples that were run once more, alone and with a longer limit, because a time-out made the
    difference."""
    flips: int = 0
    """Samples whose verdict is another one than before."""

    def report(self) -> dict[str, int | str]:
        """The account, by name."""
        counts = {f.name: getattr(self, f.name) for f in fields(self) if f.type == "int"}
        return {"sandbox": self.sandbox.backend, **counts}
