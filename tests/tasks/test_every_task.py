"""Every task end to end on a tiny saved system: eval, resume, score, report; and every reader with malformed
files."""

from __future__ import annotations

import gzip
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import Result

from proxytune import results
from proxytune.records import NO_SCORE
from proxytune.sandbox.sandbox import Sandbox
from proxytune.tasks import TASKS
from tests.support import public_items
from tests.support.checkout import environment
from tests.support.command_line import proxytune
from tests.support.runs import unfinish
from tests.support.tiers import slow

MODES = [(name, "generate") for name in TASKS] + [
    (name, "likelihood") for name, task in TASKS.items() if task.likelihood is not None
]


@pytest.fixture(scope="module")
def yaml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The system's file."""
    return public_items.write_system(tmp_path_factory.mktemp("system"))


def short_eval(task: str, mode: str, yaml: Path, folder: Path) -> list[str]:
    """The arguments of a short evaluation of a task into `folder`."""
    arguments = ["eval", task, "--system", yaml, "--data", public_items.write(task, folder), "--limit", 8]
    arguments += ["--judge", public_items.JUDGED[task]] if task in public_items.JUDGED else []
    arguments += ["--mode", mode] if mode != "generate" else public_items.SHORT
    return [str(argument) for argument in (*arguments, "--out", folder / "run", "--json")]


