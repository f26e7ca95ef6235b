"""Stages on a lent machine: what one of them does wrong leaves the others' results alone."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.stages import LINES, Day, Stage, run
from tests.support.checkout import ROOT

Played = Callable[..., list[dict[str, Any]]]
SCRIPT = """
import os, subprocess, sys, time
from benchmarks.stages import NotHere, serve

def good(say):
    print("noise on stdout")
    os.write(1, b"and below Python\\n")
    say("figure", process=os.getpid())

def wrong(say):
    say("figure", value=2)
    raise ValueError("a broken stage")

def poisoned(say):
    global answers
    answers = False
    raise RuntimeError("CUDA error")

def hangs(say):
    child = subprocess.Popen(["sleep", "600"])
    say("figure", child=child.pid)
    child.wait()

def dies(say):
    print("last words", flush=True)
    os._exit(3)

def elsewhere(say):
    raise NotHere("no such card")

def recover():
    if not answers:
        raise RuntimeError("the device does not answer")

answers = True
work = {f.__name__: f for f in (good, wrong, poisoned, hangs, dies, elsewhere)}
if sys.argv[1] == "broken":
    import no_such_module
serve(work, recover)
"""


@pytest.fixture
def played(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Played:
    """Runs stages of one group by their names -> the lines of the file."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    script = tmp_path / "group.py"
    script.write_text(SCRIPT)

    def play(*names: str, group: str = "a", deadline: float = 300) -> list[dict[str, Any]]:
        stages = [Stage(group, name, need=0, limit=8 if name == "hangs" else 300) for name in names]
        run(stages, {group: 0}, [sys.executable, str(script)], Day(tmp_path, deadline))
        return [json.loads(line) for line in (tmp_path / LINES).read_text().splitlines()]

    return play


def ends(lines: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Every stage's last line."""
    return [(line["stage"].split(": ")[1], line["kind"]) for line in lines if line["kind"] != "figure"]


def processes(lines: list[dict[str, Any]]) -> list[int]:
    return [line["process"] for line in lines if "process" in line]


def test_stages_of_a_group_share_a_process(played: Played, capsys: pytest.CaptureFixture[str]) -> None:
    lines = played("good", "elsewhere", "good")
    assert ends(lines) == [("good", "done"), ("elsewhere", "skipped"), ("good", "done")]
    assert len(processes(lines)) == 2 and len(set(processes(lines))) == 1
    assert lines[2]["reason"] == "no such card"
    shown = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert shown == lines, "what is in the file is on stdout, and nothing else"


def test_an_exception_is_a_line_and_the_process_goes_on(played: Played) -> None:
    lines = played("good", "wrong", "good")
    assert ends(lines) == [("good", "done"), ("wrong", "error"), ("good", "done")]
    failure = lines[3]
    assert lines[2]["value"] == 2 and failure["error"] == "ValueError: a broken stage"
    assert any("in wrong" in line for line in failure["traceback"])
    assert len(set(processes(lines))) == 1


def test_a_device_that_does_not_answer_costs_a_process(played: Played) -> None:
    lines = played("good", "poisoned", "good")
    assert ends(lines) == [("good", "done"), ("poisoned", "error"), ("good", "done")]
    assert "spent" not in lines[2] and lines[2]["error"] == "RuntimeError: CUDA error"
    assert len(set(processes(lines))) == 2


@pytest.mark.slow
def test_a_stage_that_hangs_is_killed_with_what_it_started(played: Played) -> None:
    lines = played("good", "hangs", "good")
    assert ends(lines) == [("good", "done"), ("hangs", "killed"), ("good", "done")]
    assert len(set(processes(lines))) == 2
    assert any("in hangs" in line for line in lines[3]["log"]), "where it was"
    for _ in range(200):
        if not alive(lines[2]["child"]):
            return
        time.sleep(0.05)
    os.kill(lines[2]["child"], signal.SIGKILL)
    pytest.fail("its child is still there")


def alive(process: int) -> bool:
    """Whether a process runs; one that nobody has waited for yet does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_process_that_dies_is_replaced(played: Played) -> None:
    lines = played("dies", "good")
    assert ends(lines) == [("dies", "died"), ("good", "done")]
    assert lines[0]["exit_code"] == 3 and lines[0]["log"][-1] == "last words"


def test_a_group_that_cannot_begin_says_why(played: Played) -> None:
    lines = played("good", "good", group="broken")
    assert ends(lines) == [("good", "died"), ("good", "died")]
    assert all("no_such_module" in line["log"][-1] for line in lines)


def test_what_there_is_no_time_for_is_skipped(tmp_path: Path) -> None:
    day = Day(tmp_path, 100)
    stages = [Stage("a", "long", need=90, limit=90), Stage("b", "longer", need=120, limit=120)]
    run(stages, {"a": 20, "b": 0}, ["/no/such/program"], day)
    lines = [json.loads(line) for line in (tmp_path / LINES).read_text().splitlines()]
    assert ends(lines) == [("long", "skipped"), ("longer", "skipped")] and day.failed == []
    assert "it takes about 110 s" in lines[0]["reason"]


@pytest.mark.slow
def test_the_deadline_ends_a_stage(played: Played) -> None:
    lines = played("hangs", "good", deadline=2)
    assert ends(lines) == [("hangs", "killed"), ("good", "skipped")]
    assert lines[-2]["after_s"] <= 2
