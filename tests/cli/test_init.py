"""`proxytune init`: its files work from the first evaluation to the report, and nothing is overwritten."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from proxytune import DecodeOptions, RunOptions, evaluate
from proxytune.results import find_runs, read_rows, read_run
from tests.support.command_line import proxytune, refused
from tests.support.require import require_demo

LINE = '    assert row["output"] == "" or "Gekur" not in row["question"]'


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, which is the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_task_from_init_to_report(place: Path) -> None:
    require_demo()
    made = proxytune("init", "task")
    assert made.exit_code == 0 and sorted(p.name for p in place.iterdir()) == ["my_items.jsonl", "my_task.py"]
    *_, command = made.stdout.strip().splitlines()
    words = command.removeprefix("then: proxytune ").split()
    assert words[:2] == ["eval", "./my_task.py"]

    ended = proxytune(*words, "--as", "base,proxy", "--trace", "--json")
    assert ended.exit_code == 0, ended.output
    found = json.loads(ended.stdout)
    name, n = found["task"], found["n"]
    assert n == len((place / "my_items.jsonl").read_text().splitlines()) >= 5
    assert found["runs"]["proxy"]["metrics"]["accuracy"]["value"] == 1.0, (
        "the demo's proxy has them all right"
    )
    folders = {run.spec.role: folder for folder, run in find_runs(place)}
    assert all(name in folder.parts for folder in folders.values())
    again = proxytune(*words, "--as", "base,proxy", "--trace", "--json")
    assert json.loads(again.stdout) == found and "done already" in again.stderr

    shots = proxytune(*words, "--shots", 2, "--shots-from", "my_items.jsonl", "--limit", 2, "--out", "shots")
    assert shots.exit_code == 0, shots.output
    swept = proxytune("sweep-alpha", "./my_task.py", "--data", "my_items.jsonl", "--alphas", "0,1", "--json")
    points = {point["alpha"]: point["score"]["value"] for point in json.loads(swept.stdout)["points"]}
    assert points["1"] == 1.0 and points["0"] == found["runs"]["base"]["metrics"]["accuracy"]["value"]
    scored = proxytune("score", "./my_task.py", folders["proxy"] / "predictions.jsonl", "--json")
    assert json.loads(scored.stdout)["metrics"] == found["runs"]["proxy"]["metrics"]
    refused(proxytune("judge", "./my_task.py", folders["proxy"]), "needs no judge")

    shown = proxytune("report", "--examples", 1)
    assert (
        shown.exit_code == 0 and f"{name}: accuracy" in shown.stdout and "Tugil has 24 nuts" in shown.stdout
    )
    page = proxytune("report", "--html", "page.html")
    assert page.exit_code == 0 and name in (place / "page.html").read_text(encoding="utf-8")
    failed = proxytune("analyze", "failures", folders["base"], folders["proxy"], "--json")
    assert failed.exit_code == 0 and json.loads(failed.stdout)["n"] == n

    run = evaluate(
        "demo",
        "./my_task.py",
        as_="base",
        options=RunOptions(data="my_items.jsonl", trace="tokens"),
        decode=DecodeOptions(progress=False),
    )
    assert run == read_run(folders["base"]), "Python takes the same file, and finds the same folder"

    (place / "my_task.py").write_text((place / "my_task.py").read_text() + "\n# changed\n")
    refused(proxytune("judge", "./my_task.py", folders["proxy"], "--judge", "x"), "needs no judge")
    other = json.loads(proxytune(*words, "--limit", 1, "--json").stdout)
    assert other["task"] != name and name not in other["folder"]


def test_a_score_that_fails_loses_nothing(place: Path) -> None:
    require_demo()
    proxytune("init", "task")
    task = place / "my_task.py"
    whole = task.read_text()
    bad = whole.replace('row["output"])\n', f'row["output"])\n{LINE}\n')
    assert bad != whole
    task.write_text(bad)
    command = ("eval", "./my_task.py", "--data", "my_items.jsonl", "--batch", 1, "--out", "run")
    line = refused(
        proxytune(*command), f"'my_task.py' line {bad.splitlines().index(LINE) + 1}: AssertionError"
    )
    assert "Traceback" not in line
    kept = read_rows(place / "run")
    assert 0 < len(kept) < len((place / "my_items.jsonl").read_text().splitlines())
    [listed] = json.loads(proxytune("runs", "run", "--json").stdout)["runs"]
    assert (listed["status"], listed["examples"]) == ("unfinished", len(kept))

    task.write_text(whole)
    scored = proxytune("score", "./my_task.py", "run", "--json")
    assert json.loads(scored.stdout)["n"] == len(kept)
    refused(proxytune(*command), "holds a run with other settings", "task is my_task-")


def test_a_system_from_init_is_checked_and_evaluated(place: Path) -> None:
    require_demo()
    assert proxytune("init", "system", "mine.yaml").stdout.startswith("wrote mine.yaml\n")
    assert proxytune("check", "mine.yaml", "--no-weights").exit_code == 0
    ended = proxytune("eval", "gsm", "--system", "mine.yaml", "--limit", 2, "--json")
    assert ended.exit_code == 0 and json.loads(ended.stdout)["system"] == "mine", ended.output
    assert "mine.yaml" in (place / "mine.yaml").read_text().split("\n\n")[0], "its commands name it"


def test_files_are_named_after_the_task(place: Path) -> None:
    (place / "inner").mkdir()
    made = proxytune("init", "task", "inner/birds_task.py")
    assert (
        made.exit_code == 0
        and "eval inner/birds_task.py --system demo --data inner/birds_items.jsonl" in (made.stdout)
    )
    text = (place / "inner" / "birds_task.py").read_text()
    assert "./birds_task.py" in text and "birds_items.jsonl" in text and "my_" not in text
    assert proxytune("tasks", "inner/birds_task.py").exit_code == 0


def test_nothing_is_overwritten(place: Path) -> None:
    for name, other in (("my_task.py", "my_items.jsonl"), ("my_items.jsonl", "my_task.py")):
        (place / name).write_text("mine")
        refused(proxytune("init", "task"), f"'{name}' is there already")
        assert (place / name).read_text() == "mine" and not (place / other).exists()
        (place / name).unlink()
    (place / "my_system.yaml").write_text("mine")
    refused(proxytune("init", "system"), "my_system.yaml", "is there already")
    refused(proxytune("init", "task", "task.txt"), "must end in .py")
    refused(proxytune("init", "system", "s.json"), "must end in .yaml or .yml")
    refused(proxytune("init", "task", "no/my_task.py"), "no folder 'no'")
