"""`proxytune judge`: judges a finished run, or runs the code that it stored."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from proxytune.cli import console
from proxytune.cli.options import CODE, JUDGING_ALONE, Json, TaskName, Tests, grouped
from proxytune.config import SOURCES
from proxytune.errors import UserError
from proxytune.options import CodeOptions, JudgeOptions

if TYPE_CHECKING:
    from proxytune.records import Run
    from proxytune.sandbox import Sandbox
    from proxytune.tasks import Task


@grouped(code=CODE, judge=JUDGING_ALONE)
def judge(
    task: TaskName,
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a finished run.")],
    code: CodeOptions,
    judge: JudgeOptions,
    data: Tests = None,
    json: Json = False,
) -> None:
    """Judge the responses of a finished run, or run the code in them. Judgements that cost money are
    cached: asking twice costs once.

    Example: proxytune judge toxigen results/llama2-13b/toxigen/proxy --judge tomh/toxigen_roberta
    """
    from proxytune.runs import judging, verdicts
    from proxytune.tasks.own import read_task

    named = read_task(task)
    sandbox = console.sandbox_for(named, code)
    if sandbox is not None:
        console.print_run(_run_code(named, run, sandbox, data), run, json_only=json)
        return
    asked = judging.judged_task(named.name)
    if data is not None:
        raise UserError("--data names the tests to run code against: it goes with --allow-code-execution")
    verdicts.read_finished(asked.name, run)
    who = judge if judge.judge is not None else judge.model_copy(update={"judge": "default"})
    made = judging.make_judge(asked, who)
    if made is None:
        raise UserError("--judge none leaves nothing to do: name a judge, or leave it out for the default")
    again = judging.Judging(made, who, console.dialogue()).again(run)
    console.print_run(again, run, json_only=json)


def _run_code(task: Task, folder: Path, sandbox: Sandbox, data: str | None) -> Run:
    """Give the stored responses of a run their verdicts; the tests come from the data that was asked."""
    from proxytune.runs import verdicts
    from proxytune.tasks import read_source

    run, _ = verdicts.read_finished(task.name, folder)
    source = run.spec.data if data is None else data
    if data is None and source not in SOURCES:
        raise UserError(f"the run asked a file, '{source}', which has the tests: name it with --data FILE")
    examples = read_source(task, source, run.spec.limit).examples
    return verdicts.add_verdicts(folder, {example.id: example.target for example in examples}, sandbox)
