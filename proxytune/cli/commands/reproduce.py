"""`proxytune reproduce`: prints what a recipe takes, asks, runs what is missing, judges it, and shows the
table with our figures beside the paper's."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from proxytune.cli import console
from proxytune.cli.options import CODE, CONSENT, DECODING, Json, grouped
from proxytune.config import Role
from proxytune.errors import UserError, did_you_mean
from proxytune.options import CodeOptions, DecodeOptions, JudgeOptions, RunOptions
from proxytune.records import Run
from proxytune.results import read_rows, read_run

if TYPE_CHECKING:
    from proxytune.cli.reproduce_plan import Planned, RecipePlan
    from proxytune.judges import Judge
    from proxytune.paper import cost, recipes
    from proxytune.sandbox import Sandbox


@grouped(decode=DECODING, code=CODE, consent=CONSENT)
def reproduce(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="A recipe in configs/recipes, for example table2.")
    ],
    decode: DecodeOptions,
    code: CodeOptions,
    consent: JudgeOptions,
    system: Annotated[
        str | None,
        typer.Option("--system", "-s", metavar="S", help="Run this system in place of the paper's."),
    ] = None,
    path: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=DIR", help="Where a model lies that nobody published (can be repeated)."),
    ] = None,
    skip_missing: Annotated[
        bool, typer.Option("--skip-missing", help="Leave out the lines whose models are missing.")
    ] = False,
    plan: Annotated[bool, typer.Option("--plan", help="Print what it takes, and do nothing.")] = False,
    limit: Annotated[int | None, typer.Option(help="Only the first N items.")] = None,
    out: Annotated[Path, typer.Option(help="The folder of results.")] = Path("results"),
    judge: Annotated[
        list[str] | None,
        typer.Option(metavar="TASK=MODEL", help="Who judges a task, as for eval --judge (can be repeated)."),
    ] = None,
    json: Json = False,
) -> None:
    """Reproduce a table of the paper: print what it downloads, needs and costs, run it, and show our figures
    beside the paper's. What is finished is kept; the same command continues.

    Example: proxytune reproduce table2 --system demo
    """
    from proxytune.cli.reproduce_plan import print_plan
    from proxytune.paper import cost, recipes

    paths = {name: Path(place) for name, place in named(path or (), "--path", "NAME=DIR").items()}
    asked = ReproduceRequest(
        recipe=recipes.load_recipe(recipe),
        choice=cost.RecipeChoice(system, paths, skip_missing),
        judges=named(judge or (), "--judge", "TASK=MODEL"),
        judging=consent.model_copy(update={"code": code}),
        limit=limit,
        out=out,
        decode=decode,
    )
    made = _plan(asked)
    if plan and json:
        console.print_json(made.as_json())
        return
    print_plan(made, console.say if json else console.show)
    if not plan:
        _carry_out(made, asked, json_only=json)


@dataclass(frozen=True, kw_only=True)
class ReproduceRequest:
    """What the options of `reproduce` ask for."""

    recipe: recipes.Recipe
    choice: cost.RecipeChoice
    judges: Mapping[str, str]
    """Task -> judge, as for --judge."""
    judging: JudgeOptions
    limit: int | None
    out: Path
    decode: DecodeOptions


def _carry_out(plan: RecipePlan, asked: ReproduceRequest, *, json_only: bool) -> None:
    """Check, ask, run, judge, show."""
    _refuse_missing(plan)
    judges = _judges(plan, asked)
    sandbox = _sandbox(plan, asked.judging.code)
    _agree(plan, asked)
    for one in plan.systems:
        _run(one, [p for p in plan.runs if p.system is one.system], asked, sandbox)
    runs = _judge(plan, judges, asked)
    if json_only:
        shown = [_as_json(p, found) for p, found in zip(plan.runs, runs, strict=True)]
        console.print_json({"recipe": plan.recipe.name, "runs": shown})
        return
    from proxytune.cli.commands.report import print_beside_paper

    print_beside_paper(runs, as_markdown=False, only=plan.recipe)


def named(texts: Sequence[str], option: str, what: str) -> dict[str, str]:
    """`NAME=VALUE` options -> a mapping."""
    pairs = [text.partition("=") for text in texts]
    for text, (name, _, value) in zip(texts, pairs, strict=True):
        if not name or not value:
            raise UserError(f"{option} '{text}' must be {what}")
    return {name: value for name, _, value in pairs}


def _plan(asked: ReproduceRequest) -> RecipePlan:
    """The runs of a recipe with their folders and judges."""
    from proxytune.cli.reproduce_plan import Planned, RecipePlan
    from proxytune.paper import cost
    from proxytune.runs import evaluation
    from proxytune.tasks import TASKS

    for task in asked.judges:
        if task not in TASKS:
            raise did_you_mean("task", task, TASKS)
    systems, runs = cost.plan_systems(asked.recipe, asked.choice), []
    options = RunOptions(limit=asked.limit)
    for one in systems:
        for task, role in one.runs:
            usual = "default" if TASKS[task].judge is not None else None
            judge = asked.judges.get(task) or one.system.judges.get(task) or usual
            folder = evaluation.planned_folder(one.system, task, role, options, asked.out)
            runs.append(Planned(one.system, task, role, folder, judge))
    return RecipePlan(
        recipe=asked.recipe,
        systems=tuple(systems),
        runs=tuple(runs),
        limit=asked.limit,
        judging=asked.judging,
        skip_missing=asked.choice.skip_missing,
    )


def _refuse_missing(plan: RecipePlan) -> None:
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


def _judges(plan: RecipePlan, asked: ReproduceRequest) -> dict[str, Judge | None]:
    """Task and name -> the judge, checked before anything is run; runs that are judged already need none."""
    from proxytune.runs import judging
    from proxytune.tasks import TASKS

    made: dict[str, Judge | None] = {}
    for planned in plan.runs:
        if planned.judge is not None and planned.judge_key not in made and not planned.judged:
            options = asked.judging.model_copy(update={"judge": planned.judge})
            made[planned.judge_key] = judging.make_judge(TASKS[planned.task], options)
    return made


def _sandbox(plan: RecipePlan, code: CodeOptions) -> Sandbox | None:
    """The sandbox for the tasks that run code; a note where it was not asked for."""
    from proxytune.tasks import TASKS

    task = next((TASKS[planned.task] for planned in plan.runs if TASKS[planned.task].execute), None)
    if task is None:
        if code.allow_code_execution:
            raise UserError(f"'{plan.recipe.name}' runs no code: leave --allow-code-execution out")
        return None
    sandbox = console.sandbox_for(task, code)
    if sandbox is None:
        console.say(f"note: {console.NOT_ALLOWED}")
    return sandbox


def _agree(plan: RecipePlan, asked: ReproduceRequest) -> None:
    """Go on only with the user's consent where much is downloaded or money is spent."""
    from proxytune.paper import cost

    usd, download, most = plan.usd, plan.download, asked.judging.max_cost
    if most is not None and usd is not None and usd > most:
        raise UserError(f"the estimate of {usd:.2f} USD is over --max-cost {most:g}")
    if asked.judging.yes or (usd == 0 and download is not None and download < cost.CONFIRM):
        return
    if not sys.stdin.isatty():
        raise UserError(
            "this downloads much or costs money: add --yes to agree (and --max-cost USD for a limit)"
        )
    if not console.asked_on_terminal():
        raise UserError("nothing was done")


