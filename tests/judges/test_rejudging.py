"""A run that is judged again: rows and metrics are of one judge, wherever the process is killed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from proxytune import results
from proxytune.config import System
from proxytune.judges.pairwise import PairwiseJudge
from proxytune.records import Run
from proxytune.runs.judging import judge_run
from proxytune.tasks import get_task
from tests.support.endpoint import Endpoint
from tests.support.runs import evaluated


class Killed(BaseException):
    """In place of a signal."""


def of_one_judge(folder: Path) -> Run:
    """The run in a folder, whose rows have the judge and the metrics that it names."""
    run, rows = results.read_run(folder), results.read_rows(folder)
    assert {row["annotator"] for row in rows} == {f"proxytune/{run.judge}"}
    assert run.metrics == get_task("alpaca_farm").metrics(rows)
    return run


@pytest.fixture
def judged(endpoint: Endpoint, system: System, tmp_path: Path) -> Path:
    """A run that was judged once."""
    folder = tmp_path / "judged"
    evaluated(system, "alpaca_farm", data="plumbing", limit=3, out=folder, progress=False)
    endpoint.reply = "A"
    judge_run(folder, PairwiseJudge("first"))
    endpoint.reply = "tie"
    return folder


@pytest.mark.parametrize("mends", ["reads", "judges"])
@pytest.mark.every(4)
def test_a_kill_between_any_two_files(
    mends: str, judged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace, step, found = Path.replace, 0, set[str | None]()
    while True:
        folder, left = tmp_path / f"copy{step}", step
        shutil.copytree(judged, folder)

        def replaced(path: Path, target: Any) -> Path:
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed
            return replace(path, target)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", replaced)
            try:
                judge_run(folder, PairwiseJudge("second"))
            except Killed:
                pass
            else:
                break
        if mends == "judges":
            assert judge_run(folder, PairwiseJudge("second")).judge == "second"
        found.add(of_one_judge(folder).judge)
        step += 1
    assert step >= 2 and of_one_judge(folder).metrics["n_draws"].value == 3
    assert found == ({"second"} if mends == "judges" else {"first", "second"})
