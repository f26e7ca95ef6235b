"""Real models on 2 cores: does a tuned expert steer, and does the gap close?

    make reproduce-real ARGS="--model DIR --gsm8k TRAIN TEST --triviaqa TRAIN TEST"

runs it. Every step is a `proxytune` command that is printed before it runs; what is finished is not made
again.

(a) One model as base and antiexpert, and a LoRA of it as the expert: one tuned on GSM8K, one on TriviaQA.
(b) A trio of one vocabulary in which base and antiexpert differ. The small model is the large one with layers
left out, healed by learning the whole one's distribution; the expert is its LoRA, the ceiling that of (a).
(c) Across vocabularies (`--other-base`): a base of another family steered by (a)'s GSM8K expert with
`vocab: intersect`, and what `proxytune check` says of the tokens that it lacks.

`real_scores` makes the table."""

from __future__ import annotations

import argparse
import itertools
import json
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from proxytune.errors import UserError
from proxytune.run_files import write_atomically
from proxytune.terminal import say, show
from proxytune.training_record import SYSTEM
from proxytune.tuning.examples import TuneExample, read_examples
from proxytune.tuning.trials import real_scores

LORA = ("--batch", "4", "--accumulate", "4", "--rank", "16", "--dropout", "0", "--learning-rate", "2e-4")
EXAMPLES_PER_STEP = 16
"""Of a LoRA: 4 batches of 4."""
HEALING = ("--batch", "4", "--max-length", "256", "--learning-rate", "3e-4")
GSM, TRIVIA = "gsm", "triviaqa"
FORMS = {GSM: "gsm8k", TRIVIA: "triviaqa"}
"""The form that a task's training file has."""


@dataclass(frozen=True)
class Sizes:
    """How much is done of one task."""

    steps: int
    """Optimiser steps of each LoRA."""
    items: int
    """Test items."""
    tokens: int
    """Tokens of a response at most."""


