"""A task of SuperGLUE on any model: what a tuned expert of each method gains, by likelihood of the answers.

    make reproduce-superglue ARGS="boolq --model MODEL --train train.jsonl --test val.jsonl"

BoolQ and COPA in SuperGLUE's own files (super.gluebenchmark.com): `question`, `passage`, `label`; `premise`,
`choice1`, `choice2`, `question`, `label`. The prompts are GPT-3's (Brown et al. 2020, appendix G). An item is
right where its true answer is the most probable one: for COPA by log-probability per character, since its
answers are of different length. Every method of `proxytune tune` can be named; with `--base`, each expert
also steers that model."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from proxytune.config import Role, load_system
from proxytune.decoding import Decoder
from proxytune.errors import UserError, did_you_mean
from proxytune.intervals import mean_metrics
from proxytune.models import Models
from proxytune.options import DecodeOptions
from proxytune.records import Completion, Example, JsonRow, Metric, Prompt
from proxytune.report import tables
from proxytune.run_files import disk_errors_in_one_line, write_atomically
from proxytune.tasks import data
from proxytune.terminal import say, show
from proxytune.training_record import SYSTEM
from proxytune.tuning.methods import get_method
from proxytune.tuning.options import TuneOptions
from proxytune.tuning.session import plan, tune
from proxytune.tuning.trials.figures import write_figures

RESULT = "superglue.json"


@dataclass(frozen=True)
class ChoiceItem:
    """One item: the prompt, the answers that can follow it, and the true one."""

    prompt: str
    answers: tuple[str, ...]
    gold: int


def boolq(row: JsonRow) -> ChoiceItem:
    """A passage and a question whose answer is yes or no."""
    question = str(row["question"]).strip().rstrip("?")
    text = f"{str(row['passage']).strip()}\nquestion: {question}?\nanswer:"
    return ChoiceItem(text, (" no", " yes"), _label(row, (False, True)))


def copa(row: JsonRow) -> ChoiceItem:
    """A premise with its more plausible cause or effect."""
    if row["question"] not in ("cause", "effect"):
        raise ValueError(f"`question` is {row['question']!r}, not cause or effect")
    joint = "because" if row["question"] == "cause" else "so"
    choices = tuple(f" {_lower(str(row[name]).strip())}" for name in ("choice1", "choice2"))
    return ChoiceItem(f"{str(row['premise']).strip().rstrip('.')} {joint}", choices, _label(row, (0, 1)))


def _label(row: JsonRow, known: Sequence[object]) -> int:
    label = row["label"]
    if isinstance(label, str):
        label = {"true": True, "false": False, "0": 0, "1": 1}.get(label.lower(), label)
    if label not in known:
        raise ValueError(f"`label` is {row['label']!r}: a file with labels is needed (train or val)")
    return known.index(label)


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]


SETS: Mapping[str, Callable[[JsonRow], ChoiceItem]] = {"boolq": boolq, "copa": copa}
PER_CHARACTER = {"copa"}


def read_items(task: str, path: Path, limit: int | None) -> list[ChoiceItem]:
    """The items of a file; UserError with the line of one that is none."""
    if task not in SETS:
        raise did_you_mean("set", task, SETS)
    table, found = data.read_file(path), list[ChoiceItem]()
    for index, row in enumerate(table.rows[:limit]):
        try:
            found.append(SETS[task](row))
        except (KeyError, ValueError) as error:
            reason = f"no field {error}" if isinstance(error, KeyError) else str(error)
            raise UserError(f"{table.where(index)}: {reason}") from None
    return found


class ChoiceScore(BaseModel):
    """The accuracy of one role."""

    model_config = ConfigDict(frozen=True)

    method: str
    """untuned, or the method of the expert."""
    role: Role
    accuracy: Metric
    trained: int = 0


@dataclass(frozen=True)
class SuperglueTrial:
    """What is tuned and measured."""

    task: str
    items: Sequence[ChoiceItem]
    """Test items."""
    options: TuneOptions
    """Of all methods."""
    out: Path

    def measured(self, model: str, methods: Sequence[str]) -> Iterator[ChoiceScore]:
        """The untuned models, and every method's expert. A finished training is not made again."""
        jobs = [(name, plan(name, model, self.options)) for name in methods]  # what cannot be is said at once
        steers = self.options.base is not None
        untuned: tuple[Role, ...] = ("antiexpert", "base") if steers else ("antiexpert",)
        tuned: tuple[Role, ...] = ("expert", "proxy") if steers else ("expert",)
        for place, (name, job) in enumerate(jobs):
            record = tune(job, self.out / name)
            models = Models(load_system(self.out / name / SYSTEM))
            for role in untuned if place == 0 else ():
                yield ChoiceScore(method="untuned", role=role, accuracy=self.accuracy(models, role))
            for role in tuned:
                found = self.accuracy(models, role)
                yield ChoiceScore(method=name, role=role, accuracy=found, trained=record.trainable)

    def accuracy(self, models: Models, role: Role) -> Metric:
        """The share of items whose true answer is the most probable one."""
        examples = [
            Example(str(place), Prompt(plain=item.prompt, user=item.prompt), {"answers": item.answers})
            for place, item in enumerate(self.items)
        ]
        decoder = Decoder(models, role, DecodeOptions(progress=False))
        by_item: dict[str, list[Completion]] = {}
        for completion in decoder.likelihoods(examples, lambda example: example.target["answers"]):
            by_item.setdefault(completion.example_id, []).append(completion)
        rows = [{"accuracy": float(self._right(item, by_item[str(i)]))} for i, item in enumerate(self.items)]
        return mean_metrics(rows)["accuracy"]

    def _right(self, item: ChoiceItem, completions: Sequence[Completion]) -> bool:
        lengths = [len(text) if self.task in PER_CHARACTER else 1 for text in item.answers]
        scores = [c.logprob / n for c, n in zip(completions, lengths, strict=True)]
        return scores.index(max(scores)) == item.gold


