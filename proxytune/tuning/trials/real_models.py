"""Real models, an hour on 2 cores: does a tuned expert steer, and does the gap close?

`make reproduce-real ARGS="--smollm2 DIR --gsm8k DIR --triviaqa DIR"` runs it. Every step is a `proxytune`
command that is printed before it runs; what is finished is not made again.

(a) SmolLM2-135M-Instruct as base and antiexpert, and a LoRA of it as the expert: one tuned on GSM8K, one on
TriviaQA. (b) A trio of one vocabulary in which base and antiexpert differ: the small model is SmolLM2 with
layers left out,
    healed by learning the whole one's distribution; the expert is its LoRA; the ceiling is the whole one's
    LoRA.
(c) Across vocabularies: Gemma 3 270M steered by (a)'s GSM8K expert with `vocab: intersect`, and what
`proxytune check`
    says of the tokens that it lacks."""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from proxytune.errors import UserError
from proxytune.run_files import write_atomically
from proxytune.terminal import say
from proxytune.training_record import SYSTEM

LORA = ("--batch", "4", "--accumulate", "4", "--max-length", "512", "--rank", "16", "--learning-rate", "2e-4")
HEALING = ("--batch", "4", "--max-length", "256", "--learning-rate", "3e-4")
ALPHAS = "0:2:0.5"
GSM, TRIVIA = "gsm", "triviaqa"


@dataclass(frozen=True)
class RealTrial:
    """Where things are, and how much is done."""

    out: Path
    smollm2: str
    gemma: str | None
    gsm8k: Path
    """The folder of train.jsonl and test.jsonl."""
    triviaqa: Path | None
    """The same of TriviaQA, in any published form."""
    steps: int
    n: int
    layers: int

    def run(self, *words: object) -> None:
        """One `proxytune` command; UserError where it fails."""
        command = [str(word) for word in words]
        say(f"proxytune {shlex.join(command)}")
        if subprocess.run([sys.executable, "-m", "proxytune", *command]).returncode:
            raise UserError(f"failed: proxytune {shlex.join(command)}")

    def source(self, task: str, split: str) -> str:
        """A file of a task, in the form that `tune --data` takes for its training split."""
        folder = self.gsm8k if task == GSM or self.triviaqa is None else self.triviaqa
        found = sorted(folder.glob(f"*{split}*.json*"))
        if not found:
            raise UserError(f"no file *{split}*.json* in '{folder}'")
        form = {GSM: "gsm8k", TRIVIA: "triviaqa"}[task]
        return f"{form}:{found[0]}" if split == "train" else str(found[0])

    def lora(self, model: str, task: str, name: str, base: str) -> Path:
        """A LoRA of a model on a task."""
        folder = self.out / name
        data = ("--data", self.source(task, "train"), "--limit", str(16 * self.steps))
        size = ("--max-steps", str(self.steps), "--save-every", str(max(1, self.steps // 4)))
        self.run("tune", "lora", "--model", model, "--base", base, "--out", folder, *data, *size, *LORA)
        return folder

    def evaluate(self, system: Path, task: str, roles: Sequence[str]) -> None:
        """Every role on the test items, and the proxy under several alphas."""
        where = ("--system", system, "--data", self.source(task, "test"), "--limit", str(self.n))
        for role in roles:
            self.run("eval", task, *where, "--as", role, "--out", system.parent / "runs" / task / role)
        sweep = system.parent / "runs" / task / "sweep"
        self.run("sweep-alpha", task, *where, "--alphas", ALPHAS, "--out", sweep)


def same_base(trial: RealTrial) -> None:
    """(a): base and antiexpert are one model."""
    for task in (GSM,) if trial.triviaqa is None else (GSM, TRIVIA):
        expert = trial.lora(trial.smollm2, task, f"a-{task}", trial.smollm2)
        trial.evaluate(expert / SYSTEM, task, ("base", "antiexpert", "expert", "proxy"))


def smaller_model(trial: RealTrial) -> None:
    """(b): a small model by layers left out and healing, its LoRA, and the large model's LoRA."""
    bare, healed = trial.out / "b-bare", trial.out / "b-healed"
    if not bare.exists():
        trial.run("tune", "shrink", "--model", trial.smollm2, "--layers", trial.layers, "--out", bare)
    data = ("--data", trial.source(GSM, "train"), "--max-steps", str(4 * trial.steps))
    trial.run("tune", "full", "--model", bare, "--teacher", trial.smollm2, "--out", healed, *data, *HEALING)
    expert = trial.lora(str(healed), GSM, "b-expert", trial.smollm2)
    ceiling = trial.lora(trial.smollm2, GSM, "b-tuned", trial.smollm2)
    whole = yaml.safe_load((expert / SYSTEM).read_text())
    whole["tuned"] = {"model": whole["base"]["model"], "adapter": str(ceiling.resolve()), "dtype": "float32"}
    whole["expert"] = {"adapter": str(expert.resolve())}
    system = trial.out / "b" / SYSTEM
    system.parent.mkdir(exist_ok=True)
    write_atomically(system, yaml.safe_dump(whole, sort_keys=False).encode())
    trial.evaluate(system, GSM, ("base", "antiexpert", "expert", "proxy", "tuned"))


def other_vocabulary(trial: RealTrial) -> None:
    """(c): a base of another vocabulary."""
    whole = yaml.safe_load((trial.out / f"a-{GSM}" / SYSTEM).read_text())
    whole |= {"base": {"model": trial.gemma, "dtype": "float32"}, "vocab": "intersect"}
    whole["expert"] = {"adapter": str((trial.out / f"a-{GSM}").resolve())}
    system = trial.out / "c" / SYSTEM
    system.parent.mkdir(exist_ok=True)
    write_atomically(system, yaml.safe_dump(whole, sort_keys=False).encode())
    trial.run("check", system)
    trial.evaluate(system, GSM, ("base", "proxy"))


def main() -> None:
    """The command line of `python -m proxytune.tuning.trials.real_models`."""
    parser = argparse.ArgumentParser(description="Tune and steer real models.")
    parser.add_argument("--smollm2", required=True, help="the folder of SmolLM2-135M-Instruct")
    parser.add_argument("--gemma", help="the folder of Gemma 3 270M, for (c)")
    parser.add_argument("--gsm8k", type=Path, required=True, help="the folder of GSM8K's files")
    parser.add_argument(
        "--triviaqa", type=Path, help="the folder of TriviaQA's files, for the second half of (a)"
    )
    parser.add_argument("--out", type=Path, default=Path("results/tuning-real"))
    parser.add_argument("--steps", type=int, default=60, help="optimiser steps of each LoRA")
    parser.add_argument("--items", type=int, default=200, help="test items of each task")
    parser.add_argument("--layers", type=int, default=15, help="layers that (b)'s small model keeps")
    parser.add_argument("--parts", default="abc")
    given = parser.parse_args()
    trial = RealTrial(
        given.out,
        given.smollm2,
        given.gemma,
        given.gsm8k,
        given.triviaqa,
        given.steps,
        given.items,
        given.layers,
    )
    given.out.mkdir(parents=True, exist_ok=True)
    try:
        for part, make in {"a": same_base, "b": smaller_model, "c": other_vocabulary}.items():
            if part in given.parts and (part != "c" or trial.gemma is not None):
                make(trial)
    except UserError as error:
        say(f"error: {error}")
        sys.exit(2)
    say(f"proxytune report {given.out} --html {given.out}/report.html shows everything")


if __name__ == "__main__":
    main()
