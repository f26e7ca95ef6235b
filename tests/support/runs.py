"""Evaluations with their settings as loose names, quiet and without a judge unless one is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from proxytune import results
from proxytune.config import System
from proxytune.models import Models
from proxytune.options import DecodeOptions, JudgeOptions, RunOptions
from proxytune.records import Run
from proxytune.runs.evaluation import Evaluation

QUIET = DecodeOptions(progress=False)


def evaluation_of(system: System, task: str, models: Models | None = None, **settings: Any) -> Evaluation:
    """An Evaluation whose settings are fields of RunOptions, DecodeOptions (and `judge`)."""
    judge = JudgeOptions(judge=settings.pop("judge", "none"))
    decode = {name: settings.pop(name) for name in DecodeOptions.model_fields if name in settings}
    how = DecodeOptions(**{"progress": False, **decode})
    return Evaluation(system, task, RunOptions(**settings), how, judge, loaded=models)


def unfinish(folder: Path, rows: int) -> None:
    """Make a finished run one whose process was killed after its first `rows` examples."""
    run = results.read_run(folder)
    kept = {row["id"] for row in results.read_rows(folder)[:rows]}
    for name in (results.PREDICTIONS, results.COST, results.TRACE):
        path = folder / name
        if path.exists():
            lines = path.read_bytes().splitlines(keepends=True)
            path.write_bytes(b"".join(line for line in lines if json.loads(line)["id"] in kept))
    stopped = run.model_copy(update={"status": "running", "finished": None, "metrics": {}})
    (folder / results.RUN).write_bytes(results.run_json(stopped))


def evaluated(
    system: System, task: str, *, as_: str = "proxy", out: Path, models: Models | None = None, **settings: Any
) -> Run:
    """One role's run in the folder `out`."""
    return evaluation_of(system, task, models, **settings).run(as_, out)[0]
