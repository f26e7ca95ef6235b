"""The Makefile's analyses of the paper and the demo report run to the end on the demo system, with few
items."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from proxytune.results import find_runs
from tests.support.checkout import ROOT
from tests.support.require import require_demo


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where make runs: a `bin` with this checkout's proxytune in place of .venv."""
    require_demo()
    found = tmp_path_factory.mktemp("make")
    command = found / "bin" / "proxytune"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nPYTHONPATH="{ROOT}" exec "{sys.executable}" -m proxytune "$@"\n')
    command.chmod(0o755)
    return found


def make(folder: Path, target: str, *variables: str) -> str:
    """Run a target without setting anything up; -> what it printed."""
    done = subprocess.run(
        ["make", "-f", str(ROOT / "Makefile"), "-o", "setup", target, "BIN=bin", *variables],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "MAKEFLAGS": ""},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


SHOWN = {
    "reproduce-table6": ("most promoted tokens", "rows equal the paper's"),
    "reproduce-fig2": ("score against alpha", "│ 0.2 "),
    "reproduce-positions": ("the paper, of its models: 13.5", "the paper, of its models: 18.0"),
    "reproduce-equations": ("Welch's t", "published"),
}


@pytest.mark.slow
@pytest.mark.parametrize("target", SHOWN)
def test_an_analysis_of_the_paper_runs_on_the_demo(folder: Path, target: str) -> None:
    shown = make(folder, target, "SYSTEM=demo", "ARGS=--limit 6")
    for part in SHOWN[target]:
        assert part in shown


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_demo_report_is_made(folder: Path) -> None:
    shown = make(folder, "demo-report", "QUESTIONS=4", "ALPHAS=0:1:0.5", "LATE_SKIP=first:4")
    report = folder / "results" / "demo-report"
    assert f"wrote {report.relative_to(folder) / 'report.html'}" in shown
    found = [run for _, run in find_runs(report)]
    assert {run.n for run in found} == {4}
    assert sum(run.spec.trace == "agreement" for run in found) == 4
    assert {run.spec.alpha.text for run in found if run.spec.role == "proxy"} == {"0", "0.5", "1", "first:4"}
    assert len((report / "report.html").read_text(encoding="utf-8")) > 100_000


def test_the_papers_models_are_the_default(tmp_path: Path) -> None:
    for target in SHOWN:
        asked = subprocess.run(
            ["make", "-n", "-f", str(ROOT / "Makefile"), "-o", "setup", target, "BIN=bin"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        assert "--system llama2-13b-chat" in asked
        assert ("--judge default" in asked) == (target == "reproduce-fig2")
