"""What `proxytune reproduce` prints before it does anything: runs, models, memory, data, judges and their
cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from proxytune.config import Role, System
from proxytune.judges import JUDGES, Estimate
from proxytune.models import free_memory
from proxytune.options import JudgeOptions
from proxytune.paper import cost, recipes
from proxytune.records import Run
from proxytune.report import tables
from proxytune.results import RUN, read_rows, read_run
from proxytune.tasks import TASKS

INSTRUCTION_AND_BASELINE = 647
"""Characters of an AlpacaFarm instruction and text_davinci_003's output together, the mean over all 805."""
OUTPUT, BASE_OUTPUT = 2000, 6800
"""Characters of a tuned or proxy-tuned model's output in the paper's runs, and of a base's, which runs on to
the limit of tokens."""
UNKNOWN = "unknown"


@dataclass(frozen=True)
class Planned:
    """One run of a recipe: where it is kept and who judges it."""

    system: System
    task: str
    role: Role
    folder: Path
    judge: str | None
    """As for --judge; None where the task needs none."""

    @property
    def done(self) -> Run | None:
        """The run, if it is finished."""
        if not (self.folder / RUN).exists():
            return None
        found = read_run(self.folder)
        return found if found.status == "done" else None

    @property
    def judge_model(self) -> str | None:
        """The judge's model or models; None without a judge."""
        return (
            TASKS[self.task].judge
            if self.judge == "default"
            else None
            if self.judge == "none"
            else self.judge
        )

    @property
    def judge_key(self) -> str:
        """Which judge this run shares with others."""
        return f"{self.task} {self.judge}"

    @property
    def judged(self) -> bool:
        """Whether the judge's verdicts are stored already."""
        done = self.done
        return done is not None and done.judge == self.judge_model


@dataclass(frozen=True)
class RecipePlan:
    """A recipe's runs and what they take."""

    recipe: recipes.Recipe
    systems: tuple[cost.SystemPlan, ...]
    runs: tuple[Planned, ...]
    limit: int | None
    judging: JudgeOptions
    skip_missing: bool

    @cached_property
    def estimates(self) -> dict[str, Estimate]:
        """What each run's paid judge would take, by the run's folder."""
        found = {str(planned.folder): self._estimate(planned) for planned in self.runs if paid(planned)}
        return {folder: estimate for folder, estimate in found.items() if estimate is not None}

    def _estimate(self, planned: Planned) -> Estimate | None:
        model, kind = planned.judge_model, TASKS[planned.task].judge_kind
        assert model is not None and kind is not None
        judge = JUDGES[kind].make(model, self.judging.model_copy(update={"max_cost": None}))
        if planned.judged:
            return judge.forecast(0, 0.0)
        if planned.done is not None:
            return judge.estimate(read_rows(planned.folder))
        count = min(TASKS[planned.task].items or 0, self.limit or math.inf)
        output = BASE_OUTPUT if planned.role == "base" else OUTPUT
        return judge.forecast(int(count), INSTRUCTION_AND_BASELINE + output)

    @property
    def usd(self) -> float | None:
        """What all judges cost; None where a price is not known."""
        costs = [estimate.usd for estimate in self.estimates.values() if estimate.calls]
        return None if None in costs else sum(usd for usd in costs if usd)

    @cached_property
    def needs(self) -> dict[str, cost.Need]:
        """Every model and local judge, once, by name."""
        models = [need for one in self.systems for need in one.models.values()]
        judges = [
            cost.judge_need(name)
            for p in self.runs
            if p.judge is not None and not paid(p) and not p.judged
            for name in judge_models(p)
        ]
        return {need.name: need for need in (*models, *judges)}

    @property
    def download(self) -> float | None:
        """Bytes to fetch; None where a size is not known."""
        sizes = [need.download for need in self.needs.values()]
        return None if None in sizes else sum(found for found in sizes if found)

    def as_json(self) -> dict[str, object]:
        """The plan as JSON."""
        return {
            "recipe": self.recipe.name,
            "runs": [
                {
                    "system": p.system.name,
                    "task": p.task,
                    "as": p.role,
                    "judge": p.judge_model,
                    "done": p.done is not None,
                    "folder": str(p.folder),
                }
                for p in self.runs
            ],
            "memory_bytes": {one.system.name: one.memory for one in self.systems},
            "download_bytes": self.download,
            "judge_usd": self.usd,
            "missing": [text for one in self.systems for text in one.missing],
            "left_out": [text for one in self.systems for text in one.left_out],
        }


