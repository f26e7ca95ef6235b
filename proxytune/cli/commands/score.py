"""`proxytune score`: stored predictions, scored again from their texts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from proxytune.cli import console
from proxytune.cli.options import CODE, Json, TaskName, Tests, grouped
from proxytune.options import CodeOptions

if TYPE_CHECKING:
    from proxytune.tasks import Execution


@grouped(code=CODE)
def score(
    task: TaskName,
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="Stored predictions (.jsonl, .json, .gz), or their folder.")
    ],
    code: CodeOptions,
    data: Tests = None,
    json: Json = False,
) -> None:
    """Score stored predictions again, from their texts: ours, or the files that the paper's repository
    published.

    Example: proxytune score gsm results/demo/gsm/proxy/predictions.jsonl
    """
    from proxytune.report import tables
    from proxytune.tasks import Execution, read_source, score_file
    from proxytune.tasks.own import read_task

    asked, execution = read_task(task), None
    if (sandbox := console.sandbox_for(asked, code)) is not None:
        examples = () if data is None else read_source(asked, data).examples
        execution = Execution(sandbox, {example.id: example.target for example in examples})
    found = score_file(asked, file, execution)
    if asked.execute is not None and found.headline == asked.headline:
        console.say(f"note: {console.NOT_ALLOWED}")
    if json:
        console.print_json(found.model_dump(mode="json"))
        return
    console.show(f"{asked.name}, {found.n} examples of {file}")
    for name, metric in found.metrics.items():
        figure = tables.figure(name, metric)
        exact = repr(metric.value) if figure and metric.n != 0 else ""
        console.show(f"  {name:22} {figure:28} {exact:22} {tables.coverage(name, metric, found.n)}".rstrip())
    if execution is not None:
        _print_account(execution)
    if found.dropped_duplicates:
        console.show(
            f"  {found.dropped_duplicates} rows were left out: equal to an earlier row of the same id"
        )
    if found.renumbered_ids:
        console.show(
            f"  {found.renumbered_ids} rows share their id with a different row; they were scored separately"
        )


def _print_account(execution: Execution) -> None:
    """What running the code came to."""
    ran = f"{execution.samples} samples run, {execution.passed} passed, {execution.timed_out} timed out"
    stored = f"{execution.flips} of {execution.compared} stored verdicts flipped"
    console.show(f"  {ran}; {stored} ({execution.rerun} run once more, alone)")
    if execution.broken:
        why = "samples were not run, and have no score: their problems need other libraries (--code-python)"
        console.show(f"  {execution.broken} {why}")
    if execution.lost:
        console.show(
            f"  {execution.lost} samples have no verdict: their sandbox was killed, or had no memory left"
        )