def write_training(items: Sequence[ChoiceItem], path: Path) -> Path:
    """Items as prompts and completions; -> the file."""
    lines = [json.dumps({"prompt": item.prompt, "completion": item.answers[item.gold]}) for item in items]
    write_atomically(path, ("\n".join(lines) + "\n").encode())
    return path


def run(given: argparse.Namespace) -> list[ChoiceScore]:
    """What the command line asks for; the scores, written to OUT/superglue.json too."""
    with disk_errors_in_one_line(given.out):
        given.out.mkdir(parents=True, exist_ok=True)
    methods = [get_method(name.strip()).name for name in given.methods.split(",")]
    train = write_training(read_items(given.task, given.train, given.limit), given.out / "train.jsonl")
    options = TuneOptions(
        data=str(train),
        base=given.base,
        batch=given.batch,
        epochs=given.epochs,
        max_steps=given.max_steps,
        max_length=given.max_length,
        learning_rate=given.learning_rate,
        seed=given.seed,
    )
    trial = SuperglueTrial(given.task, read_items(given.task, given.test, given.limit), options, given.out)
    scores = list[ChoiceScore]()
    for one in trial.measured(given.model, methods):
        scores.append(one)
        share = tables.percent(one.accuracy)
        show(f"{one.method} as {one.role}: {share} of {one.accuracy.n}; {one.trained:,} parameters trained")
        write_figures(given.out / RESULT, scores)
    return scores


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(description="Tune a model on a set of SuperGLUE, and measure it.")
    made.add_argument("task", choices=SETS)
    made.add_argument("--model", required=True, help="the model that is tuned: a folder, or a hub id")
    made.add_argument("--base", help="a large model that each expert also steers")
    made.add_argument("--train", type=Path, required=True, help="SuperGLUE's train.jsonl")
    made.add_argument("--test", type=Path, required=True, help="SuperGLUE's val.jsonl (test has no labels)")
    made.add_argument("--methods", default="p-tuning,full", help="methods of proxytune tune")
    made.add_argument("--out", type=Path, default=Path("results/superglue"))
    made.add_argument("--limit", type=int, help="only the first N items of each file")
    made.add_argument("--epochs", type=float, default=3.0)
    made.add_argument("--max-steps", type=int)
    made.add_argument("--batch", type=int, default=8)
    made.add_argument("--max-length", type=int, default=512)
    made.add_argument("--learning-rate", type=float, help="of all methods; default: each method's own")
    made.add_argument("--seed", type=int, default=0)
    return made


def main() -> None:
    """The command line of `python -m proxytune.tuning.trials.superglue`."""
    try:
        run(parser().parse_args())
    except UserError as error:
        say(f"error: {error}")
        sys.exit(2)


if __name__ == "__main__":
    main()
