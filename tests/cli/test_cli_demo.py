"""`proxytune demo`: the promised JSON, the control row, and (slow) that the proxy closes the gap."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from proxytune import results
from proxytune.cli.commands import demo as cli_demo
from proxytune.config import load_system
from proxytune.demo import smoke_data, world
from proxytune.demo.world import OPENERS
from proxytune.errors import UserError
from proxytune.sandbox.sandbox import Sandbox
from tests.support import command_line
from tests.support.checkout import ROOT, environment
from tests.support.require import require_demo
from tests.support.tiers import WHOLE

pytestmark = pytest.mark.xdist_group("demo")  # the tests of one run stay in one process

ROLES = ("base", "antiexpert", "expert", "proxy", "tuned")
FAMILIES = {
    "gsm": "exact_match",
    "truthfulqa": "reference_accuracy",
    "truthfulqa_mc": "acc",
    "humaneval": "pass@10",
    "toxigen": "overall",
}
"""The tasks of the demo and what their tables show."""


@pytest.fixture(autouse=True)
def _weights() -> None:
    require_demo()


def proxytune(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command in `folder`."""
    command = [sys.executable, "-m", "proxytune", *arguments]
    done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


def isolates() -> bool:
    """Whether a sandbox works here; where tests must have one, its absence is a failure."""
    try:
        Sandbox.open()
    except UserError as error:
        if "sandbox" in os.environ.get("PROXYTUNE_REQUIRE", ""):
            pytest.fail(str(error))
        return False
    return True


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a small demo, in which `kept` holds its runs, and what it printed."""
    require_demo()
    folder = tmp_path_factory.mktemp("demo")
    return folder, proxytune(folder, "demo", "--limit", "2", "--out", "kept").stdout


@pytest.mark.slow
def test_a_small_demo_has_the_promised_form(kept: tuple[Path, str]) -> None:
    folder, _ = kept
    tasks = json.loads(proxytune(folder, "demo", "--limit", "2", "--out", "kept", "--json").stdout)["tasks"]
    assert list(tasks) == [name for name in FAMILIES if name != "humaneval" or isolates()]
    for name, task in tasks.items():
        assert task["n"] == 2 and all(0 <= task[role] <= 1 for role in ROLES) and "gap_closed" in task
        assert task["metric"] == FAMILIES[name]
        assert ("base_opener_forced" in task) == (name in OPENERS) and "tuned_mid" in task
        assert all(row["memory_bytes"] > 0 and row["ms_per_token"] > 0 for row in task["rows"].values())


@pytest.mark.slow
def test_a_small_demo_prints_tables_and_keeps_runs_when_asked(kept: tuple[Path, str]) -> None:
    folder, shown = kept
    for text in (
        "gsm: exact_match",
        "base, opener forced",
        "tuned, middle size",
        "gap closed",
        "stored in kept",
    ):
        assert text in shown
    assert len(list((folder / "kept" / "demo" / "gsm").rglob("run.json"))) == len(ROLES) + 1
    report = proxytune(folder, "report", "kept", "--markdown").stdout
    assert "| demo | proxy |" in report and "| demo | base, opener forced |" in report
    again = proxytune(folder, "demo", "--limit", "2", "--out", "kept")
    assert again.stdout == shown and "done already" in again.stderr


def test_without_a_sandbox_functions_are_left_out_and_the_rest_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def none(choice: str = "auto") -> Sandbox:
        raise UserError("no sandbox works here")

    monkeypatch.setattr(Sandbox, "open", none)
    monkeypatch.setattr(world, "TASKS", ("toxigen", "humaneval"))
    monkeypatch.chdir(tmp_path)
    cli_demo.demo(limit=2, out=None, json=True)
    assert list(tmp_path.iterdir()) == [], "without --out nothing is written"
    captured = capsys.readouterr()
    assert list(json.loads(captured.out)["tasks"]) == ["toxigen"]
    assert "humaneval is left out: no sandbox works here" in captured.err


@pytest.mark.parametrize("task", smoke_data.MAKERS)
def test_smoke_data_is_marked_wherever_it_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = ("--limit", "2", "--max-new-tokens", "8")
    shown = command_line.proxytune("eval", task, *settings, "--out", "runs/demo/own/proxy").stdout
    assert "smoke data" in shown
    stored = results.read_run(tmp_path / "runs" / "demo" / "own" / "proxy")
    assert stored.spec.data == "plumbing" and stored.n == 2
    report = command_line.proxytune("report", "runs", "--markdown").stdout
    assert "proxy (smoke data)" in report


def test_every_task_has_items_for_the_demo_system() -> None:
    from proxytune.tasks import TASKS

    assert set(load_system("demo").data) == set(TASKS)


def test_the_demo_models_take_real_questions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    data = str(reference / "data" / "gsm8k" / "test.jsonl")
    settings = ("--limit", "50", "--max-new-tokens", "64", "--json")
    done = command_line.proxytune("eval", "gsm", "--data", data, *settings)
    assert json.loads(done.stdout)["n"] == 50


def test_the_demo_models_take_any_character(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    odd = {"question": "Zoë 有 3 🍎\u2028 and\ttwo \x7f. How many?", "answer": "#### 5"}
    (tmp_path / "odd.jsonl").write_text(json.dumps(odd) + "\n")
    settings = ("--max-new-tokens", "64", "--as", "all", "--json")
    done = command_line.proxytune("eval", "gsm", "--data", "odd.jsonl", *settings)
    assert json.loads(done.stdout)["n"] == 1


@pytest.mark.slow
def test_a_demo_run_killed_half_way_ends_like_an_uninterrupted_one(tmp_path: Path) -> None:
    demo = (ROOT / "configs" / "systems" / "demo.yaml").read_text(encoding="utf-8")
    (tmp_path / "demo64.yaml").write_text(demo.replace("float32", "float64"))  # where batches decide nothing
    settings = ("--system", "demo64.yaml", "--limit", "200", "--batch", "8")
    command = ("eval", "gsm", *settings, "--json", "--verbose", "--out")
    process = subprocess.Popen(
        [sys.executable, "-m", "proxytune", *command, "killed"],
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    stored = tmp_path / "killed" / "predictions.jsonl"
    while not stored.exists() or stored.read_bytes().count(b"\n") < 100:
        assert process.poll() is None, "ended before it could be killed"
        time.sleep(0.01)
    process.kill()
    process.communicate()
    done = {name: json.loads(proxytune(tmp_path, *command, name).stdout) for name in ("killed", "whole")}
    assert done["killed"]["metrics"] == done["whole"]["metrics"] and done["killed"]["cost"]["sessions"] == 2
    assert stored.read_bytes() == (tmp_path / "whole" / "predictions.jsonl").read_bytes()


@pytest.mark.slow
def test_the_proxy_closes_the_gap(tmp_path: Path) -> None:
    some = [] if WHOLE else ["--limit", "16"]
    tasks = json.loads(proxytune(tmp_path, "demo", "--json", *some).stdout)["tasks"]
    for name in ("gsm", "truthfulqa"):
        task = tasks[name]
        assert task["n"] >= (500 if WHOLE else 16) and task["base"] < task["expert"] < task["proxy"], (
            name,
            task,
        )
        assert task["gap_closed"] >= 0.85, (name, task)
    assert tasks["toxigen"]["base"] > 0.9 and tasks["toxigen"]["proxy"] < 0.1, tasks["toxigen"]
    if isolates():
        assert tasks["humaneval"]["proxy"] > tasks["humaneval"]["base"] + 0.3, tasks["humaneval"]