def paid(planned: Planned) -> bool:
    """Whether a run's judge is behind an API."""
    kind = TASKS[planned.task].judge_kind
    return planned.judge_model is not None and kind is not None and JUDGES[kind].paid


def judge_models(planned: Planned) -> tuple[str, ...]:
    """The models of a run's judge that run here."""
    model, kind = planned.judge_model, TASKS[planned.task].judge_kind
    return () if model is None or kind is None else JUDGES[kind].models(model)


def print_plan(plan: RecipePlan, put: Callable[[str], None]) -> None:
    """Everything a user should know before going on, put out line by line."""
    for line in lines(plan):
        put(line)


def lines(plan: RecipePlan) -> Iterator[str]:
    """The plan, line by line."""
    yield f"{plan.recipe.name}: {plan.recipe.title} (table {plan.recipe.table} of the paper)"
    for one in plan.systems:
        yield from _system_lines(one, [p for p in plan.runs if p.system is one.system])
    for task, source in cost.sources(plan.systems).items():
        yield f"  data    {task}: {source}"
    yield from _judge_lines(plan)
    if any(TASKS[p.task].execute for p in plan.runs):
        yield "  code    model-written code is run only with --allow-code-execution, in a sandbox"
    download = UNKNOWN if plan.download is None else tables.size(int(plan.download)) or "nothing"
    usd = "unknown (give --price IN,OUT)" if plan.usd is None else f"about {plan.usd:.2f} USD"
    usd = usd if plan.estimates else "nothing to pay"
    yield f"  free    {tables.size(free_memory('auto'))} of memory on this machine's GPUs and CPU"
    yield f"  in all  {_count(plan.runs)}; models to download: {download}; judges: {usd}"


def _system_lines(one: cost.SystemPlan, runs: Sequence[Planned]) -> Iterator[str]:
    """What one system is asked, and what its models take."""
    tasks = dict.fromkeys(planned.task for planned in runs)
    yield f"  system  {one.system.name}: {_count(runs)}"
    for task in tasks:
        yield f"          {task} as {', '.join(planned.role for planned in runs if planned.task == task)}"
    for text in one.left_out:
        yield f"          left out: {text}"
    for name, need in one.models.items():
        place = "on disk" if need.here else f"to download, {_bytes(need.download)}"
        yield f"  model   {name} {need.name}: {_bytes(need.weights)} in memory, {place}"
    for text in one.missing:
        yield f"  missing {text}"
    if one.models:
        kv = cost.kv_per_token(one)
        more = "" if kv is None else f", and {kv / 1e6:.1f} MB of KV cache per token in flight as the proxy"
        more = " and the missing models" if one.missing else more
        yield f"  memory  {one.system.name}: {_bytes(one.memory)} of weights at once{more}"


def _judge_lines(plan: RecipePlan) -> Iterator[str]:
    """Who judges, and what that takes."""
    by_judge: dict[tuple[str, str], list[Planned]] = {}
    for planned in plan.runs:
        if planned.judge is not None:
            by_judge.setdefault((planned.task, planned.judge_model or "none"), []).append(planned)
    for (task, model), runs in by_judge.items():
        if model == "none":
            yield f"  judge   {task}: none; `proxytune judge` can judge the runs later"
        elif all(planned.judged for planned in runs):
            yield f"  judge   {task}: {model}: all runs are judged"
        elif paid(runs[0]):
            estimates = [plan.estimates[str(planned.folder)] for planned in runs]
            calls, tokens = sum(e.calls for e in estimates), sum(e.prompt_tokens for e in estimates)
            costs = [e.usd for e in estimates]
            usd = UNKNOWN if None in costs else f"about {sum(c for c in costs if c):.2f} USD"
            yield f"  judge   {task}: {model} behind an API: {calls} judgements, about {tokens} tokens, {usd}"
        else:
            needs = [cost.judge_need(name) for name in judge_models(runs[0])]
            shown = "; ".join(
                f"{need.name}, {_bytes(need.weights)} in memory, "
                + ("on disk" if need.here else f"to download, {_bytes(need.download)}")
                for need in needs
            )
            yield f"  judge   {task}: {shown}"


def _count(runs: Sequence[Planned]) -> str:
    """How many runs there are, and how many are finished."""
    done = sum(planned.done is not None for planned in runs)
    return f"{len(runs)} runs" + (f" ({done} done already)" if done else "")


def _bytes(count: float | None) -> str:
    """Bytes, or that nobody knows."""
    return UNKNOWN if count is None else tables.size(int(count)) or "nothing"