def _run(
    one: cost.SystemPlan, runs: Sequence[Planned], asked: ReproduceRequest, sandbox: Sandbox | None
) -> None:
    """All runs of a system; each model is loaded once, the tuned one when the others have gone."""
    from proxytune.runs import evaluation, session
    from proxytune.runs.decoders import decoder_here

    if not runs:
        return
    models = console.models_of(one.system)
    before: Role | None = None
    for planned in runs:
        if planned.role == "tuned" and before != "tuned":
            models.release(keep=["tuned"])
        before = planned.role
        job = evaluation.plan(one.system, planned.task, planned.role, RunOptions(limit=asked.limit))
        code = sandbox if job.task.execute is not None else None
        session.run_job(job, planned.folder, decoder_here(models), asked.decode, code)
    models.release(keep=[])


def _judge(plan: RecipePlan, judges: Mapping[str, Judge | None], asked: ReproduceRequest) -> list[Run]:
    """The finished runs, judged; what the judges may still spend goes down from one run to the next."""
    from proxytune.runs import judging
    from proxytune.tasks import TASKS

    left, found = asked.judging.max_cost, []
    for planned in plan.runs:
        made = judges.get(planned.judge_key)
        if made is None:
            found.append(read_run(planned.folder))
            continue
        options = asked.judging.model_copy(update={"judge": planned.judge, "max_cost": left, "yes": True})
        estimate = made.estimate(read_rows(planned.folder))
        if left is not None and estimate is not None:
            made = judging.make_judge(TASKS[planned.task], options) or made
            left = max(0.0, left - (estimate.usd or 0.0))
        found.append(judging.Judging(made, options, console.dialogue())(planned.folder))
    return found


def _as_json(planned: Planned, found: Run) -> dict[str, object]:
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
