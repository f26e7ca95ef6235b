"""kill -9 at random moments: a run that was killed says what one that was left alone says, cost included."""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from proxytune import results
from proxytune.config import Sampling, System
from proxytune.models.roles import Models
from proxytune.options import RunOptions
from proxytune.runs import evaluation as run
from proxytune.runs.alpha_sweep import parse_alphas, sweep
from proxytune.runs.decoders import decoder_here
from proxytune.runs.judging import judge_run
from proxytune.runs.session import run_job
from proxytune.sandbox.sandbox import Sandbox
from tests.support.answers import jsonl
from tests.support.endpoint import Endpoint
from tests.support.kills import Killer, figures
from tests.support.runs import QUIET, evaluation_of
from tests.support.tiers import examples

KILLS = int(os.environ.get("PROXYTUNE_KILLS", "12"))
"""Of each kind of work. (50 of each were tried for issue 16: PROXYTUNE_KILLS=50.)"""
PLAIN = {"batch": 4, "speculate": 3}
"""A fixed draft length: what is drafted does not depend on measured times."""
SAMPLING = Sampling(max_new_tokens=12, temperature=1.0, n=2)


@dataclass(frozen=True)
class Work:
    """What is killed: it writes a folder, in which some folders are runs."""

    do: Callable[[Path], Any]
    runs: Callable[[Path], list[Path]]
    begin: Callable[[Path], Any] = lambda folder: None
    """What is there before it starts."""


def killed(work: Work, root: Path, kills: int, seed: int) -> None:
    """Every run in the folder of work that is killed has the figures of one that is left alone."""
    work.begin(root / "warm")
    work.do(root / "warm")  # here, so that forks need not load anything
    work.begin(root / "whole")
    killer, began = Killer(random.Random(seed)), time.monotonic()
    killer.until_done(lambda: work.do(root / "whole"), 0)
    killer.whole = time.monotonic() - began
    wanted = [figures(folder) for folder in work.runs(root / "whole")]
    assert wanted
    ratios, number, most = [], 0, 0
    while killer.kills < kills:
        folder = root / str(number)
        number += 1
        work.begin(folder)
        left = min(6, kills - killer.kills)
        most = max(most, killer.until_done(lambda folder=folder: work.do(folder), left))
        for found, alone in zip(map(figures, work.runs(folder)), wanted, strict=True):
            assert {name: (value, alone[name]) for name, value in found.items() if value != alone[name]} == {}
        for one, other in zip(work.runs(folder), work.runs(root / "whole"), strict=True):
            cost, alone = results.read_run(one).cost, results.read_run(other).cost
            assert 0 < cost.prefill_seconds <= cost.seconds and cost.process_peak > 0
            ratios.append(cost.seconds / alone.seconds)
            strays = {path.name for path in one.iterdir()} - {path.name for path in other.iterdir()}
            assert not strays, "nothing half-written stays"
        shutil.rmtree(folder)
    assert killer.endings and set(killer.endings) == {0}
    print(
        f"\n{killer.kills} kills in {number} runs (up to {most} in one), all figures equal; "
        f"seconds {min(ratios):.2f} to {max(ratios):.2f} of a run left alone (median {median(ratios):.2f})"
    )


@pytest.mark.slow
def test_an_evaluation(system: System, models: Models, tmp_path: Path) -> None:
    asked = evaluation_of(system, "gsm", models, sampling=SAMPLING, limit=12, trace="tokens", **PLAIN)
    work = Work(lambda folder: asked.run("proxy", folder), lambda folder: [folder])
    killed(work, tmp_path, examples(3, KILLS), 1)


@pytest.mark.slow
def test_a_sweep(system: System, models: Models, tmp_path: Path) -> None:
    sampling = SAMPLING.model_copy(update={"n": 1})
    asked = evaluation_of(system, "gsm", models, sampling=sampling, limit=6, **PLAIN)
    alphas = parse_alphas("0,0.5,1,first:4")
    work = Work(lambda folder: sweep(asked, alphas, folder), lambda folder: sorted(folder.glob("alpha=*")))
    killed(work, tmp_path, KILLS, 2)


@pytest.mark.slow
def test_a_judging(
    endpoint: Endpoint, system: System, models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pair that was paid for is not asked again; a reply that was under way may be."""
    from proxytune.judges.pairwise import PairwiseJudge

    pairs = [{"instruction": f"Do {i}.", "output": f"GOOD {i}", "generator": "g"} for i in range(20)]
    data = tmp_path / "pairs.json"
    data.write_text(json.dumps(pairs))
    settings = {"sampling": Sampling(max_new_tokens=8), "data": str(data), **PLAIN}
    evaluation_of(system, "alpaca_farm", models, **settings).run("base", tmp_path / "unjudged")

    def judge(folder: Path) -> None:
        monkeypatch.setenv("PROXYTUNE_CACHE", str(folder) + "-cache")
        judge_run(folder, PairwiseJudge("m", workers=2))

    work = Work(judge, lambda folder: [folder], lambda to: shutil.copytree(tmp_path / "unjudged", to))
    killed(work, tmp_path, KILLS, 3)
    print(f"{len(endpoint.seen)} calls")


@pytest.mark.slow
def test_code(box: Sandbox, system: System, models: Models, tmp_path: Path) -> None:
    asked = "def add(a, b):\n    return a + b\n#"  # passes, unless the response begins another line
    test = "def check(candidate):\n    assert candidate(1, 2) == 3\n"
    row = {"prompt": asked, "entry_point": "add", "test": test}
    data = jsonl(tmp_path / "t.jsonl", [{**row, "task_id": f"HumanEval/{i}"} for i in range(4)])
    sampling = Sampling(max_new_tokens=6, n=3, temperature=1.0)
    job = run.plan(system, "humaneval", "proxy", RunOptions(data=str(data), sampling=sampling))
    decode = QUIET.model_copy(
        update=PLAIN
    )  # by itself, how much is drafted depends on the time that it takes
    work = Work(
        lambda folder: run_job(job, folder, decoder_here(models), decode, box), lambda folder: [folder]
    )
    killed(work, tmp_path, KILLS, 4)
