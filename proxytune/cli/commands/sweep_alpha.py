"""The body of `proxytune sweep-alpha`."""

from __future__ import annotations

import sys

from proxytune.cli.commands.evaluate import Request, prepared, print_json, read_mode
from proxytune.cli.commands.judge import Request as JudgeRequest
from proxytune.cli.commands.judge import judge_of_runs
from proxytune.config import System


def sweep(system: System, alphas: str, asked: Request, judging: JudgeRequest, *, json_only: bool) -> None:
    """Run the sweep, judge its runs, and print the curve."""
    from proxytune.tasks import get_task

    task = get_task(asked.task, read_mode(asked.mode))
    system.require("proxy")
    judge = judge_of_runs(system, asked, judging)

    from proxytune.runs import sweep as run_sweep

    schedules = run_sweep.parse_alphas(alphas)
    options, resources, models = prepared(system, task, asked)
    folder, _ = run_sweep.sweep(
        system,
        asked.task,
        schedules,
        options,
        out=asked.out,
        resources=resources,
        models=models,
        judge=judge,
    )

    from proxytune.analysis import sweeps as analysis_sweep
    from proxytune.cli.commands.analyze_tables import sweep_table

    found = analysis_sweep.sweep(folder)
    if json_only:
        print_json(found.model_dump(mode="json"))
        return
    sweep_table(found)
    print(f"stored in {folder}", file=sys.stdout)
