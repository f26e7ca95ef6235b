"""The GPU day: a smoke run of all of it on the CPU, its stages in steps as on a device, its summary, and what
it takes along."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu_day, gpu_stages, gpu_tests, gpu_wheels
from benchmarks.gpu_summary import summary
from benchmarks.stages import LINES
from tests.support.checkout import ROOT, environment
from tests.support.on_device import as_on_a_device
from tests.support.tiers import slow

TITLES = [stage.title for stage in gpu_day.PLAN]
ON_A_DEVICE = {"13b: one replay", "70b: one replay"}


@pytest.fixture(scope="module")
def day(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The lines of a smoke run."""
    folder = tmp_path_factory.mktemp("day")
    command = [sys.executable, "benchmarks/gpu_day.py", "--smoke", "--out", str(folder)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(OMP_NUM_THREADS="1"), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + (folder / "day.log").read_text()
    assert done.stdout == (folder / LINES).read_text()
    return folder / LINES


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_every_stage_of_a_smoke_run_ends(day: Path) -> None:
    lines = read(day)
    assert lines[0]["kind"] == "day" and lines[-1]["kind"] == "end" and lines[-1]["failed"] == []
    found = {line["stage"]: line["kind"] for line in lines if line["kind"] in ("done", "skipped")}
    assert found == {title: "skipped" if title in ON_A_DEVICE else "done" for title in TITLES}
    for line in lines:
        if line["kind"] == "tokens":
            assert line["diverged"] == 0
        if line["kind"] == "line":
            assert line["tokens_equal"] and line["tokens_per_s"] > 0


@pytest.mark.slow
def test_the_summary_has_every_contender(day: Path) -> None:
    text = summary(day.read_text())
    lines = [line for line in read(day) if line["kind"] == "line"]
    names = {(line["system"], line["name"]) for line in lines}
    assert len(names) >= 13 and all(f"| {system} |" in text and name in text for system, name in names)
    assert "smoke: speculative, k = 3, by plain" in text
    assert "No figure here means anything" in text and "GPU tests: none was run." in text
    assert all(f"| {title} |" in text for title in TITLES)


def ignored(kind: str, **found: object) -> None:
    """What a stage says is not looked at."""


@pytest.mark.parametrize("plan", [gpu_stages.SMOKE_TRIO, slow(gpu_stages.SMOKE_INT8)])
@pytest.mark.slow
def test_a_trio_in_steps_as_on_a_device(plan: gpu_stages.Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    as_on_a_device(monkeypatch)
    seen = list[dict[str, Any]]()

    def say(kind: str, **found: Any) -> None:
        seen.append({"kind": kind, **found})

    for stage in gpu_stages.trio(plan, smoke=True).values():
        stage(say)
    assert all(line["tokens_equal"] for line in seen if line["kind"] == "line")
    [tokens] = [line for line in seen if line["kind"] == "tokens"]
    assert tokens["rows"] == 3 and tokens["diverged"] == 0 and tokens["refused"] == []
    [profile] = [line for line in seen if line["kind"] == "profile"]
    assert profile["kernels"] >= len(profile["top"]) == gpu_stages.KERNELS and profile["rows"] == 1
    assert sum(share for *_, share in profile["top"]) <= 1.001
    drafted = [line for line in seen if line.get("dial")]
    assert [line["name"][-5:] for line in drafted] == ["k = 1", "k = 3", "k = 4"]
    assert all(0.5 < line["acceptance"] <= 1 for line in drafted)


@pytest.mark.parametrize("name", ["the paper's loop", "synthetic acceptance, k = 3", "batch"])
@pytest.mark.every(3)
def test_no_stage_relies_on_one_that_was_skipped(name: str) -> None:
    gpu_stages.trio_13b(smoke=True)[name](ignored)


def test_every_stage_is_one_that_its_group_has() -> None:
    works = {
        gpu_day.TESTS: gpu_tests.tests(True),
        gpu_day.MACHINE: gpu_stages.machine(True),
        gpu_day.SMALL: gpu_stages.trio_13b(True),
        gpu_day.LARGE: gpu_stages.trio_70b(True),
    }
    assert set(works) == set(gpu_day.GROUPS)
    assert all(stage.name in works[stage.group] for stage in gpu_day.PLAN)
    assert len(set(TITLES)) == len(TITLES)
    assert all(stage.need < stage.limit for stage in gpu_day.PLAN)


def test_the_estimates_fit_into_the_day() -> None:
    first = sum(stage.need for stage in gpu_day.PLAN)
    assert first + sum(group.start for group in gpu_day.GROUPS.values()) < gpu_day.DEADLINE < 480


def test_a_card_that_is_too_small_skips_the_trio(monkeypatch: pytest.MonkeyPatch) -> None:
    lab = gpu_stages.lab_for(smoke=False)
    monkeypatch.setattr(
        "torch.cuda.get_device_properties", lambda device: type("Card", (), {"total_memory": 85e9})
    )
    with pytest.raises(gpu_stages.NotHere, match="it needs 120 GB, and the card has 85"):
        gpu_stages.Trio(lab, gpu_stages.PLAN_70B, gpu_stages.nobody).bench  # noqa: B018


def test_only_near_ties_may_turn() -> None:
    gpu_stages.near(0, None)
    gpu_stages.near(2, 0.1)
    for margin in (0.3, float("nan")):
        with pytest.raises(RuntimeError, match="2 rows part"):
            gpu_stages.near(2, margin)


TESTS = """
import os, pytest
@pytest.fixture
def broken(): raise ValueError("no device")
@pytest.mark.parametrize("a", ["x y", "z [1]"])
def test_a(a): assert a == "x y"
def test_b(broken): pass
def test_c(): pytest.skip("not here")
def test_d(): os._exit(1)
"""


@pytest.mark.slow
def test_failures_are_told_when_they_happen(tmp_path: Path) -> None:
    """In a process of its own, as the stage has one."""
    (tmp_path / "test_it.py").write_text(TESTS)
    script = """
import json, sys
from benchmarks.gpu_tests import run_tests
run_tests(["-n2", sys.argv[1]], lambda kind, **found: print(json.dumps([kind, found]), file=sys.stderr))
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], env=environment(), capture_output=True, text=True
    )
    said = [json.loads(line) for line in done.stderr.splitlines() if line.startswith("[")]
    failed = {found["test"].split("::")[1]: found["why"] for kind, found in said if kind == "failed test"}
    assert set(failed) == {"test_a[z [1]]", "test_b", "test_d"}
    assert "ValueError: no device" in failed["test_b"] and "crashed" in failed["test_d"]
    assert said[-1] == ["tests", {"passed": 1, "failed": 3, "skipped": 1, "exit_code": 1}]
    assert done.returncode == 1 and "pytest ended with exit code 1" in done.stderr


def test_the_summary_of_a_day_that_was_cut_off() -> None:
    day = {"t": 0, "stage": "", "kind": "day", "begins": "2026-11-28T10:00:00", "smoke": False, "of": "abc1"}
    lines = [
        {**day, "of": "another day"},
        day,
        {"stage": "tests: GPU", "kind": "tests", "passed": 40},
        {"stage": "tests: GPU", "kind": "failed test", "test": "tests/a.py::test_b", "why": "at\nE  no"},
        {"stage": "tests: GPU", "kind": "killed", "after_s": 150.0, "log": []},
        {"stage": "machine: bandwidth", "kind": "error", "error": "RuntimeError: no\nmore", "traceback": []},
    ]
    text = summary("\n".join(map(json.dumps, lines)))
    assert (
        "GPU tests: 40 passed when the stage was ended." in text
        and "- failed: `tests/a.py::test_b`: E  no" in text
    )
    assert "unknown device" in text and "at abc1;" in text and "another" not in text
    assert "| machine: bandwidth | error |  | RuntimeError: no |" in text
    with pytest.raises(ValueError, match="not what gpu_day"):
        summary("")


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert gpu_day.main(["--out", str(tmp_path / "day")]) == 2
    assert "no CUDA device here" in capsys.readouterr().err and not (tmp_path / "day").exists()


def test_a_summary_of_something_else_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "other.jsonl").write_text('{"kind": "line"}\n')
    for name in ("none.jsonl", "other.jsonl"):
        assert gpu_day.main(["--summary", str(tmp_path / name)]) == 2
        shown = capsys.readouterr()
        assert shown.out == "" and name in shown.err and shown.err.count("\n") == 1


# What it takes along


def test_the_wheels_are_the_pinned_versions() -> None:
    wanted = gpu_wheels.requirements("pydantic==2.1\npydantic_core==2.2\n#regex==9\ntransformers==5.3\n")
    assert wanted[:3] == ["pydantic==2.1", "pydantic_core==2.2", "annotated_types"]
    assert "transformers==5.3" in wanted and "regex" in wanted


def test_more_than_fits_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = tmp_path / "a-1.whl"
    wheel.write_bytes(b"x" * 1000)
    monkeypatch.setattr(gpu_wheels, "MOST", 3000)
    text, fits = gpu_wheels.weighed([wheel], 2000)
    assert fits and "a-1.whl" in text and "together" in text
    assert not gpu_wheels.weighed([wheel], 2001)[1]


def test_the_tree_is_what_git_has_and_would_add(tmp_path: Path) -> None:
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    (tmp_path / ".gitignore").write_text("/left\n")
    (tmp_path / "left").mkdir()
    (tmp_path / "left" / "a.whl").write_bytes(b"x" * 5000)
    (tmp_path / "new.py").write_bytes(b"x" * 70)
    assert gpu_wheels.tree(tmp_path) == 70 + len("/left\n")


def test_the_command_runs_what_is_here() -> None:
    text = gpu_wheels.command("abc1")
    [script] = re.findall(r"python3 (benchmarks/\S+)", text)
    assert (ROOT / script).is_file() and "--tree abc1" in text
    ignored = subprocess.run(
        ["git", "check-ignore", f"{gpu_wheels.FOLDER}/a.whl"], cwd=ROOT, capture_output=True
    )
    assert ignored.returncode == 0
