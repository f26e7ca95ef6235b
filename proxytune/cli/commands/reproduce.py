"""The body of `proxytune reproduce`: print what a recipe takes, ask, run what is missing, judge it, and show
the table with our figures beside the paper's.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from proxytune.cli.commands import judge as cli_judge
from proxytune.cli.commands.evaluate import NOT_ALLOWED, Code, parse_size, print_json, tell_loading
from proxytune.cli.commands.reproduce_plan import Plan, Planned, print_plan
from proxytune.cli.commands.show import print_beside_paper
from proxytune.config import Role
from proxytune.errors import UserError, did_you_mean
from proxytune.judges.judge import Judge
from proxytune.judges.pairwise import PairwiseJudge
from proxytune.models.loading import Models
from proxytune.paper.cost import CONFIRM, Choice, SystemPlan, plan_systems
from proxytune.paper.recipes import Recipe, load_recipe
from proxytune.records import Run
from proxytune.results import read_rows, read_run
from proxytune.runs import evaluate as run
from proxytune.sandbox.sandbox import Sandbox
from proxytune.tasks import TASKS


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the options of `reproduce` said."""

    recipe: str
    choice: Choice
    judges: Mapping[str, str]
    """Task -> judge, as for --judge."""
    judging: cli_judge.Request
    limit: int | None
    out: Path
    batch: int | None
    kv_memory: str | None
    code: Code


def reproduce(asked: Request, *, plan_only: bool, json_only: bool) -> None:
    """Plan, ask, run, judge, show."""
    recipe = load_recipe(asked.recipe)
    plan = _plan(recipe, asked)
    if plan_only and json_only:
        print_json(plan.as_json())
        return
    print_plan(plan, sys.stderr if json_only else sys.stdout)
    if plan_only:
        return
    _refuse_missing(plan)
    judges = _judges(plan, asked)
    sandbox = _sandbox(plan, asked.code)
    _agree(plan, asked)
    for one in plan.systems:
        _run(one, [p for p in plan.runs if p.system is one.system], asked, sandbox)
    runs = _judge(plan, judges, asked)
    if json_only:
        told = [(p, found) for p, found in zip(plan.runs, runs, strict=True)]
        print_json({"recipe": recipe.name, "runs": [_told(p, found) for p, found in told]})
        return
    print_beside_paper(runs, as_markdown=False, only=recipe)


def named(texts: Sequence[str], option: str, what: str) -> dict[str, str]:
    """`NAME=VALUE` options -> a mapping."""
    pairs = [text.partition("=") for text in texts]
    for text, (name, _, value) in zip(texts, pairs, strict=True):
        if not name or not value:
            raise UserError(f"{option} '{text}' must be {what}")
    return {name: value for name, _, value in pairs}


def _plan(recipe: Recipe, asked: Request) -> Plan:
    """The runs of a recipe with their folders and judges."""
    for task in asked.judges:
        if task not in TASKS:
            raise did_you_mean("task", task, TASKS)
    systems, runs, options = plan_systems(recipe, asked.choice), [], run.Options(limit=asked.limit)
    for one in systems:
        for task, role in one.runs:
            usual = "default" if TASKS[task].judge is not None else None
            judge = asked.judges.get(task) or one.system.judges.get(task) or usual
            folder = run.planned_folder(one.system, task, role, options, asked.out)
            runs.append(Planned(one.system, task, role, folder, judge))
    return Plan(
        recipe=recipe,
        systems=tuple(systems),
        runs=tuple(runs),
        limit=asked.limit,
        judging=asked.judging,
        skip_missing=asked.choice.skip_missing,
    )


def _refuse_missing(plan: Plan) -> None:
    """UserError if a model is in no folder, or nothing is left to run."""
    missing = [text for one in plan.systems for text in one.missing]
    if missing and not plan.skip_missing:
        names = sorted({Path(text.rpartition(" ")[2].strip("'")).name for text in missing})
        how = ", ".join(f"--path {name}=DIR" for name in names if name in plan.recipe.unpublished)
        raise UserError(
            f"{len(missing)} models are missing ({missing[0]}): say where they are "
            f"({how or 'in the system file'}), or leave the lines that need them out with --skip-missing"
        )
    if not plan.runs:
        raise UserError(f"nothing of '{plan.recipe.name}' is left to run")


