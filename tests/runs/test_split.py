"""A base that is split over the processes of torchrun, with whole small models beside it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from proxytune import results
from proxytune.checks import check_system
from proxytune.config import load_system
from proxytune.errors import UserError
from proxytune.models.roles import Models
from tests.support import tiny_system
from tests.support.checkout import environment
from tests.support.command_line import proxytune, refused


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny system in float64, its base split."""
    path = tiny_system.write(tmp_path_factory.mktemp("split"))
    path.write_text(path.read_text().replace("./base, ", "./base, device_map: tensor, "))
    return path


def test_one_process_is_told_what_to_start(split: Path) -> None:
    with pytest.raises(UserError, match="start N processes with torchrun --nproc-per-node N"):
        Models(load_system(split)).get("base")


@pytest.mark.parametrize("words", [["serve"], ["lm-eval", "--tasks", "none"], ["eval", "gsm", "--ray"]])
def test_what_asks_one_process_refuses_it(words: list[str], split: Path) -> None:
    assert "device_map: tensor" in refused(proxytune(*words, "--system", split))


def test_check_says_what_goes_where(split: Path) -> None:
    found = {finding.about: finding.text for finding in check_system(load_system(split)).findings}
    assert "every layer is split over the processes of torchrun" in found["base"]
    assert "whole in every process" in found["expert"] and "whole in every process" in found["antiexpert"]


def torchrun(*words: object) -> list[str]:
    """The command in two processes."""
    call = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return [*call, "--local-ranks-filter", "0", "-m", "proxytune", *map(str, words)]


@pytest.mark.slow
def test_two_processes_give_the_tokens_of_one(split: Path, tmp_path: Path) -> None:
    """In float64, sampled; the two are killed in the middle, and the same command goes on."""
    words = ["eval", "gsm", "--limit", 40, "--max-new-tokens", 24, "--temperature", 1, "-n", 2, "--batch", 4]
    whole = split.with_name("whole.yaml")
    whole.write_text(split.read_text().replace("device_map: tensor, ", ""))
    one = [sys.executable, "-m", "proxytune", *map(str, words), "--system", str(whole), "--out", "one"]
    subprocess.run(one, cwd=tmp_path, env=environment(), check=True, capture_output=True)
    two = torchrun(*words, "--system", split, "--out", "two", "--json")
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(two, cwd=tmp_path, env=environment(), **quiet) as first:
        stored, deadline = tmp_path / "two" / results.PREDICTIONS, time.monotonic() + 300
        while not (stored.exists() and stored.read_bytes().count(b"\n") >= 2) and first.poll() is None:
            assert time.monotonic() < deadline, "no rows"
            time.sleep(0.02)
        for process in [*psutil.Process(first.pid).children(recursive=True), first]:
            process.kill()  # torchrun's workers have sessions of their own, and would go on without it
    assert results.read_run(tmp_path / "two").status == "running"
    done = subprocess.run(two, cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0 and "of 40 examples are done" in done.stderr, done.stderr
    assert json.loads(done.stdout)["n"] == 40
    assert rows(tmp_path / "two") == rows(tmp_path / "one")
    memory = {folder: results.read_run(tmp_path / folder).cost.memory for folder in ("one", "two")}
    assert memory["two"]["base"].weights < 0.7 * memory["one"]["base"].weights
    assert memory["two"]["expert"].weights == memory["one"]["expert"].weights


def rows(folder: Path) -> dict[str, Any]:
    """What was stored, by example."""
    return {row["id"]: row for row in results.read_rows(folder)}
