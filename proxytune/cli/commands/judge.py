"""The bodies of `proxytune judge` and `proxytune export`, and what `eval --judge` does after a run."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from proxytune.cli.commands.evaluate import Code, print_json, print_one, read_mode
from proxytune.cli.commands.evaluate import Request as EvalRequest
from proxytune.cli.commands.evaluate import evaluate as run_roles
from proxytune.config import SOURCES, System
from proxytune.errors import UserError, did_you_mean
from proxytune.results import write_atomically

if TYPE_CHECKING:
    from proxytune.judges.judge import Judge
    from proxytune.judges.pairwise import PairwiseJudge
    from proxytune.records import Run
    from proxytune.results import Row
    from proxytune.sandbox.sandbox import Sandbox

FORMATS = ("alpaca_eval",)


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the options about judging said."""

    judge: str | None = None
    """default, none, a model; None is the default for tasks that say nothing without a judge."""
    yes: bool = False
    max_cost: float | None = None
    price: str | None = None
    seed: int = 0
    batch: int | None = None


def judge(task: str, folder: Path, asked: Request, code: Code, data: str | None, *, json_only: bool) -> None:
    """Judge one finished run, or run the code that it stored, and print its metrics."""
    from proxytune.runs import judging as run_judge
    from proxytune.runs.verdicts import read_finished
    from proxytune.tasks import get_task

    sandbox = code.open(get_task(task))
    if sandbox is not None:
        print_one(_run_code(task, folder, sandbox, data), folder, json_only=json_only)
        return
    run_judge.judged_task(task)
    if data is not None:
        raise UserError("--data names the tests to run code against: it goes with --allow-code-execution")
    _, rows = read_finished(task, folder)
    made = make(task, asked)
    if made is None:
        raise UserError("--judge none leaves nothing to do: name a judge, or leave it out for the default")
    agree(made, rows, asked)
    run = run_judge.judge_run(folder, made, teller())
    print_one(run, folder, json_only=json_only)


def _run_code(task_name: str, folder: Path, sandbox: Sandbox, data: str | None) -> Run:
    """Give the stored responses of a run their verdicts; the tests come from the data that was asked."""
    from proxytune.runs.verdicts import add_verdicts, read_finished
    from proxytune.tasks import get_task, read_source

    run, _ = read_finished(task_name, folder)
    source = run.spec.data if data is None else data
    if data is None and source not in SOURCES:
        raise UserError(f"the run asked a file, '{source}', which has the tests: name it with --data FILE")
    examples = read_source(get_task(task_name), source, run.spec.limit).examples
    return add_verdicts(folder, {example.id: example.target for example in examples}, sandbox)


def make(task_name: str, asked: Request) -> Judge | PairwiseJudge | None:
    """The judge that was asked for, checked; None for `none` and for tasks that say enough without one."""
    from proxytune.tasks import get_task

    task = get_task(task_name)
    if asked.judge == "none" or (asked.judge is None and task.judge is None):
        return None
    if task.judge is None:
        raise UserError(f"task '{task_name}' needs no judge: leave --judge out")

    from proxytune.judges.pairwise import PairwiseJudge
    from proxytune.runs import judging as run_judge

    model = task.judge if asked.judge in (None, "default") else str(asked.judge)
    made: Judge | PairwiseJudge
    if run_judge.pairwise(task):
        made = PairwiseJudge(model, seed=asked.seed, price=read_price(asked.price), max_cost=asked.max_cost)
    else:
        made = run_judge.local_judge(task, model, asked.batch)
    made.check()
    return made


def evaluate(system: System, asked: EvalRequest, judging: Request, *, json_only: bool) -> None:
    """`proxytune eval`: check the judge, run one role or all of them, judge the runs."""
    run_roles(system, asked, json_only=json_only, judge=judge_of_runs(system, asked, judging))