def _judges(plan: Plan, asked: Request) -> dict[str, Judge | PairwiseJudge | None]:
    """Task and name -> the judge, checked before anything is run; runs that are judged already need none."""
    made: dict[str, Judge | PairwiseJudge | None] = {}
    for planned in plan.runs:
        if planned.judge is not None and planned.judge_key not in made and not planned.judged:
            request = dataclasses.replace(asked.judging, judge=planned.judge)
            made[planned.judge_key] = cli_judge.make(planned.task, request)
    return made


def _sandbox(plan: Plan, code: Code) -> Sandbox | None:
    """The sandbox for the tasks that run code; a note where it was not asked for."""
    task = next((TASKS[planned.task] for planned in plan.runs if TASKS[planned.task].execute), None)
    if task is None:
        if code.allowed:
            raise UserError(f"'{plan.recipe.name}' runs no code: leave --allow-code-execution out")
        return None
    sandbox = code.open(task)
    if sandbox is None:
        print(f"note: {NOT_ALLOWED}", file=sys.stderr, flush=True)
    return sandbox


def _agree(plan: Plan, asked: Request) -> None:
    """Go on only with the user's consent where much is downloaded or money is spent."""
    usd, download = plan.usd, plan.download
    if asked.judging.max_cost is not None and usd is not None and usd > asked.judging.max_cost:
        raise UserError(f"the estimate of {usd:.2f} USD is over --max-cost {asked.judging.max_cost:g}")
    if asked.judging.yes or (usd == 0 and download is not None and download < CONFIRM):
        return
    if not sys.stdin.isatty():
        raise UserError(
            "this downloads much or costs money: add --yes to agree (and --max-cost USD for a limit)"
        )
    print("go on? [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise UserError("nothing was done")


def _run(one: SystemPlan, runs: Sequence[Planned], asked: Request, sandbox: Sandbox | None) -> None:
    """All runs of a system; each model is loaded once, the tuned one when the others have gone."""
    if not runs:
        return
    models = Models(one.system, on_load=tell_loading)
    kv_memory = None if asked.kv_memory is None else parse_size(asked.kv_memory)
    before: Role | None = None
    for planned in runs:
        if planned.role == "tuned" and before != "tuned":
            models.release(keep=["tuned"])
        before = planned.role
        job = run.plan(one.system, planned.task, planned.role, run.Options(limit=asked.limit))
        code = sandbox if job.task.execute is not None else None
        resources = run.Resources(max_batch=asked.batch, kv_memory=kv_memory, sandbox=code)
        run.run_job(job, planned.folder, models, resources)
    models.release(keep=[])


def _judge(plan: Plan, judges: Mapping[str, Judge | PairwiseJudge | None], asked: Request) -> list[Run]:
    """The finished runs, judged; what the judges may still spend goes down from one run to the next."""
    left, found = asked.judging.max_cost, []
    for planned in plan.runs:
        made = judges.get(planned.judge_key)
        if made is not None and isinstance(made, PairwiseJudge) and left is not None:
            made = dataclasses.replace(made, max_cost=left)
            left = max(0.0, left - (made.estimate(read_rows(planned.folder)).usd or 0.0))
        request = dataclasses.replace(asked.judging, yes=True)
        done = read_run(planned.folder)
        found.append(done if made is None else cli_judge.after_eval(planned.folder, made, request))
    return found


def _told(planned: Planned, found: Run) -> dict[str, object]:
    """A run as JSON."""
    metrics = {name: metric.model_dump(mode="json") for name, metric in found.metrics.items()}
    return {
        "system": planned.system.name,
        "task": planned.task,
        "as": planned.role,
        "n": found.n,
        "headline": found.headline,
        "judge": found.judge,
        "metrics": metrics,
        "folder": str(planned.folder),
    }
