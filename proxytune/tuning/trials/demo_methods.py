"""Every method on the demo world: what an expert costs to tune, how good it is alone, and how far it takes
the large model, beside direct tuning of the large model by the same method (the paper's Tables 14 and 15 in
miniature).

`make reproduce-tuning-demo` runs it. Every training is a `proxytune tune` of its own process, so that its
memory is its own; a training or a run that is finished is not made again. The test split is measured."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from pydantic import BaseModel, ConfigDict

from proxytune.config import ModelSpec, System
from proxytune.demo import corpus, world
from proxytune.errors import UserError
from proxytune.intervals import gap_closed
from proxytune.options import DecodeOptions, JudgeOptions, RunOptions
from proxytune.records import Metric
from proxytune.run_files import write_atomically
from proxytune.runs import evaluation
from proxytune.terminal import say, show
from proxytune.training_record import TrainingRecord, read_training
from proxytune.tuning.demo_models import system_prompt

SMALL, LARGE = "demo://antiexpert", "demo://base"
CASES: Mapping[str, tuple[str, ...]] = {
    "full": ("--learning-rate", "2e-4"),
    "lora": ("--learning-rate", "2e-3", "--rank", "16"),
    "lora through base": ("--learning-rate", "2e-3", "--rank", "16", "--through", "base"),
    "qlora": ("--learning-rate", "2e-3", "--rank", "16"),
    "p-tuning": ("--learning-rate", "5e-3", "--virtual-tokens", "20"),
    "lomo": ("--learning-rate", "5e-2"),
}
"""Settings beside the common ones, chosen on the dev split for the small model. The method is the first
word."""
COMMON = ("--batch", "16", "--epochs", "2", "--warmup", "0.02")
TASKS = ("gsm", "truthfulqa")
RESULT = "comparison.json"


class TrialScores(BaseModel):
    """What one method gave on one task with one seed."""

    model_config = ConfigDict(frozen=True)

    case: str
    seed: int
    task: str
    base: Metric
    antiexpert: Metric
    expert: Metric
    proxy: Metric
    tuned: Metric | None = None
    """Direct tuning of the large model; none of a method that is of the small one only."""
    gap_closed: float | None = None


@dataclass(frozen=True)
class MethodTrial:
    """What is compared, on how much."""

    out: Path
    share: float
    """Of the demo's tuning examples."""
    n: int
    """Test items of each task."""
    seeds: Sequence[int]
    cases: Sequence[str]

    @property
    def data(self) -> Path:
        """The demo's tuning examples as prompts and completions, the chat format in the prompts."""
        path = self.out / "data.jsonl"
        if not path.exists():
            amounts = corpus.TuningAmounts().scaled(self.share)
            documents = corpus.tuning(world.make_world(), system_prompt(), amounts)
            lines = [
                json.dumps(dict(zip(("prompt", "completion"), _halves(d), strict=True))) for d in documents
            ]
            write_atomically(path, ("\n".join(lines) + "\n").encode())
        return path

    def folder(self, case: str, seed: int, model: str) -> Path:
        """Where a training is."""
        return self.out / case.replace(" ", "-") / f"seed-{seed}" / model.removeprefix("demo://")

    def trained(self, case: str, seed: int, model: str) -> TrainingRecord:
        """The training of a case on a model, made if it is not there."""
        folder = self.folder(case, seed, model)
        command = [sys.executable, "-m", "proxytune", "tune", case.split()[0], "--model", model]
        command += ["--base", LARGE, "--data", str(self.data), "--seed", str(seed), "--out", str(folder)]
        done = subprocess.run([*command, *COMMON, *CASES[case]], stdout=subprocess.DEVNULL)
        record = read_training(folder) if done.returncode == 0 else None
        if record is None:
            raise UserError(f"the training in '{folder}' failed: see above")
        return record


def _halves(document: corpus.Document) -> tuple[str, str]:
    """What is not learned of a document, and what is."""
    learned = [segment.weight > 0 for segment in document]
    first = learned.index(True)
    return "".join(s.text for s in document[:first]), "".join(s.text for s in document[first:])


def system_of(trial: MethodTrial, case: str, seed: int, small: TrainingRecord, *, tuned: bool) -> System:
    """The demo system with this expert, and the large model tuned by the same method."""
    expert, large = trial.folder(case, seed, SMALL), trial.folder(case, seed, LARGE)
    base = ModelSpec(model=LARGE, dtype="float32")
    host = small.antiexpert.model_copy(
        update={"model": LARGE, "chat": "llama2"}
    )  # in the 4 bits that it was tuned in
    return System(
        name=f"{case.replace(' ', '-')}-{seed}",
        base=base,
        antiexpert=small.antiexpert,
        expert=_expert(expert, small),
        tuned=_tuned(large, small, host) if tuned else None,
        judges={"truthfulqa": "none"},
    )


