"""Tables 14 and 15 of the paper: what full fine-tuning of the small model and LoRA of the large one take, and
how good the large one is after it.

    make reproduce-table14 ARGS="--gsm8k train.jsonl --triviaqa train.json --plan"
    make reproduce-table15 SYSTEM=demo ARGS="--limit 64 --items 50 --yes"

It prints what is downloaded, the memory and the paper's own hours, and asks for --yes. Then every training is
a `proxytune tune` with the paper's settings (configs/tune), and for Table 15 every tuned large model is
evaluated. What is finished is not made again."""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from proxytune.config import DEMO_SCHEME, ModelSpec, System, load_system
from proxytune.errors import UserError
from proxytune.options import DecodeOptions, JudgeOptions, RunOptions
from proxytune.paper import cost, published
from proxytune.records import Metric
from proxytune.report import tables
from proxytune.run_files import write_atomically
from proxytune.runs import evaluation
from proxytune.terminal import say, show
from proxytune.training_record import TrainingRecord, read_training

TASKS = ("triviaqa", "gsm")
"""In the order of the paper's columns."""
EFFECTIVE_BATCH, BATCH = 128, 2
"""Examples of a step, and of a device at a time (Table 11)."""
SYSTEMS: Mapping[str, str] = {
    "7B": "llama2-13b-{task}",
    "13B": "llama2-13b-{task}",
    "70B": "llama2-70b-{task}",
}
"""Size -> the system that it is in."""
LABELS: Mapping[str, tuple[str, str]] = {
    "full 7B": ("full", "7B"),
    "LoRA 13B": ("lora", "13B"),
    "LoRA 70B": ("lora", "70B"),
}
"""Lines of Table 14 -> method and size."""
STATE: Mapping[str, float] = {"full": 16.0, "lora": 2.0}
"""Bytes for each parameter of the model: weights, gradients and AdamW's state in float32; frozen weights in
bfloat16. Activations and the adapter come on top."""


