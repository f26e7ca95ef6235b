"""`proxytune runs`: what is finished, what is not, and the command that goes on."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from proxytune.analysis.listing import listing
from proxytune.config import Sampling
from proxytune.results import find_runs, read_run
from proxytune.tasks import get_task
from tests.support import made_runs, tiny_system
from tests.support.command_line import proxytune, refused
from tests.support.runs import evaluated

ROW = {"question": "1?", "scores": {"exact_match": 1.0}}


def stopped(folder: Path, command: str = "python notebook.py", **spec: Any) -> Path:
    """A run of one example that is not finished."""
    spec = {"sampling": get_task("gsm").sampling, **spec}
    path = made_runs.write(
        folder, [ROW], **{name: value for name, value in spec.items() if name != "sampling"}
    )
    run = read_run(path)
    made = run.made.model_copy(update={"command": command})
    changed = run.spec.model_copy(update={"sampling": spec["sampling"]})
    run = run.model_copy(update={"status": "running", "made": made, "spec": changed})
    (path / "run.json").write_text(run.model_dump_json())
    return path


def test_the_listing(tmp_path: Path) -> None:
    made_runs.write(tmp_path / "a", [ROW], metrics={"exact_match": 0.75})
    half = stopped(tmp_path / "b", "proxytune eval gsm --data 'my items.jsonl'", limit=5)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "run.json").write_text('{"schema_version": 99}')
    done = proxytune("runs", tmp_path)
    assert done.exit_code == 0
    assert "finished" in done.stdout and "exact_match 75.0" in done.stdout and "1 of 5" in done.stdout
    assert f"to go on with {half}: proxytune eval gsm --data 'my items.jsonl'" in done.stdout
    assert "schema version 99" in done.stdout
    found = json.loads(proxytune("runs", tmp_path, "--json").stdout)["runs"]
    assert [one["status"] for one in found] == ["finished", "unfinished", "unreadable"]
    assert found[0]["score"]["value"] == 0.75 and found[0]["command"] is None
    assert (found[1]["examples"], found[1]["score"]) == (1, None)
    assert found[2]["task"] is None and "99" in found[2]["problem"]


def test_a_stored_command_is_one_command(tmp_path: Path) -> None:
    stopped(tmp_path / "a", "proxytune eval gsm ; rm -rf x $(y)")
    [one] = listing(tmp_path)
    assert shlex.split(one.command) == ["proxytune", "eval", "gsm", ";", "rm", "-rf", "x", "$(y)"]
    assert "';'" in one.command and "'$(y)'" in one.command


def test_without_a_stored_command_it_has_the_runs_settings(tmp_path: Path) -> None:
    sampling = Sampling(max_new_tokens=512, temperature=0.5, stop=("a b", "c"), n=2, seed=3)
    path = stopped(
        tmp_path / "a", alpha="0.5", limit=7, shots=2, trace="tokens", data="hub", sampling=sampling
    )
    [one] = listing(tmp_path)
    assert shlex.split(one.command) == [
        *("proxytune", "eval", "gsm", "--system", "made", "--as", "proxy", "--alpha", "0.5", "--limit", "7"),
        *("--shots", "2", "--trace", "tokens", "--temperature", "0.5", "-n", "2", "--seed", "3"),
        *("--stop", "a b", "--stop", "c", "--out", str(path)),
    ]


def test_the_command_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Python started it, so that it is made of the run's settings."""
    monkeypatch.chdir(tmp_path)
    from proxytune.config import load_system

    yaml = tiny_system.write(tmp_path)
    system, out = load_system(yaml), tmp_path / "run"
    settings = {"limit": 3, "sampling": Sampling(max_new_tokens=4, top_k=3, temperature=1.0)}
    whole = evaluated(system, "gsm", as_="base", out=out, **settings)
    [(folder, run)] = find_runs(tmp_path)
    assert run == whole
    (folder / "cost.jsonl").unlink()
    lines = (folder / "predictions.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "predictions.jsonl").write_bytes(lines[0])
    (folder / "run.json").write_text(run.model_copy(update={"status": "running"}).model_dump_json())
    [one] = listing(tmp_path)
    words = shlex.split(one.command)
    assert words[words.index("--system") + 1] == "tiny"
    words[words.index("--system") + 1] = str(yaml)  # where a YAML lies is not stored
    done = proxytune(*words[1:], "--json")
    assert done.exit_code == 0 and "1 of 3 examples are done" in done.stderr, done.output
    assert json.loads(done.stdout)["metrics"] == whole.model_dump(mode="json")["metrics"]


def test_a_folder_without_runs_is_one_line(tmp_path: Path) -> None:
    refused(proxytune("runs", tmp_path), "no run in", "proxytune eval")
    refused(proxytune("runs", tmp_path / "no"), "no folder")


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"role": "base", "alpha": "0.5"}, "--as base"),
        ({"role": "proxy", "alpha": "1", "data": "hub"}, "--as proxy"),
        ({"role": "proxy", "alpha": "first:3"}, "--as proxy --alpha first:3 --data generated"),
        ({"role": "base", "data": "items.jsonl"}, "--as base --data items.jsonl"),
        ({"role": "base", "data": "hub", "mode": "likelihood"}, "--as base --mode likelihood"),
        ({"role": "base", "data": "hub", "trace": "agreement"}, "--as base --trace agreement"),
        ({"role": "base", "data": "hub", "limit": 1, "shots": 0}, "--as base --limit 1"),
    ],
)
def test_the_settings_that_a_command_names(spec: dict[str, Any], words: str, tmp_path: Path) -> None:
    """Those that are not the usual ones; data is generated in these runs, unless it is said."""
    path = stopped(tmp_path / "a", **spec)
    [one] = listing(tmp_path)
    data = "" if "data" in spec or "--data" in words else " --data generated"
    assert one.command == f"proxytune eval gsm --system made {words}{data} --out {path}"
    assert (one.status, one.done, one.score, one.problem) == ("unfinished", 1, None, "")


@pytest.mark.parametrize(
    ("command", "kept"),
    [
        ("proxytune eval gsm", True),
        ("proxytune", False),
        ("python x", False),
        ("proxytune 'x", False),
        ("", False),
    ],
)
def test_which_stored_commands_are_given_back(command: str, kept: bool, tmp_path: Path) -> None:
    stopped(tmp_path / "a", command, role="base", data="hub")
    [one] = listing(tmp_path)
    assert (one.command == command) is kept and one.command.startswith("proxytune eval gsm")


def test_finished_runs_have_a_score_and_no_command(tmp_path: Path) -> None:
    made_runs.write(tmp_path / "b" / "x", [ROW, ROW], metrics={"exact_match": 0.75})
    made_runs.write(tmp_path / "a", [ROW], facts={"file": "own.py"})
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "run.json").write_text("{")
    found = listing(tmp_path)
    assert [one.folder for one in found] == [tmp_path / "a", tmp_path / "b" / "x", tmp_path / "c"]
    assert [(one.status, one.done) for one in found] == [("finished", 1), ("finished", 2), ("unreadable", 0)]
    assert found[1].score is not None and found[1].score.value == 0.75 and found[2].score is None
    assert [one.command for one in found] == ["", "", ""] and "run.json" in found[2].problem
