"""The stage that runs the tests which need a GPU, in processes beside each other."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

from benchmarks.stages import Say, Work

ROOT = Path(__file__).resolve().parent.parent
MARK = "pytest.mark.gpu"
PROCESSES = 8
"""One GPU and 16 cores."""
EACH = 60
"""Seconds that one test may take."""
OPTIONS = ("-vv", "-m", "gpu and not slow", "-p", "no:cacheprovider", "--tb=short", f"--timeout={EACH}")
TOLERANT = ("-W", "default")
"""Warnings are failures with the pinned versions only, and a GPU machine has others."""
RESULT = re.compile(r"\b(PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b")
TEST = re.compile(r"tests/\S+::.+?(?=\s+(?:PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b|\s+\[|$)")
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


def run_tests(options: Sequence[str], say: Say) -> None:
    """Run pytest and tell what fails when it fails. All of its output is in the log."""
    command = [sys.executable, "-m", "pytest", *options]
    environment = {**os.environ, "PROXYTUNE_REQUIRE": "gpu,triton", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    counts, last = counted(process.stdout, say)
    code = process.wait()
    say("tests", **counts, exit_code=code, last=last)
    if code != 0:
        raise RuntimeError(f"pytest ended with exit code {code}: {last}")


def counted(output: Iterable[str], say: Say) -> tuple[Counter[str], str]:
    """Read pytest's lines as they come -> how many tests ended how, and the last line."""
    counts, last = Counter[str](), ""
    summary = False
    for line in output:
        print(line, end="", flush=True)
        last = line.strip() or last
        summary = summary or (line.startswith("====") and "starts" not in line)
        result, test = RESULT.search(line), TEST.search(line)
        if summary or result is None or test is None:
            continue
        counts[result[1].lower()] += 1
        if result[1] in ("FAILED", "ERROR"):
            say("failed test", test=test[0])
        if counts.total() % EVERY == 0:
            say("tests", **counts)
    return counts, last