@dataclass(frozen=True)
class PaperTraining:
    """One training of the tables."""

    label: str
    method: str
    task: str
    spec: ModelSpec
    system: System
    """Whose base or antiexpert it is."""

    def folder(self, root: Path) -> Path:
        """Where it is."""
        return root / f"{self.label.replace(' ', '-')}-{self.task}"

    def command(self, how: PaperTrial) -> list[str]:
        """Its `proxytune tune`, on as many processes as there are devices."""
        launch = ["accelerate.commands.launch", "--num_processes", str(how.processes), "-m", "proxytune"]
        words = ["-m", *(launch if how.processes > 1 else ["proxytune"]), "tune", self.method]
        accumulate = max(1, EFFECTIVE_BATCH // (BATCH * how.processes))
        dtype = "float32" if self.method == "full" else "bfloat16"
        words += ["--settings", f"{self.task}-{self.method}", "--model", str(self.spec.model)]
        words += ["--data", how.train[self.task], "--accumulate", str(accumulate), "--dtype", dtype]
        words += ["--out", str(self.folder(how.out))]
        for option, value in (("--limit", how.limit), ("--max-steps", how.max_steps)):
            words += [] if value is None else [option, str(value)]
        return words


@dataclass(frozen=True)
class PaperTrial:
    """What is run."""

    table: str
    """14 or 15."""
    out: Path
    system: str | None
    """In place of the paper's."""
    train: Mapping[str, str]
    """Task -> its training examples, as for `tune --data`."""
    test: Mapping[str, str]
    """Task -> its test items, as for `eval --data`; as the system says without."""
    processes: int = 1
    limit: int | None = None
    max_steps: int | None = None
    items: int | None = None

    def trainings(self) -> Iterator[PaperTraining]:
        """The lines of the table, task by task."""
        for task in (task for task in TASKS if task in self.train):
            if self.system is not None:
                system = load_system(self.system)
                lines = {"full small": ("full", system), "LoRA large": ("lora", system)}
            else:
                lines = {
                    label: (method, load_system(SYSTEMS[size].format(task=task)))
                    for label, (method, size) in LABELS.items()
                }
            for label, (method, system) in lines.items():
                if self.table == "14" or method == "lora":
                    yield PaperTraining(label, method, task, _tuned_in(system, method), system)


def _tuned_in(system: System, method: str) -> ModelSpec:
    """The model of a system that a method is for: LoRA for the large one, full tuning for the small one."""
    found = system.base if method == "lora" else system.antiexpert
    if not isinstance(found, ModelSpec):
        raise UserError(f"system '{system.name}' has no model here that {method} could tune")
    return found


def plan_lines(how: PaperTrial) -> Iterator[str]:
    """What it takes, line by line."""
    trainings, paper = list(how.trainings()), published_minutes()
    yield f"table {how.table} of the paper: {len(trainings)} trainings"
    for one in trainings:
        need, parameters = cost.need_of(one.spec), parameters_of(one.spec)
        memory = "unknown" if parameters is None else tables.size(int(parameters * STATE[one.method]))
        place = (
            "on disk" if need.here else f"to download, {tables.size(int(need.download or 0)) or 'unknown'}"
        )
        minutes = paper.get((one.label, one.task)) if how.system is None else None
        hours = "" if minutes is None else f"; the paper took {minutes / 60:.1f} h on 4 A100"
        yield f"  tune    {one.label} on {one.task}: {one.spec.model}, {place}; {memory} a device{hours}"
        yield f"          python {shlex.join(one.command(how))}"
    for task, source in how.train.items():
        yield f"  data    {task}: {source}"
    if missing := [task for task in TASKS if task not in how.train]:
        yield f"  left out: {', '.join(missing)} (no training examples given)"


def parameters_of(spec: ModelSpec) -> float | None:
    """Parameters of a model that the recipes know, or that is on disk; None of another."""
    if spec.model in cost.PUBLISHED:
        return float(cost.PUBLISHED[str(spec.model)][0])
    weights = cost.need_of(spec).weights
    return None if weights is None else weights / cost.BYTES[spec.dtype]


def published_minutes() -> Mapping[tuple[str, str], int]:
    """(Line, task) -> minutes in the paper's Table 14."""
    rows = published.read_paper()["tables"]["14"]["rows"]
    return {(row["model"], task): row[f"{task}_minutes"] for row in rows for task in TASKS}


def published_scores() -> Mapping[tuple[str, str], float]:
    """(Line, task) -> per cent in the paper's Table 15."""
    rows = published.read_paper()["tables"]["15"]["rows"]
    return {(f"LoRA {row['size']}", task): row["printed"][i] for row in rows for i, task in enumerate(TASKS)}


def train(how: PaperTrial, one: PaperTraining) -> TrainingRecord:
    """One training, made if it is not there."""
    command = one.command(how)
    say(f"python {shlex.join(command)}")
    if subprocess.run([sys.executable, *command], stdout=subprocess.DEVNULL).returncode:
        raise UserError(f"the training in '{one.folder(how.out)}' failed: see above")
    record = read_training(one.folder(how.out))
    assert record is not None
    return record


def score(how: PaperTrial, one: PaperTraining) -> Metric:
    """The tuned large model on the test items."""
    adapter = str(one.folder(how.out).resolve())
    tuned = one.spec.model_copy(update={"adapter": adapter, "chat": "none"})  # tuned on plain prompts
    system = one.system.model_copy(update={"name": one.folder(how.out).name, "tuned": tuned})
    options = RunOptions(data=how.test.get(one.task), limit=how.items)
    made = evaluation.Evaluation(system, one.task, options, DecodeOptions(), JudgeOptions(judge="none"))
    found, _ = made.run("tuned", one.folder(how.out).with_name(f"{one.folder(how.out).name}-run"))
    assert found.score is not None
    return found.score


def table14(how: PaperTrial) -> Iterator[str]:
    """Minutes beside the paper's, and how often the first line's."""
    yield "| training | task | trained parameters | steps | minutes | of the first | the paper's minutes |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    paper, first = published_minutes(), dict[str, float]()
    for one in how.trainings():
        record = train(how, one)
        minutes = record.seconds / 60
        times = f"{minutes / first.setdefault(one.task, minutes):.2f}"
        printed = paper.get((one.label, one.task), "") if how.system is None else ""
        cells: list[Any] = [one.label, one.task, f"{record.trainable:,}", record.steps, f"{minutes:.1f}"]
        yield f"| {' | '.join(map(str, [*cells, times, printed]))} |"


def table15(how: PaperTrial) -> Iterator[str]:
    """Scores beside the paper's."""
    yield "| training | task | score, % [95%] | n | the paper's |"
    yield "| --- | --- | --- | --- | --- |"
    paper = published_scores()
    for one in how.trainings():
        train(how, one)
        found = score(how, one)
        printed = paper.get((one.label, one.task), "") if how.system is None else ""
        yield f"| {one.label} | {one.task} | {tables.percent(found)} | {found.n} | {printed} |"


def trial_of(given: argparse.Namespace) -> PaperTrial:
    """The options as a trial; UserError where there are no training examples."""
    train = {
        "gsm": given.gsm8k and f"gsm8k:{given.gsm8k}",
        "triviaqa": given.triviaqa and f"triviaqa:{given.triviaqa}",
    }
    if given.system is not None and str(load_system(given.system).base.model).startswith(DEMO_SCHEME):
        train["gsm"] = train["gsm"] or "gsm8k:generated"
    named = {task: source for task, source in train.items() if source}
    if not named:
        raise UserError(
            "give the training examples: --gsm8k FILE (GSM8K's train.jsonl), --triviaqa FILE, or both"
        )
    tests = {"gsm": given.gsm8k_test, "triviaqa": given.triviaqa_test}
    return PaperTrial(
        table=given.table,
        out=given.out / f"table{given.table}" / (Path(given.system).stem if given.system else "paper"),
        system=given.system,
        train=named,
        test={task: source for task, source in tests.items() if source},
        processes=given.processes,
        limit=given.limit,
        max_steps=given.max_steps,
        items=given.items,
    )


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(description="Tables 14 and 15 of the paper.")
    made.add_argument("table", choices=("14", "15"))
    made.add_argument(
        "--system", help="a system whose antiexpert and base are tuned in place of the paper's models"
    )
    made.add_argument("--gsm8k", help="GSM8K's train.jsonl")
    made.add_argument("--triviaqa", help="TriviaQA's training file, in any published form")
    made.add_argument("--gsm8k-test", help="test items (table 15); default: as the system says")
    made.add_argument("--triviaqa-test", help="the same of TriviaQA")
    made.add_argument("--out", type=Path, default=Path("results/tuning-paper"))
    made.add_argument(
        "--processes", type=int, default=1, help="devices, by accelerate launch; the paper had 4"
    )
    made.add_argument("--limit", type=int, help="only the first N training examples")
    made.add_argument(
        "--max-steps", type=int, help="steps of each training, in place of the paper's 2 epochs"
    )
    made.add_argument("--items", type=int, help="test items of each task")
    made.add_argument("--plan", action="store_true", help="print what it takes, and do nothing")
    made.add_argument("--yes", action="store_true", help="agree to what is downloaded and trained")
    return made


def run(given: argparse.Namespace) -> None:
    """Print the plan, and carry it out where that was agreed to."""
    how = trial_of(given)
    for line in plan_lines(how):
        show(line)
    if given.plan:
        return
    if not given.yes:
        raise UserError("these are long trainings: add --yes to agree")
    how.out.mkdir(parents=True, exist_ok=True)
    lines = list(table14(how) if how.table == "14" else table15(how))
    write_atomically(how.out / "table.md", ("\n".join(lines) + "\n").encode())
    for line in lines:
        show(line)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line of `python -m proxytune.tuning.trials.paper_tables`."""
    try:
        run(parser().parse_args(arguments))
    except UserError as error:
        say(f"error: {error}")
        sys.exit(2)


if __name__ == "__main__":
    main()
