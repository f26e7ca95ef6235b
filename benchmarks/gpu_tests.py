"""The stage that runs the tests which need a GPU, in processes beside each other."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest

from benchmarks.stages import Say, Work

ROOT = Path(__file__).resolve().parent.parent
MARK = "pytest.mark.gpu"
PROCESSES = 8
"""One GPU and 16 cores."""
EACH = 60
"""Seconds that one test may take."""
OPTIONS = ("-m", "gpu and not slow", "-p", "no:cacheprovider", "--tb=short", f"--timeout={EACH}")
TOLERANT = ("-W", "default")
"""Warnings are failures with the pinned versions only, and a GPU machine has others."""
EVERY = 20
"""Results after which the counts so far are told."""


def tests(smoke: bool) -> Work:
    """The only stage of its group. A smoke run collects the tests and runs none."""
    how = ("--collect-only",) if smoke else (f"-n{PROCESSES}",)
    return {"GPU": partial(run_tests, [*OPTIONS, *TOLERANT, *how, *marked()])}


def marked() -> list[str]:
    """The files with such tests: every process would read all others too, only to leave them out."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(file.relative_to(ROOT)) for file in files if MARK in file.read_text(encoding="utf-8")]


class Telling:
    """A plugin of pytest: what fails is told when it fails, not at the end."""

    def __init__(self, say: Say) -> None:
        self.say = say
        self.counts = Counter[str]()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """One part of a test has ended; a test that passes counts once, with its call."""
        if report.passed and report.when != "call":
            return
        self.counts[report.outcome] += 1
        if report.failed:
            self.say("failed test", test=report.nodeid, part=report.when, why=report.longreprtext[-3000:])
        if self.counts.total() % EVERY == 0:
            self.say("tests", **self.counts)


def run_tests(options: Sequence[str], say: Say) -> None:
    """Run pytest in this process and those that it starts. All that it prints is in the log."""
    os.environ.update(PROXYTUNE_REQUIRE="gpu,triton", OMP_NUM_THREADS="1")
    os.chdir(ROOT)
    telling = Telling(say)
    code = pytest.main([*options], plugins=[telling])
    say("tests", **telling.counts, exit_code=int(code))
    if code != pytest.ExitCode.OK:
        raise RuntimeError(f"pytest ended with exit code {code}")
