"""What is no failure of a sample is no verdict: a sandbox that was killed, or does not start any more."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from proxytune import results
from proxytune.config import Sampling, System
from proxytune.errors import UserError
from proxytune.models.roles import Models
from proxytune.options import RunOptions
from proxytune.runs import evaluation as run
from proxytune.runs.decoders import decoder_here
from proxytune.runs.session import RunPlan, run_job
from proxytune.sandbox import LOST, Job, Outcome, Sandbox
from proxytune.tasks import get_task, score_file
from proxytune.tasks.task import Execution
from tests.support.answers import jsonl
from tests.support.runs import QUIET

ITEM = {"prompt": "def f():\n", "entry_point": "f", "test": "def check(candidate):\n    assert candidate()\n"}
Run = Callable[[Job], str]
"""How the programs of a job end."""


@pytest.fixture
def sandbox(monkeypatch: pytest.MonkeyPatch) -> Callable[[Run], Sandbox]:
    """Sandboxes in which programs end as a test has it."""

    def made(ends: Run) -> Sandbox:
        def run_together(self: Sandbox, jobs: Sequence[Job]) -> list[Outcome]:
            return [Outcome((ends(job),) * len(job.programs), (0.0,) * len(job.programs)) for job in jobs]

        monkeypatch.setattr(Sandbox, "run_together", run_together)
        return Sandbox("weak", workers=1)

    return made


def broken(job: Job) -> str:
    """A sandbox that does not start."""
    raise UserError("the sandbox did not start: no memory")


@pytest.fixture
def job(system: System, tmp_path: Path) -> RunPlan:
    """Two problems, two samples each."""
    data = jsonl(tmp_path / "t.jsonl", [{**ITEM, "task_id": f"HumanEval/{i}"} for i in range(2)])
    sampling = Sampling(max_new_tokens=4, n=2, temperature=1.0)
    return run.plan(system, "humaneval", "base", RunOptions(data=str(data), sampling=sampling))


def test_what_is_lost_is_run_once_more(sandbox: Any) -> None:
    seen: list[str] = []

    def ends(job: Job) -> str:
        seen.append(job.programs[0].code)
        return LOST if "sometimes" in seen[-1] and seen.count(seen[-1]) == 1 else "passed"

    execution = Execution(sandbox(ends), {"0": {**ITEM, "task_id": "0"}})
    row = {
        "task_id": "0",
        "prompt": ITEM["prompt"],
        "completions": ["    return 1", "    return 'sometimes'"],
    }
    (found,) = get_task("humaneval").run_code([row], execution)
    assert found["passed"] == [True, True] and execution.lost == 0


def test_what_stays_lost_is_not_the_models_failure(sandbox: Any) -> None:
    execution = Execution(sandbox(lambda job: LOST), {"0": {**ITEM, "task_id": "0"}})
    row = {"task_id": "0", "prompt": ITEM["prompt"], "completions": ["    return 1"]}
    task = get_task("humaneval")
    (found,) = task.run_code([row], execution)
    assert found["passed"] == [None] and found["result"] == [f"not run: {LOST}"] and execution.lost == 1
    assert task.scores(found) == {"not_run": 1.0}


@pytest.mark.parametrize(
    "result", [f"failed: ValueError: {LOST}", "failed: ValueError: not run: ", "timed out"]
)
def test_code_cannot_call_itself_lost(sandbox: Any, result: str) -> None:
    execution = Execution(sandbox(lambda job: result), {"0": {**ITEM, "task_id": "0"}})
    row = {"task_id": "0", "prompt": ITEM["prompt"], "completions": ["    return 1"]}
    (found,) = get_task("humaneval").run_code([row], execution)
    assert found["passed"] == [False] and found["result"] == [result] and execution.lost == 0


def test_it_is_run_again_at_the_next_start(
    sandbox: Any, job: RunPlan, models: Models, tmp_path: Path
) -> None:
    """One problem has its verdicts, the other's sandbox is killed whenever it starts: it has no score, and
    once it is left alone it is as if nothing had been."""
    whole = run_job(job, tmp_path / "whole", decoder_here(models), QUIET, sandbox(lambda job: "passed"))
    ran: list[Job] = []

    def ends(job: Job) -> str:
        ran.append(job)
        return "passed" if len(ran) <= 2 else LOST

    out = tmp_path / "run"
    first = run_job(job, out, decoder_here(models), QUIET, sandbox(ends))
    assert first.status == "done" and first.metrics["not_run"].value == 0.5
    assert (first.headline, first.metrics["pass@1"].value, first.metrics["pass@1"].n) == ("pass@1", 1, 1)
    assert [row["passed"] for row in results.read_rows(out)] == [[True, True], [None, None]]
    again = run_job(job, out, decoder_here(models), QUIET, sandbox(lambda job: "passed"))
    assert again.metrics == whole.metrics and results.read_rows(out) == results.read_rows(tmp_path / "whole")
    assert score_file(job.task, out).metrics == whole.metrics


def test_a_sandbox_that_breaks_costs_no_response(
    sandbox: Any, job: RunPlan, models: Models, tmp_path: Path
) -> None:
    """All is decoded and stored; then one line says why nothing was run, and the same command goes on."""
    with pytest.raises(UserError, match="the sandbox did not start: no memory"):
        run_job(job, tmp_path / "run", decoder_here(models), QUIET, sandbox(broken))
    stored = results.read_run(tmp_path / "run")
    assert stored.status == "done" and stored.headline == "not_run" and stored.n == 2
    made = run_job(job, tmp_path / "run", decoder_here(models), QUIET, sandbox(lambda job: "passed"))
    assert made.headline == "pass@1" and made.cost == stored.cost
