"""Every method on the demo world: what an expert costs to tune, how good it is alone, and how far it takes
the large model, beside direct tuning of the large model by the same method (the paper's Tables 14 and 15 in
miniature).

`make reproduce-tuning-demo` runs it. The learning rates are chosen on dev items first (`demo_rates`); the
figures are of the test split. What is finished is not made again."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean

from pydantic import BaseModel, ConfigDict

from proxytune.config import Role
from proxytune.errors import did_you_mean
from proxytune.intervals import gap_closed
from proxytune.models import Models
from proxytune.options import RunOptions
from proxytune.records import Metric
from proxytune.run_files import write_atomically
from proxytune.terminal import say, show
from proxytune.training_record import TrainingRecord
from proxytune.tuning.trials import demo_trainings as demo
from proxytune.tuning.trials.demo_rates import TriedRate, chosen, search
from proxytune.tuning.trials.figures import write_figures

RESULT, TABLE = "comparison.json", "table.md"


class TrainingCost(BaseModel):
    """What one training took."""

    model_config = ConfigDict(frozen=True)

    rate: float
    trainable: int
    parameters: int
    cpu_seconds: float
    memory: int
    """Bytes at the largest, above what the process had before the model was loaded."""

    @classmethod
    def of(cls, record: TrainingRecord) -> TrainingCost:
        """From the record of a training."""
        return cls(
            rate=record.request.settings["learning_rate"],
            trainable=record.trainable,
            parameters=record.parameters,
            cpu_seconds=record.cpu_seconds,
            memory=record.peak_bytes - record.before_bytes,
        )


class TrialScores(BaseModel):
    """What one method gave on one task with one seed."""

    model_config = ConfigDict(frozen=True)

    case: str
    seed: int
    task: str
    small: TrainingCost
    large: TrainingCost | None = None
    """Direct tuning of the large model; none of a method that is of the small one only."""
    base: Metric
    antiexpert: Metric
    expert: Metric
    proxy: Metric
    tuned: Metric | None = None
    gap_closed: float | None = None


@dataclass(frozen=True)
class TrialSize:
    """On how much is compared."""

    items: int
    """Test items of each task."""
    dev_items: int
    """Dev items of each task, which choose the learning rates."""
    seeds: int


@dataclass(frozen=True)
class MethodTrial:
    """What measures."""

    root: Path
    n: int
    """Test items of each task."""
    tried: Sequence[TriedRate]
    untuned: dict[tuple[str, str], Metric] = field(default_factory=dict)
    """(Task, model) -> the score of a model that no training changes, measured once."""

    def with_expert(self, case: demo.DemoCase, seed: int) -> Iterator[TrialScores]:
        """Tune the small model, and evaluate every role on every task."""
        rate = chosen(case, demo.SMALL, self.tried)
        record = demo.trained_apart(case, demo.SMALL, rate, seed, self.root)
        folder = case.folder(self.root, demo.SMALL, rate, seed)
        models = Models(demo.demo_system(folder.name, record, folder))
        for task in demo.TASKS:
            yield TrialScores(
                case=case.name,
                seed=seed,
                task=task,
                small=TrainingCost.of(record),
                base=self._score(models, task, "base"),
                antiexpert=self._score(models, task, "antiexpert"),
                expert=self._score(models, task, "expert"),
                proxy=self._score(models, task, "proxy"),
            )

    def with_ceiling(self, case: demo.DemoCase, one: TrialScores) -> TrialScores:
        """The same with the large model tuned by the same method."""
        rate = chosen(case, demo.LARGE, self.tried)
        record = demo.trained_apart(case, demo.LARGE, rate, one.seed, self.root)
        folder = case.folder(self.root, demo.LARGE, rate, one.seed)
        system = demo.large_system(folder.name, folder, record)
        tuned = self._score(Models(system), one.task, "tuned")
        gap = gap_closed(one.base, one.proxy, tuned)
        return one.model_copy(update={"large": TrainingCost.of(record), "tuned": tuned, "gap_closed": gap})

    def _score(self, models: Models, task: str, role: Role) -> Metric:
        run = RunOptions(data="generated", limit=self.n)
        out = self.root / "runs" / "test" / models.system.name / task / role
        if role not in ("base", "antiexpert"):
            return demo.score(models, task, role, run, out)
        key = task, models.spec(role).model_dump_json()
        if key not in self.untuned:
            self.untuned[key] = demo.score(models, task, role, run, out)
        return self.untuned[key]


def table(scores: Sequence[TrialScores]) -> str:
    """Everything in Markdown: means over the seeds, with the lowest and the highest."""
    cases = dict.fromkeys(one.case for one in scores)
    return "\n".join((*_costs(scores, cases), "", *_results(scores, cases))) + "\n"


def _costs(scores: Sequence[TrialScores], cases: Sequence[str] | dict[str, None]) -> Iterator[str]:
    yield "| method | model | learning rate | trained parameters | memory, MiB | CPU seconds |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for case in cases:
        own = [one for one in scores if one.case == case and one.task == demo.TASKS[0]]
        for name, costs in (("small", [o.small for o in own]), ("large", [o.large for o in own if o.large])):
            if costs:
                first = costs[0]
                memory = _spread([cost.memory / 2**20 for cost in costs], "{:.0f}")
                seconds = _spread([cost.cpu_seconds for cost in costs], "{:.1f}")
                share = f"{first.trainable:,} of {first.parameters:,}"
                yield f"| {case} | {name} | {first.rate:g} | {share} | {memory} | {seconds} |"


def _results(scores: Sequence[TrialScores], cases: Sequence[str] | dict[str, None]) -> Iterator[str]:
    yield "| method | task | antiexpert | expert | base | proxy | tuned | gap closed |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- |"
    for case in cases:
        for task in demo.TASKS:
            own = [one for one in scores if (one.case, one.task) == (case, task)]
            cells = [case, task]
            for role in ("antiexpert", "expert", "base", "proxy", "tuned"):
                found = [100 * m.value for one in own if (m := getattr(one, role)) is not None]
                cells.append(_spread(found, "{:.1f}"))
            cells.append(_spread([one.gap_closed for one in own if one.gap_closed is not None], "{:.2f}"))
            yield f"| {' | '.join(cells)} |"


def _spread(values: Sequence[float], form: str) -> str:
    if not values:
        return ""
    middle, low, high = (form.format(value) for value in (mean(values), min(values), max(values)))
    return middle if low == high else f"{middle} ({low} to {high})"


def compare(root: Path, how: TrialSize, cases: Sequence[demo.DemoCase]) -> list[TrialScores]:
    """Run everything, and write the figures and the table into the folder after each training: the experts
    first, then direct tuning of the large model, which takes most of the time."""
    trial = MethodTrial(root, how.items, search(root, how.dev_items, cases, demo.SMALL))
    scores = list[TrialScores]()
    for seed in range(how.seeds):
        for case in cases:
            say(f"{case.name}, seed {seed}")
            scores += trial.with_expert(case, seed)
            _write(root, scores)
    large = [case for case in cases if demo.LARGE in case.rates]
    trial = MethodTrial(root, how.items, search(root, how.dev_items, large, demo.LARGE))
    for place, one in enumerate(scores):
        case = demo.CASES[one.case]
        if case in large:
            say(f"{case.name}, the large model, seed {one.seed}")
            scores[place] = trial.with_ceiling(case, one)
            _write(root, scores)
    return scores


def _write(root: Path, scores: Sequence[TrialScores]) -> None:
    write_figures(root / RESULT, scores)
    write_atomically(root / TABLE, table(scores).encode())


def main() -> None:
    """The command line of `python -m proxytune.tuning.trials.demo_methods`."""
    parser = argparse.ArgumentParser(description="Compare the methods of tuning on the demo world.")
    parser.add_argument("--out", type=Path, default=Path("results/tuning-demo"))
    parser.add_argument("--items", type=int, default=200, help="test items of each task")
    parser.add_argument("--dev-items", type=int, default=100, help="dev items that choose the learning rates")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--cases", default=",".join(demo.CASES), help="of: " + ", ".join(demo.CASES))
    given = parser.parse_args()
    names = [name.strip() for name in given.cases.split(",")]
    for name in names:
        if name not in demo.CASES:
            raise did_you_mean("case", name, demo.CASES)
    cases = [demo.CASES[name] for name in names]
    compare(given.out, TrialSize(given.items, given.dev_items, given.seeds), cases)
    show((given.out / TABLE).read_text())


if __name__ == "__main__":
    main()