def judge_of_runs(system: System, asked: EvalRequest, judging: Request) -> Callable[[Path], Run] | None:
    """What judges the runs of a command, checked before anything is decoded: the judge that was named, or the
    system's own, or the task's."""
    named = system.judges.get(asked.task)
    if named is not None and judging.judge in (None, "default"):
        judging = replace(judging, judge=named)
    made = before_eval(asked.task, judging, read_mode(asked.mode))
    return None if made is None else lambda folder: after_eval(folder, made, judging)


def before_eval(task_name: str, asked: Request, mode: str) -> Judge | PairwiseJudge | None:
    """The judge of an evaluation that is about to start; UserError now, not after hours of decoding."""
    from proxytune.tasks import get_task

    if mode == "likelihood" or (asked.judge is None and get_task(task_name).headline != "unjudged"):
        return None
    made = make(task_name, asked)
    if made is not None and _costs(made) and not asked.yes and not sys.stdin.isatty():
        raise UserError(
            "the judge of this task costs money: add --yes (and --max-cost USD), or --judge none to judge "
            "later with `proxytune judge`"
        )
    return made


def after_eval(folder: Path, made: Judge | PairwiseJudge, asked: Request) -> Run:
    """Judge a run that an evaluation finished."""
    from proxytune import results
    from proxytune.runs import judging as run_judge

    run = results.read_run(folder)
    if run.judge == made.name:
        return run
    agree(made, results.read_rows(folder), asked)
    return run_judge.judge_run(folder, made, teller())


def agree(made: Judge | PairwiseJudge, rows: list[Row], asked: Request) -> None:
    """Show what judging would cost, and go on only with the user's consent."""
    from proxytune.judges.pairwise import PairwiseJudge

    if not isinstance(made, PairwiseJudge):
        return
    estimate = made.estimate(rows)
    print(f"judge {made.name}: {estimate}", file=sys.stderr, flush=True)
    if estimate.calls == 0:
        return
    if made.max_cost is not None and estimate.usd is not None and estimate.usd > made.max_cost:
        raise UserError(f"the estimate of {estimate.usd:.2f} USD is over --max-cost {made.max_cost:g}")
    if asked.yes:
        return
    if not sys.stdin.isatty():
        raise UserError("judging costs money: add --yes to agree (and --max-cost USD for a limit)")
    print("go on? [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise UserError("not judged; the generations are kept")


def _costs(made: Judge | PairwiseJudge) -> bool:
    from proxytune.judges.pairwise import PairwiseJudge

    return isinstance(made, PairwiseJudge)


def read_price(text: str | None) -> tuple[float, float] | None:
    """`2,8` -> US dollars per million tokens, in and out."""
    if text is None:
        return None
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) != 2 or not all(0 <= number < 1e6 for number in numbers):
        raise UserError(f"--price '{text}' must be two numbers: USD per million tokens, IN,OUT")
    return numbers[0], numbers[1]


def teller() -> Callable[[int, int], None]:
    """Says on stderr how far judging is, ten times at most."""
    told = 0

    def tell(done: int, total: int) -> None:
        nonlocal told
        if 10 * done // total > told:
            told = 10 * done // total
            print(f"judged {done}/{total}", file=sys.stderr, flush=True)

    return tell


def export(kind: str, folder: Path, out: Path | None, *, json_only: bool) -> None:
    """Write a run in another tool's format."""
    if kind not in FORMATS:
        raise did_you_mean("format", kind, FORMATS)
    from proxytune.runs import judging as run_judge

    target = out or folder
    if not target.is_dir():
        raise UserError(f"no folder '{target}' to write to")
    written = []
    for name, rows in run_judge.alpaca_eval_files(folder).items():
        write_atomically(target / name, (json.dumps(rows, indent=2, ensure_ascii=False) + "\n").encode())
        written.append(str(target / name))
    if json_only:
        print_json({"written": written})
        return
    outputs, reference = written
    print(f"wrote {outputs} and {reference}")
    print(f"then: alpaca_eval --model_outputs {outputs} --reference_outputs {reference}")
    print("and:  proxytune score alpaca_farm annotations.json")
