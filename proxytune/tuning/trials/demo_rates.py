"""The learning rates of `demo_methods`, chosen on the demo's dev split.

The small and the large model are tuned at a few rates by every method with one seed, and each is measured on
dev items: the small model alone, the one that was tuned through the base as a part of the proxy. The rate
with the best mean over the tasks is the method's; of equals, the lowest. The test split is not looked at."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean

from pydantic import BaseModel, ConfigDict

from proxytune.models import Models
from proxytune.options import RunOptions
from proxytune.run_files import content_of
from proxytune.terminal import say
from proxytune.tuning.trials import demo_trainings as demo
from proxytune.tuning.trials.figures import write_figures

SEED = 0
RESULT = "rates.json"


class TriedRate(BaseModel):
    """One training of the search."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    case: str
    model: str
    rate: float
    seed: int
    n: int
    """Dev items of each task."""
    scores: dict[str, float]
    """Task -> score."""


def chosen(case: demo.DemoCase, model: str, tried: Sequence[TriedRate]) -> float:
    """The rate of a case for a model: the best mean over the tasks; of equals, the lowest."""
    own = [t for t in tried if (t.case, t.model) == (case.rates_of or case.name, model)]
    return max(own, key=lambda t: (mean(t.scores.values()), -t.rate)).rate


def search(root: Path, n: int, cases: Sequence[demo.DemoCase], model: str) -> list[TriedRate]:
    """Everything that was tried, after all rates of these cases for this model. What is in the file is
    not tried again."""
    path = root / RESULT
    there = json.loads(content_of(path)) if path.exists() else []
    known = [TriedRate.model_validate(one) for one in there]
    dev = demo.write_dev(root, n)
    for case in (demo.CASES[case.rates_of or case.name] for case in cases):
        for rate in case.rates[model]:
            if any((t.case, t.model, t.rate, t.n) == (case.name, model, rate, n) for t in known):
                continue
            scores = measured(case, model, rate, root, dev)
            made = TriedRate(case=case.name, model=model, rate=rate, seed=SEED, n=n, scores=scores)
            say(f"{case.name}, {model}, learning rate {rate:g}: {scores}")
            known.append(made)
            write_figures(path, known)
    return known


def measured(
    case: demo.DemoCase, model: str, rate: float, root: Path, dev: Mapping[str, Path]
) -> dict[str, float]:
    """One training, and its scores on the dev items."""
    record = demo.trained_apart(case, model, rate, SEED, root)
    folder, role = case.folder(root, model, rate, SEED), case.measured_as
    if model == demo.SMALL:
        system = demo.demo_system(folder.name, record, folder)
    else:
        system, role = demo.large_system(folder.name, folder, record), "tuned"
    models, runs = Models(system), root / "runs" / "dev" / folder.name
    return {
        task: demo.score(models, task, role, RunOptions(data=str(path)), runs / task).value
        for task, path in dev.items()
    }
