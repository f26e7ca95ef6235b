"""`proxytune demo`: the promised JSON, the control row, and (slow) that the proxy closes the gap."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import require_or_skip

ROOT = Path(__file__).parent.parent
ROLES = ("base", "antiexpert", "expert", "proxy", "tuned")


@pytest.fixture(autouse=True)
def _weights() -> None:
    if not (ROOT / "proxytune" / "demo" / "weights" / "base").is_dir():
        require_or_skip("demo", "the demo's weights are not here (make demo-models)")


def demo(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command in `folder`."""
    command = [sys.executable, "-m", "proxytune", "demo", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


def test_a_small_demo_has_the_promised_form(tmp_path: Path) -> None:
    tasks = json.loads(demo(tmp_path, "--limit", "8", "--json").stdout)["tasks"]
    assert list(tasks) == ["gsm", "truthfulqa", "truthfulqa_mc"]
    for name, task in tasks.items():
        assert task["n"] == 8 and all(0 <= task[role] <= 1 for role in ROLES) and "gap_closed" in task
        assert ("base_opener_forced" in task) == (name != "truthfulqa_mc") and "tuned_mid" in task
        assert all(row["memory_bytes"] > 0 and row["ms_per_token"] > 0 for row in task["rows"].values())
    assert list(tmp_path.iterdir()) == []


def test_a_small_demo_prints_tables_and_keeps_runs_when_asked(tmp_path: Path) -> None:
    shown = demo(tmp_path, "--limit", "4", "--out", "kept").stdout
    for text in (
        "gsm: exact_match",
        "base, opener forced",
        "tuned, middle size",
        "gap closed",
        "stored in kept",
    ):
        assert text in shown
    assert len(list((tmp_path / "kept" / "demo" / "gsm").rglob("run.json"))) == len(ROLES) + 1
    again = demo(tmp_path, "--limit", "4", "--out", "kept")
    assert again.stdout == shown and "done already" in again.stderr


@pytest.mark.slow
def test_the_proxy_closes_the_gap(tmp_path: Path) -> None:
    tasks = json.loads(demo(tmp_path, "--json").stdout)["tasks"]
    for name in ("gsm", "truthfulqa"):
        task = tasks[name]
        assert task["n"] >= 500 and task["base"] < task["expert"] < task["proxy"], (name, task)
        assert task["gap_closed"] >= 0.85, (name, task)
