"""Judge a finished run: the judge's columns go into its rows, and its metrics are computed anew."""

from __future__ import annotations

from pathlib import Path

from proxytune import results
from proxytune.errors import UserError
from proxytune.judges.judge import Judge, OnProgress
from proxytune.judges.pairwise import PairwiseJudge
from proxytune.judges.toxicity import ToxicityClassifier
from proxytune.judges.truth import TruthJudges
from proxytune.records import Run
from proxytune.runs.verdicts import read_finished, with_columns
from proxytune.tasks import Task, get_task


def local_judge(task: Task, model: str, batch: int | None = None) -> Judge:
    """The judge that runs on this machine: `MODEL` or `MODEL#LABEL` (toxigen), `TRUTH,INFO` (truthfulqa)."""
    if task.name == "toxigen":
        name, _, label = model.partition("#")
        return ToxicityClassifier(name, label or None, **({} if batch is None else {"batch": batch}))
    truth, _, info = model.partition(",")
    if not truth or not info:
        raise UserError(f"--judge '{model}': give two models, TRUTH,INFO (folders or hub ids)")
    return TruthJudges(truth, info, batch=batch)


def pairwise(task: Task) -> bool:
    """Whether a task is judged by the pairwise judge, which costs money."""
    return task.name == "alpaca_farm"


def judged_task(name: str) -> Task:
    """The task of that name, or the UserError that it needs no judge."""
    task = get_task(name)
    if task.execute is not None:
        raise UserError(f"task '{name}' is scored by running its code: add --allow-code-execution")
    if task.judge is None:
        raise UserError(f"task '{name}' needs no judge: its rule is part of every run")
    return task


def judge_run(folder: Path, judge: Judge | PairwiseJudge, on_progress: OnProgress | None = None) -> Run:
    """Judge the run in a folder, store the verdicts in its rows, and return it with its new metrics."""
    task_name = results.read_run(folder).spec.task
    task = judged_task(task_name)
    run, rows = read_finished(task_name, folder)
    columns = judge.judge(rows, on_progress)
    judged = [with_columns(row, added) for row, added in zip(rows, columns, strict=True)]
    judged = [{**row, "scores": task.score_row(row)} for row in judged]
    metrics = task.metrics(judged)
    update = {"metrics": metrics, "headline": task.headline_of(metrics), "judge": judge.name}
    run = run.model_copy(update=update)
    results.replace_rows(folder, judged, run)
    return run


def alpaca_eval_files(folder: Path) -> dict[str, list[results.Row]]:
    """What the `alpaca_eval` tool reads: the run's outputs, and the baseline's."""
    run, rows = read_finished("alpaca_farm", folder)
    name = f"{run.spec.system.name}-{run.spec.role}"
    sides = {"model_outputs.json": ("output_2", name), "reference_outputs.json": ("output_1", None)}
    return {
        file: [
            {
                "dataset": row.get("dataset", ""),
                "instruction": row["instruction"],
                "output": row[column],
                "generator": generator or row.get("generator_1", ""),
            }
            for row in rows
        ]
        for file, (column, generator) in sides.items()
    }
