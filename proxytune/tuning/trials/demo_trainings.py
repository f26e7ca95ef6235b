"""What the trials on the demo world share: the cases that are compared, their data, a training in a process
of its own, and the score of a role.

A training runs in a fork of a process that has nothing but the libraries in memory: its peak is its own, and
the libraries are imported once for all of them."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from proxytune.config import ModelSpec, Role, System
from proxytune.demo import corpus, world
from proxytune.models import Models
from proxytune.options import DecodeOptions, JudgeOptions, RunOptions
from proxytune.records import Metric
from proxytune.run_files import write_atomically
from proxytune.runs import evaluation
from proxytune.training_record import TrainingRecord
from proxytune.tuning.demo_models import system_prompt
from proxytune.tuning.options import TuneOptions
from proxytune.tuning.session import plan, tune

SMALL, LARGE = "demo://antiexpert", "demo://base"
TASKS = ("gsm", "truthfulqa")
EXAMPLES = {"sums": 120, "facts": 120, "choices": 0, "code": 0, "lists": 0}
"""Of the demo's tuning examples, those of the tasks that are measured."""
SHARED = {"batch": 8, "epochs": 1.0, "warmup": 0.1, "base": LARGE}
"""Settings of every training."""
NO_JUDGE = {"truthfulqa": "none"}


@dataclass(frozen=True)
class DemoCase:
    """A way to tune that is compared with others."""

    name: str
    method: str
    rates: Mapping[str, tuple[float, ...]]
    """Model -> the learning rates that are tried on dev items. Without the large model, the case is of the
    small one only."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    rates_of: str | None = None
    """The case whose chosen rates it has, in place of a search of its own."""

    @property
    def measured_as(self) -> Role:
        """What the expert is for: to be good alone, or to be good in the proxy."""
        return "proxy" if "through" in self.settings else "expert"

    def options(self, data: Path, rate: float, seed: int) -> TuneOptions:
        """Everything that `proxytune tune` is told."""
        return TuneOptions(data=str(data), learning_rate=rate, seed=seed, **{**SHARED, **self.settings})

    def folder(self, root: Path, model: str, rate: float, seed: int) -> Path:
        """Where a training is."""
        name = f"{self.name.replace(' ', '-')}-{model.removeprefix('demo://')}-{rate:g}-seed-{seed}"
        return root / "trained" / name


_LORA, _LORA_LARGE = (1e-3, 3e-3, 1e-2), (1e-3, 3e-3)
CASES: Mapping[str, DemoCase] = {
    case.name: case
    for case in (
        DemoCase("full", "full", {SMALL: (1e-4, 3e-4, 1e-3), LARGE: (1e-4, 3e-4)}),
        DemoCase("lora", "lora", {SMALL: _LORA, LARGE: _LORA_LARGE}, {"rank": 16}),
        DemoCase("lora through base", "lora", {SMALL: _LORA}, {"rank": 16, "through": "base"}),
        DemoCase("qlora", "qlora", {SMALL: _LORA, LARGE: _LORA_LARGE}, {"rank": 16}, rates_of="lora"),
        DemoCase("p-tuning", "p-tuning", {SMALL: (3e-3, 1e-2), LARGE: (1e-2,)}, {"epochs": 8.0}),
        DemoCase("lomo", "lomo", {SMALL: (1e-2, 3e-2, 1e-1), LARGE: (1e-2, 3e-2)}),
    )
}


def write_examples(folder: Path) -> Path:
    """The tuning examples as prompts and completions, the chat format in the prompts; -> their file."""
    path = folder / "data.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        documents = corpus.tuning(world.make_world(), system_prompt(), corpus.TuningAmounts(**EXAMPLES))
        lines = [json.dumps(dict(zip(("prompt", "completion"), _halves(d), strict=True))) for d in documents]
        write_atomically(path, ("\n".join(lines) + "\n").encode())
    return path


def _halves(document: corpus.Document) -> tuple[str, str]:
    """What is not learned of a document, and what is."""
    learned = [segment.weight > 0 for segment in document]
    first = learned.index(True)
    return "".join(s.text for s in document[:first]), "".join(s.text for s in document[first:])


def write_dev(folder: Path, n: int) -> Mapping[str, Path]:
    """Task -> a file of its first `n` dev items."""
    found = {}
    folder.mkdir(parents=True, exist_ok=True)
    for task in TASKS:
        found[task] = folder / f"{task}-dev.jsonl"
        lines = "".join(json.dumps(row) + "\n" for row in world.rows(task, "dev", n))
        write_atomically(found[task], lines.encode())
    return found


def trained_apart(case: DemoCase, model: str, rate: float, seed: int, root: Path) -> TrainingRecord:
    """A training in its own process, made if it is not there. What it raises is raised here."""
    options = case.options(write_examples(root), rate, seed)
    folder = case.folder(root, model, rate, seed)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["proxytune.tuning.trainer", __name__])
    with ProcessPoolExecutor(1, context) as process:
        return process.submit(_train, case.method, model, options, folder).result()


def _train(method: str, model: str, options: TuneOptions, out: Path) -> TrainingRecord:
    return tune(plan(method, model, options), out, show=False)


def score(models: Models, task: str, role: Role, run: RunOptions, out: Path) -> Metric:
    """The headline of one role on one task; a finished run is read."""
    decode, judge = DecodeOptions(progress=False), JudgeOptions(judge="none")
    made = evaluation.Evaluation(models.system, task, run, decode, judge, loaded=models)
    found, _ = made.run(role, out)
    assert found.score is not None
    return found.score


def demo_system(name: str, record: TrainingRecord, folder: Path) -> System:
    """The demo's base with this expert."""
    adapter = ModelSpec(adapter=str(folder), chat="llama2")
    whole = ModelSpec(model=str(folder), dtype="float32", chat="llama2")
    return System(
        name=name,
        base=ModelSpec(model=LARGE, dtype="float32"),
        antiexpert=record.antiexpert,
        expert=adapter if record.result == "adapter" else whole,
        judges=NO_JUDGE,
    )


def large_system(name: str, folder: Path, record: TrainingRecord) -> System:
    """The large model that was tuned in place of steered, in the bits that it was tuned in."""
    if record.result == "adapter":
        tuned = record.antiexpert.model_copy(update={"adapter": str(folder), "chat": "llama2"})
    else:
        tuned = ModelSpec(model=str(folder), dtype="float32", chat="llama2")
    return System(name=name, base=ModelSpec(model=LARGE, dtype="float32"), tuned=tuned, judges=NO_JUDGE)