@pytest.mark.parametrize(("task", "mode"), MODES)
@pytest.mark.every(2)
def test_eval_resume_score_and_report(task: str, mode: str, yaml: Path, tmp_path: Path) -> None:
    asked = short_eval(task, mode, yaml, tmp_path)
    done = proxytune(*asked)
    assert done.exit_code == 0, done.output
    whole, found = (tmp_path / "run" / results.PREDICTIONS).read_bytes(), json.loads(done.stdout)
    assert found["n"] == 8 and found["status"] == "done" and found["headline"] in found["metrics"]

    # as a kill leaves it: some rows, a torn one, and a run.json that says `running`
    unfinish(tmp_path / "run", 3)
    with (tmp_path / "run" / results.PREDICTIONS).open("ab") as file:
        file.write(whole.splitlines(keepends=True)[3][:20])
    resumed = proxytune(*asked)
    assert resumed.exit_code == 0 and "3 of 8 examples are done" in resumed.stderr, resumed.output
    assert json.loads(resumed.stdout)["metrics"] == found["metrics"]
    assert (tmp_path / "run" / results.PREDICTIONS).read_bytes() == whole

    for place in (tmp_path / "run", tmp_path / "run" / results.PREDICTIONS):
        scored = proxytune("score", task, place, "--json")
        assert scored.exit_code == 0, scored.output
        assert json.loads(scored.stdout)["metrics"] == found["metrics"]

    shown = proxytune("report", tmp_path, "--markdown", "--examples", 1)
    title = NO_SCORE.get(found["headline"], found["headline"])
    assert shown.exit_code == 0 and f"### {task}: {title}" in shown.stdout, shown.output
    assert (mode == "generate") == ("example " in shown.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_a_killed_evaluation_ends_like_another(task: str, yaml: Path, tmp_path: Path) -> None:
    """kill -9 as soon as two rows are stored."""
    (tmp_path / "killed").mkdir()
    (tmp_path / "whole").mkdir()
    asked = [*short_eval(task, "generate", yaml, tmp_path / "killed"), "--batch", "1"]
    stored = tmp_path / "killed" / "run" / results.PREDICTIONS
    process = subprocess.Popen(
        [sys.executable, "-m", "proxytune", *asked],
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while process.poll() is None and not (stored.exists() and stored.read_bytes().count(b"\n") >= 2):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = stored.read_bytes().count(b"\n")
    assert 2 <= kept <= 8
    continued = proxytune(*asked)
    assert continued.exit_code == 0, continued.output
    other = proxytune(*short_eval(task, "generate", yaml, tmp_path / "whole"), "--batch", "1")
    assert json.loads(continued.stdout)["metrics"] == json.loads(other.stdout)["metrics"]
    assert stored.read_bytes() == (tmp_path / "whole" / "run" / results.PREDICTIONS).read_bytes()


# Code that was stored without a verdict


@pytest.mark.parametrize("task", [slow("humaneval"), slow("ds1000")])
def test_verdicts_come_later(task: str, box: Sandbox, yaml: Path, tmp_path: Path) -> None:
    asked = short_eval(task, "generate", yaml, tmp_path)
    blind = proxytune(*asked)
    assert json.loads(blind.stdout)["headline"] == "not_run" and "proxytune judge" in blind.stderr
    allow = ("--allow-code-execution", "--sandbox", box.backend)
    again = proxytune(*asked, *allow)
    assert again.exit_code == 0, again.output
    found = json.loads(again.stdout)
    assert found["headline"] == "pass@10" and "not_run" not in found["metrics"]
    rows = results.read_rows(tmp_path / "run")
    assert all(len(row["passed"]) == 20 and list(row)[-2:] == ["scores", "responses"] for row in rows)

    (tmp_path / "later").mkdir()
    other = short_eval(task, "generate", yaml, tmp_path / "later")
    assert proxytune(*other).exit_code == 0
    run = tmp_path / "later" / "run"
    lost = proxytune("judge", task, run, *allow)
    assert lost.exit_code == 2 and "name it with --data FILE" in lost.stderr
    bare = proxytune("judge", task, run)
    assert bare.exit_code == 2 and "add --allow-code-execution" in bare.stderr
    judged = proxytune("judge", task, run, "--data", public_items.write(task, tmp_path), "--json", *allow)
    assert judged.exit_code == 0 and json.loads(judged.stdout)["metrics"] == found["metrics"]
    assert results.read_rows(run) == rows


# Malformed files


def one_line(result: Result, *parts: str) -> None:
    """Code 2 and one line that holds all parts."""
    assert result.exit_code == 2, (result.exit_code, result.output, result.exception)
    lines = [line for line in result.stderr.splitlines() if not line.startswith(("loading ", "note: "))]
    assert len(lines) == 1 and lines[0].startswith("error: ") and len(lines[0]) < 500, lines
    for part in parts:
        assert part in lines[0]


def damage(path: Path, how: str) -> tuple[Path, str]:
    """A damaged copy of a file of items or predictions, and what must be reported about it."""
    content = path.read_bytes()
    suffix = path.suffix
    bad = path.with_name(f"bad{suffix}")
    match how:
        case "truncated gzip":
            bad = path.with_name(f"bad{suffix}.gz")
            bad.write_bytes(gzip.compress(content)[:-20])
            return bad, "cut short or is no gzip file"
        case "wrong encoding":
            bad.write_bytes(content.replace(b"n", b"\xf1", 1))  # Latin-1
            return bad, "is not UTF-8"
        case "UTF-16":
            bad.write_bytes(content.decode().encode("utf-16"))
            return bad, "is not UTF-8"
        case "empty":
            bad.write_bytes(b"")
            return bad, "has no rows"
        case _:
            assert how == "50 MB"
            row = json.loads(content)[0] if suffix == ".json" else json.loads(content.splitlines()[0])
            name = next(key for key, value in row.items() if isinstance(value, str))
            row[name] = "x" * 50_000_000
            bad.write_text(json.dumps([row] if suffix == ".json" else row) + "\n")
            return bad, "million characters (at most 16 are read)"


HOW = ["truncated gzip", "wrong encoding", "UTF-16", "empty", "50 MB"]


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("task", ["gsm", "alpaca_farm"])
def test_malformed_data(task: str, how: str, yaml: Path, tmp_path: Path) -> None:
    bad, message = damage(public_items.write(task, tmp_path), how)
    judge = ("--judge", "none") if task in public_items.JUDGED else ()
    one_line(proxytune("eval", task, "--system", yaml, "--data", bad, *judge), bad.name, message)
    if task == "gsm":
        good = tmp_path / "gsm.jsonl"
        shots = ("--data", good, "--shots", 2, "--shots-from", bad)
        one_line(proxytune("eval", task, "--system", yaml, *shots), bad.name, message)


@pytest.mark.parametrize("how", HOW[:-1])
def test_malformed_csv(how: str, yaml: Path, tmp_path: Path) -> None:
    bad, message = damage(public_items.write("truthfulqa", tmp_path), how)
    one_line(proxytune("eval", "truthfulqa_mc", "--system", yaml, "--data", bad), bad.name, message)


def test_csv_without_a_column_and_with_a_huge_cell(yaml: Path, tmp_path: Path) -> None:
    path = public_items.write("truthfulqa", tmp_path)
    path.write_text(path.read_text().replace("Best Answer", "Worst Answer"))
    one_line(
        proxytune("eval", "truthfulqa", "--system", yaml, "--data", path), "line 2: no field 'Best Answer'"
    )
    path.write_text(public_items.HEADER + "t,c," + "x" * 50_000_000 + ",a,b,c,d\n")
    one_line(proxytune("eval", "truthfulqa", "--system", yaml, "--data", path), "is not CSV: field larger")


@pytest.fixture
def finished(yaml: Path, tmp_path: Path) -> Path:
    """A finished run of alpaca_farm, not judged."""
    assert proxytune(*short_eval("alpaca_farm", "generate", yaml, tmp_path)).exit_code == 0
    return tmp_path / "run"


@pytest.mark.parametrize("how", HOW)
@pytest.mark.every(2)
def test_malformed_predictions(how: str, finished: Path, tmp_path: Path) -> None:
    """`score` of rows and of annotations.json; `judge` and `export` of a run whose rows are damaged."""
    path = finished / results.PREDICTIONS
    bad, message = damage(path, how)
    one_line(proxytune("score", "alpaca_farm", bad), bad.name, message)
    annotations = tmp_path / "annotations.json"
    annotations.write_text(json.dumps([json.loads(line) for line in path.read_text().splitlines()]))
    worse, message = damage(annotations, how)
    one_line(proxytune("score", "alpaca_farm", worse), worse.name, message)

    path.write_bytes(bad.read_bytes())
    judge = ("--judge", "some-model", "--yes")
    one_line(proxytune("judge", "alpaca_farm", finished, *judge), results.PREDICTIONS)
    one_line(proxytune("export", "alpaca_eval", finished), results.PREDICTIONS)


def test_rows_that_lack_a_column_or_a_line(finished: Path, tmp_path: Path) -> None:
    path = finished / results.PREDICTIONS
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]))
    for command in (("judge", "alpaca_farm", finished, "--yes"), ("export", "alpaca_eval", finished)):
        one_line(proxytune(*command), "is missing")
    row = json.loads(lines[2])
    del row["output_1"]
    path.write_bytes(b"".join([*lines[:2], json.dumps(row).encode() + b"\n", *lines[3:]]))
    for command in (("judge", "alpaca_farm", finished, "--yes"), ("export", "alpaca_eval", finished)):
        one_line(proxytune(*command), f"'{row['id']}' is not what was stored")
    (finished / results.RUN).write_text("{")
    one_line(proxytune("export", "alpaca_eval", finished), "cannot read", "run.json")
