"""Judge a finished run: who judges it, the consent to pay for that, and the judge's columns in its rows, from
which its metrics are computed anew."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from proxytune import results
from proxytune.config import Mode, System
from proxytune.errors import UserError
from proxytune.judges import JUDGES, Estimate, Judge, OnProgress
from proxytune.options import JudgeOptions
from proxytune.records import FAULT, Run
from proxytune.runs.verdicts import read_finished, with_columns
from proxytune.tasks import Task, get_task


def nothing(line: str) -> None:
    """Print nothing."""


@dataclass(frozen=True)
class Dialogue:
    """How a run reports to its user and asks. By default it prints nothing and has nobody to ask."""

    note: Callable[[str], None] = nothing
    """Hears what judging would cost."""
    ask: Callable[[], bool] | None = None
    """Whether the user agrees to that; None where nobody can be asked."""
    on_progress: OnProgress | None = None


@dataclass(frozen=True)
class Judging:
    """A judge that was checked, and how its cost is agreed to."""

    judge: Judge
    options: JudgeOptions
    dialogue: Dialogue = Dialogue()

    def __call__(self, folder: Path) -> Run:
        """Judge the finished run in a folder, unless this judge has done so."""
        run = results.read_run(folder)
        if run.judge == self.judge.name:
            return run
        return self.again(folder)

    def again(self, folder: Path) -> Run:
        """Judge the finished run in a folder, whoever has judged it before."""
        return judge_run(folder, self.judge, self.dialogue.on_progress, self.agree)

    def agree(self, estimate: Estimate | None) -> None:
        """Go on only where what is to be paid is agreed to and within the limit."""
        if estimate is None:
            return
        self.dialogue.note(f"judge {self.judge.name}: {estimate}")
        most, usd, spent = self.options.max_cost, estimate.usd, estimate.spent
        if estimate.calls and most is not None and usd is not None and spent + usd > most:
            before = f" and {spent:.4f} USD of earlier sessions are" if spent else " is"
            raise UserError(f"the estimate of {usd:.2f} USD{before} over --max-cost {most:g}")
        if estimate.calls == 0 or self.options.yes:
            return
        if self.dialogue.ask is None:
            raise UserError("judging costs money: add --yes to agree (and --max-cost USD for a limit)")
        if not self.dialogue.ask():
            raise UserError("not judged; the generations are kept")


def make_judge(task: Task, options: JudgeOptions) -> Judge | None:
    """The judge that was asked for, checked; None for `none` and for tasks that need none."""
    if options.judge == "none" or (options.judge is None and task.judge is None):
        return None
    if task.judge is None or task.judge_kind is None:
        raise UserError(f"task '{task.name}' needs no judge: leave --judge out")
    model = task.judge if options.judge in (None, "default") else str(options.judge)
    made = JUDGES[task.judge_kind].make(model, options)
    made.check()
    return made


def judging_of(
    system: System, task: Task, options: JudgeOptions, mode: Mode, dialogue: Dialogue | None = None
) -> Judging | None:
    """Who judges the runs of an evaluation that is about to start: the judge that was named, or the system's
    own, or the task's where it has no score without one. UserError now, not after hours of decoding."""
    named = system.judges.get(task.name)
    if named is not None and options.judge in (None, "default"):
        options = options.model_copy(update={"judge": named})
    if mode != "generate" or (options.judge is None and not task.needs_judge):
        return None
    made, how = make_judge(task, options), dialogue or Dialogue()
    if made is None or task.judge_kind is None:
        return None
    if JUDGES[task.judge_kind].paid and not options.yes and how.ask is None:
        raise UserError(
            "the judge of this task costs money: add --yes (and --max-cost USD), or --judge none to judge "
            "later with `proxytune judge`"
        )
    return Judging(made, options, how)


def judged_task(name: str) -> Task:
    """The task of that name, or the UserError that it needs no judge."""
    task = get_task(name)
    if task.execute is not None:
        raise UserError(f"task '{name}' is scored by running its code: add --allow-code-execution")
    if task.judge is None:
        raise UserError(f"task '{name}' needs no judge: its rule is part of every run")
    return task


def judge_run(
    folder: Path,
    judge: Judge,
    on_progress: OnProgress | None = None,
    agree: Callable[[Estimate | None], None] = lambda estimate: None,
) -> Run:
    """Judge the run in a folder, store the verdicts in its rows, and return it with its new metrics. `agree`
    hears what that would cost before anything is asked.

    The folder is locked from the start, so that nothing is asked twice at a time. UserError, and the run as
    it was, where the judge gives no verdict at all."""
    with results.holding(folder):
        return _judge_run(folder, judge, on_progress, agree)


def _judge_run(
    folder: Path, judge: Judge, on_progress: OnProgress | None, agree: Callable[[Estimate | None], None]
) -> Run:
    task_name = results.read_run(folder).spec.task
    task = judged_task(task_name)
    run, rows = read_finished(task_name, folder)
    sound = [row for row in rows if not row.get(FAULT)]
    agree(judge.estimate(sound))
    columns = iter(judge.judge(sound, on_progress))
    judged = [row if row.get(FAULT) else with_columns(row, next(columns)) for row in rows]
    judged = [{**row, "scores": task.scores(row)} for row in judged]
    metrics = task.metrics(judged)
    if sound and task.headline_of(metrics) not in task.judged_headlines:
        raise UserError(
            f"the judge '{judge.name}' gave no verdict on any of {len(sound)} responses, so the run in "
            f"'{folder}' stays as it was: name another with --judge"
        )
    update = {"metrics": metrics, "headline": task.headline_of(metrics), "judge": judge.name}
    run = run.model_copy(update=update)
    results.replace_rows(folder, judged, run)
    return run
