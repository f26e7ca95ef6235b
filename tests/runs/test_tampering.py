"""Whatever happened to the files of a run: every command that reads them says which is damaged, in one line,
or says what it says of a run to which nothing happened."""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from proxytune.config import Sampling, System
from proxytune.errors import UserError
from proxytune.models.roles import Models
from proxytune.runs.alpha_sweep import parse_alphas, sweep
from tests.support.command_line import proxytune, refused
from tests.support.endpoint import Endpoint
from tests.support.kills import figures
from tests.support.runs import evaluation_of, unfinish
from tests.support.tampering import KINDS
from tests.support.tiers import examples

SHORT: dict[str, Any] = {"sampling": Sampling(max_new_tokens=8), "batch": 4, "speculate": 3}
Reading = Callable[[Path], Any]
"""Reads the run in a folder -> what it says; UserError where it is damaged."""


@dataclass(frozen=True)
class Case:
    """A run that is tampered with, and what reads it."""

    folder: Path
    """Beside it lies `other`, another run of the same items."""
    readings: Mapping[str, Reading]
    part: str = "."
    """The run in the folder whose files are tampered with."""


def command(*arguments: object) -> Reading:
    """What a command prints about the folder that it gets as `RUN`."""

    def read(folder: Path) -> Any:
        result = proxytune(*(folder if one == "RUN" else one for one in arguments))
        if result.exit_code == 2:
            raise UserError(refused(result).removeprefix("error: "))
        assert result.exit_code == 0, (result.output, result.exception)
        return result.stdout

    return read


@pytest.fixture(scope="module")
def cases(system: System, models: Models, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    """A finished and an unfinished run, one that can be judged and exported, and a sweep."""
    root = tmp_path_factory.mktemp("cases")
    traced = evaluation_of(system, "gsm", models, limit=6, trace="tokens", **SHORT)
    pairs = [{"instruction": f"Do {i}.", "output": f"GOOD {i}", "generator": "g"} for i in range(4)]
    data = root / "pairs.json"
    data.write_text(json.dumps(pairs))
    unjudged = evaluation_of(system, "alpaca_farm", models, data=str(data), **SHORT)
    swept = evaluation_of(system, "gsm", models, limit=3, **SHORT)
    alphas = parse_alphas("0,1,first:2")

    def run(evaluation: Any, name: str) -> Reading:
        def read(folder: Path) -> Any:
            evaluation.run("proxy", folder)
            return figures(folder)

        read(root / name / "run")
        evaluation.run("base", root / name / "other")
        return read

    def run_sweep(folder: Path) -> Any:
        sweep(swept, alphas, folder)
        return [figures(one) for one in sorted(folder.glob("alpha=*"))]

    finished = {
        "eval": run(traced, "finished"),
        "score": command("score", "gsm", "RUN", "--json"),
        "report": command("report", "RUN", "--markdown", "--examples", 1),
        "positions": command("analyze", "positions", "RUN", "--json"),
        "failures": command("analyze", "failures", root / "finished" / "other", "RUN", "--json"),
    }
    unfinished = {"eval": run(traced, "unfinished"), "report": finished["report"]}
    unfinish(root / "unfinished" / "run", 4)
    judged = {
        "eval": run(unjudged, "unjudged"),
        "judge": command("judge", "alpaca_farm", "RUN", "--judge", "m", "--yes", "--json"),
        "export": command("export", "alpaca_eval", "RUN", "--out", root),
    }
    run_sweep(root / "sweep" / "run")
    swept.run("base", root / "sweep" / "other")
    sweeps = {"sweep-alpha": run_sweep, "skip": command("analyze", "skip", "RUN", "--json")}
    return {
        "finished": Case(root / "finished" / "run", finished),
        "unfinished": Case(root / "unfinished" / "run", unfinished),
        "unjudged": Case(root / "unjudged" / "run", judged),
        "sweep": Case(root / "sweep" / "run", sweeps, "alpha=first-2"),
    }


def said(reading: Reading, folder: Path) -> tuple[str | None, Any]:
    """The line of a refusal, and what is said otherwise."""
    try:
        return None, reading(folder)
    except UserError as error:
        return str(error), None


@pytest.mark.every(3)
def test_every_reading_of_a_damaged_run(cases: dict[str, Case], endpoint: Endpoint, tmp_path: Path) -> None:
    tried, found, sound = examples(15, 100), Counter[str](), dict[tuple[Path, str], Any]()
    for number in range(tried):
        draw = random.Random(number)
        kind = list(KINDS)[number % len(KINDS)]
        case = cases[list(cases)[draw.randrange(len(cases))]]
        kept = tmp_path / str(number)
        shutil.copytree(case.folder, kept)
        for name, reading in case.readings.items():
            if (case.folder, name) not in sound:
                sound[case.folder, name] = said(reading, case.folder)
                restore(kept, case.folder)
            before = sound[case.folder, name]
            KINDS[kind](case.folder / case.part, case.folder.parent / "other", random.Random(number))
            line, after = said(reading, case.folder)
            restore(kept, case.folder)
            where = (number, kind, case.folder, name, line)
            assert line is not None or (None, after) == before, where
            assert line is None or ("\n" not in line and str(case.folder) in line), where
            found["the same" if line is None else "refused"] += 1
    print(f"\n{tried} tampered runs, {sum(found.values())} readings: {dict(found)}")
    assert found["refused"] > found["the same"] > 0


def restore(kept: Path, folder: Path) -> None:
    """Put a run back as it was."""
    shutil.rmtree(folder)
    shutil.copytree(kept, folder)
