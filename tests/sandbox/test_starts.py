"""A sandbox that does not start is tried once more, and no more than that."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from typing import Any

import pytest

from proxytune.errors import UserError
from proxytune.sandbox.sandbox import LOST, Sandbox
from proxytune.sandbox.talk import Job, Outcome, Program


def starts_that_fail(monkeypatch: pytest.MonkeyPatch, failing: int) -> list[Sequence[str]]:
    """The first starts end at once, as where no process is to spare. -> all commands, as they come."""
    started: list[Sequence[str]] = []
    real = subprocess.Popen

    def popen(command: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
        started.append(command)
        return real(["false"] if len(started) <= failing else command, **options)

    monkeypatch.setattr(subprocess, "Popen", popen)
    return started


def test_one_failed_start_is_no_failure(box: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    started = starts_that_fail(monkeypatch, 1)
    jobs = [Job((Program("print('done')"),)), Job((Program("1 / 0"),))]
    right, wrong = box.run_together(jobs)
    assert right.passed and not wrong.passed and "ZeroDivisionError" in wrong.results[0]
    assert len(started) == 2


def test_two_failed_starts_are_an_error_and_no_verdict(box: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    started = starts_that_fail(monkeypatch, 9)
    with pytest.raises(UserError, match="did not start"):
        box.run(Job((Program("print('done')"),)))
    assert len(started) == 2


def test_a_job_is_lost_only_where_it_was_the_first(box: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sandbox that ends after some jobs says nothing of the next one, which begins another."""
    asked: list[int] = []

    def run(_: Sandbox, jobs: Sequence[Job]) -> tuple[list[Outcome], str]:
        asked.append(len(jobs))
        return [Outcome(("passed",), (0.0,))] * (1 if len(asked) == 1 else len(jobs)), LOST

    monkeypatch.setattr(Sandbox, "_run", run)
    assert [outcome.passed for outcome in box.run_together([Job(())] * 3)] == [True] * 3
    assert asked == [3, 2]