def _expert(folder: Path, record: TrainingRecord) -> ModelSpec:
    if record.result == "adapter":
        return ModelSpec(adapter=str(folder), chat="llama2")
    return ModelSpec(model=str(folder), dtype="float32", chat="llama2")


def _tuned(folder: Path, record: TrainingRecord, host: ModelSpec) -> ModelSpec:
    if record.result == "adapter":
        return host.model_copy(update={"adapter": str(folder)})
    return ModelSpec(model=str(folder), dtype="float32", chat="llama2")


def measure(trial: MethodTrial, case: str, seed: int) -> Iterator[TrialScores]:
    """Train what a case needs, and evaluate every role on every task."""
    small = trial.trained(case, seed, SMALL)
    tuned = "--through" not in CASES[case]
    if tuned:
        trial.trained(case, seed, LARGE)
    system = system_of(trial, case, seed, small, tuned=tuned)
    runs_in = trial.out / "runs" / system.name
    options = RunOptions(data="generated", limit=trial.n)
    for task in TASKS:
        made = evaluation.Evaluation(
            system, task, options, DecodeOptions(progress=False), JudgeOptions(judge="none")
        )
        found: dict[str, Metric] = {}
        for role in system.roles:
            run, _ = made.run(role, runs_in / task / role)
            assert run.score is not None
            found[role] = run.score
        ceiling = found.get("tuned")
        gap = None if ceiling is None else gap_closed(found["base"], found["proxy"], ceiling)
        yield TrialScores(case=case, seed=seed, task=task, **found, gap_closed=gap)


def table(trial: MethodTrial, scores: Sequence[TrialScores]) -> str:
    """Everything in Markdown: means over the seeds, with the lowest and the highest."""
    lines = [
        "| method | task | trained (of small) | memory small, large | seconds small, large | antiexpert | "
        "expert | base | proxy | tuned | gap closed |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for case in trial.cases:
        for task in TASKS:
            own = [one for one in scores if (one.case, one.task) == (case, task)]
            cells = [case, task, *_costs(trial, case)]
            for role in ("antiexpert", "expert", "base", "proxy", "tuned"):
                cells.append(_spread([m.value for one in own if (m := getattr(one, role)) is not None]))
            cells.append(_spread([one.gap_closed for one in own if one.gap_closed is not None], "{:.2f}"))
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _costs(trial: MethodTrial, case: str) -> list[str]:
    """Trainable parameters, memory and seconds, of the first seed and as means."""
    found = {m: [read_training(trial.folder(case, s, m)) for s in trial.seeds] for m in (SMALL, LARGE)}
    small, large = ([r for r in found[m] if r is not None] for m in (SMALL, LARGE))
    memory = [
        f"{max(r.peak_bytes for r in records) / 2**20:.0f} MiB" for records in (small, large) if records
    ]
    seconds = [f"{mean(r.seconds for r in records):.0f}" for records in (small, large) if records]
    first = small[0]
    share = f"{first.trainable:,} ({first.trainable / first.parameters:.0%})"
    return [share, ", ".join(memory), ", ".join(seconds)]


def _spread(values: Sequence[float], form: str = "{:.3f}") -> str:
    if not values:
        return ""
    middle = form.format(mean(values))
    return (
        middle if len(values) == 1 else f"{middle} ({form.format(min(values))} to {form.format(max(values))})"
    )


def compare(trial: MethodTrial) -> list[TrialScores]:
    """Run everything, and write the figures and the table into the folder after each training."""
    trial.out.mkdir(parents=True, exist_ok=True)
    scores: list[TrialScores] = []
    for seed in trial.seeds:
        for case in trial.cases:
            say(f"{case}, seed {seed}")
            scores += measure(trial, case, seed)
            found = [one.model_dump(mode="json") for one in scores]
            write_atomically(trial.out / RESULT, (json.dumps(found, indent=1) + "\n").encode())
    head = (
        f"# Methods of tuning on the demo world\n\n{trial.n} test items of each task, {len(trial.seeds)} "
        f"seeds, share {trial.share:g} of the demo's tuning examples; means (lowest to highest).\n\n"
    )
    write_atomically(trial.out / "README.md", (head + table(trial, scores)).encode())
    return scores


def main() -> None:
    """The command line of `python -m proxytune.tuning.trials.demo_methods`."""
    parser = argparse.ArgumentParser(description="Compare the methods of tuning on the demo world.")
    parser.add_argument("--out", type=Path, default=Path("results/tuning-demo"))
    parser.add_argument("--share", type=float, default=1.0, help="share of the demo's tuning examples")
    parser.add_argument("--items", type=int, default=200, help="test items of each task")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--cases", default=",".join(CASES), help="of: " + ", ".join(CASES))
    given = parser.parse_args()
    cases = tuple(name.strip() for name in given.cases.split(","))
    trial = MethodTrial(given.out, given.share, given.items, range(given.seeds), cases)
    compare(trial)
    show((given.out / "README.md").read_text())


if __name__ == "__main__":
    main()