@dataclass(frozen=True)
class RealTrial:
    """Where things are, and how much is done."""

    out: Path
    model: str
    other_base: str | None
    files: Mapping[str, tuple[Path, Path]]
    """Task -> its original files of training and of test."""
    sizes: Mapping[str, Sizes]
    layers: int
    """That (b)'s small model keeps."""
    healing_steps: int
    alphas: str
    other_alphas: str
    """Of (c)."""

    def run(self, *words: object) -> None:
        """One `proxytune` command; UserError where it fails."""
        command = [str(word) for word in words]
        say(f"proxytune {shlex.join(command)}")
        if subprocess.run([sys.executable, "-m", "proxytune", *command]).returncode:
            raise UserError(f"failed: proxytune {shlex.join(command)}")

    def training_file(self, task: str) -> Path:
        """Where the training examples of a task are."""
        return self.out / "data" / f"{task}.jsonl"

    def write_training_file(self, task: str) -> None:
        """The training examples as prompts and completions, without those whose prompt is a test item's: the
        files that are handed around share questions."""
        train, test = (read_examples(f"{FORMS[task]}:{file}", None) for file in self.files[task])
        tested = {_question(example) for example in test}
        kept = [example for example in train if _question(example) not in tested]
        if len(kept) < len(train):
            say(
                f"{task}: {len(train) - len(kept)} of {len(train)} training examples are test items: left out"
            )
        _write(self.training_file(task), kept)

    def lora(self, model: str, task: str, name: str) -> Path:
        """A LoRA of a model on a task: its folder."""
        folder, steps = self.out / name, self.sizes[task].steps
        data = ("--data", self.training_file(task), "--limit", EXAMPLES_PER_STEP * steps)
        size = ("--max-steps", steps, "--max-length", 512, "--save-every", max(1, steps // 4))
        self.run("tune", "lora", "--model", model, "--base", self.model, "--out", folder, *data, *size, *LORA)
        return folder

    def evaluate(self, system: Path, task: str, roles: Sequence[str], alphas: str) -> None:
        """Every role on the test items, and the proxy under every alpha."""
        size, out = self.sizes[task], system.parent / "runs" / task
        items = ("--data", self.files[task][1], "--limit", size.items)
        where = ("--system", system, *items, "--max-new-tokens", size.tokens)
        for role in roles:
            self.run("eval", task, *where, "--as", role, "--out", out / role)
        self.run("sweep-alpha", task, *where, "--alphas", alphas, "--out", out / "sweep")


def _question(example: TuneExample) -> str:
    return example.messages[-1][1].casefold()


def _write(path: Path, examples: Sequence[TuneExample]) -> None:
    """As prompts and completions."""
    lines = [json.dumps({"prompt": e.messages[-1][1], "completion": e.completion}) for e in examples]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, ("\n".join(lines) + "\n").encode())


def same_base(trial: RealTrial) -> None:
    """(a): base and antiexpert are one model, so that alpha 1 is the expert alone."""
    for task in trial.files:
        expert = trial.lora(trial.model, task, f"a-{task}")
        trial.evaluate(expert / SYSTEM, task, ("base", "expert"), trial.alphas)


def smaller_model(trial: RealTrial) -> None:
    """(b): a small model by layers left out and healing, its LoRA, and the large model's LoRA."""
    bare, healed = trial.out / "b-bare", trial.out / "b-healed"
    if not bare.exists():
        trial.run("tune", "shrink", "--model", trial.model, "--layers", trial.layers, "--out", bare)
    examples = [read_examples(str(trial.training_file(task)), None) for task in trial.files]
    taken = list(itertools.chain.from_iterable(zip(*examples, strict=False)))  # the tasks by turns
    data = trial.out / "data" / "healing.jsonl"
    _write(data, taken)
    size = ("--limit", 4 * trial.healing_steps, "--max-steps", trial.healing_steps)
    teacher = ("--teacher", trial.model)
    trial.run("tune", "full", "--model", bare, *teacher, "--out", healed, "--data", data, *size, *HEALING)
    for task in trial.files:
        ceiling = trial.lora(trial.model, task, f"a-{task}")
        expert = trial.lora(str(healed), task, f"b-expert-{task}")
        system = yaml.safe_load((expert / SYSTEM).read_text())
        system["tuned"] = {**system["base"], "adapter": str(ceiling.resolve())}
        written = _system(trial.out / f"b-{task}", system, expert)
        trial.evaluate(written, task, ("base", "antiexpert", "expert", "tuned"), trial.alphas)


def other_vocabulary(trial: RealTrial) -> None:
    """(c): a base of another vocabulary."""
    expert = trial.lora(trial.model, GSM, f"a-{GSM}")
    system = yaml.safe_load((expert / SYSTEM).read_text())
    system |= {"base": {"model": trial.other_base, "dtype": system["base"]["dtype"]}, "vocab": "intersect"}
    written = _system(trial.out / f"c-{GSM}", system, expert)
    trial.run("check", written)
    trial.evaluate(written, GSM, (), trial.other_alphas)


def _system(folder: Path, system: dict[str, object], expert: Path) -> Path:
    """The system's file, with its expert under the folder's whole path."""
    folder.mkdir(exist_ok=True)
    system["expert"] = {"adapter": str(expert.resolve())}
    write_atomically(folder / SYSTEM, yaml.safe_dump(system, sort_keys=False).encode())
    return folder / SYSTEM


PARTS = {"a": same_base, "b": smaller_model, "c": other_vocabulary}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="make reproduce-real", description="Tune and steer real models.", allow_abbrev=False
    )
    add = parser.add_argument
    both = ("TRAIN", "TEST")
    add("--model", required=True, help="the model that is tuned: a folder, a hub id or demo://NAME")
    add("--other-base", help="a base of another family, for (c)")
    add("--gsm8k", required=True, help="GSM8K's original files", type=Path, nargs=2, metavar=both)
    add("--triviaqa", help="TriviaQA's files, in any published form", type=Path, nargs=2, metavar=both)
    add("--out", type=Path, default=Path("results/tuning-real"))
    add("--steps", type=int, default=40, help="optimiser steps of a LoRA on GSM8K, 16 examples each")
    add("--trivia-steps", type=int, default=80, help="the same on TriviaQA")
    add("--healing-steps", type=int, default=240, help="of (b)'s small model, 4 examples each")
    add("--items", type=int, default=200, help="test items of GSM8K")
    add("--trivia-items", type=int, default=500, help="test items of TriviaQA")
    add("--tokens", type=int, default=256, help="tokens of a response to GSM8K at most")
    add("--layers", type=int, default=15, help="layers that (b)'s small model keeps")
    add("--alphas", default="0:2:0.5")
    add("--other-alphas", default="0,0.5,1", help="of (c)")
    add("--parts", default="a,b,c", help="of: a, b, c")
    return parser.parse_args()


def _trial(given: argparse.Namespace) -> RealTrial:
    found = {GSM: given.gsm8k, TRIVIA: given.triviaqa}
    return RealTrial(
        out=given.out,
        model=given.model,
        other_base=given.other_base,
        files={task: (train, test) for task, both in found.items() if both for train, test in [both]},
        sizes={
            GSM: Sizes(given.steps, given.items, given.tokens),
            TRIVIA: Sizes(given.trivia_steps, given.trivia_items, 20),
        },
        layers=given.layers,
        healing_steps=given.healing_steps,
        alphas=given.alphas,
        other_alphas=given.other_alphas,
    )


def main() -> None:
    """The command line of `python -m proxytune.tuning.trials.real_models`."""
    given = _arguments()
    trial, parts = _trial(given), given.parts.split(",")
    try:
        for part in parts:
            if part not in PARTS:
                raise UserError(f"--parts {part}: choose from {', '.join(PARTS)}")
        for task in trial.files:
            trial.write_training_file(task)
        for part in parts:
            if part != "c" or trial.other_base is not None:
                PARTS[part](trial)
                show(real_scores.write(trial.out))
    except UserError as error:
        say(f"error: {error}")
        sys.exit(2)
    say(f"proxytune report {trial.out} --html {trial.out}/report.html shows everything")


if __name__ == "__main__":
    main()
