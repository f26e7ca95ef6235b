"""`proxytune reproduce`: what a user can type. Its body is in cli_reproduce."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from proxytune.cli_options import (
    AllowCode,
    Batch,
    CodePython,
    Json,
    KvMemory,
    Limit,
    MaxCost,
    Price,
    SandboxName,
)


def reproduce(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="table2, table3, table4 or table5.")],
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
    limit: Limit = None,
    out: Annotated[Path, typer.Option(help="The folder of results.")] = Path("results"),
    judge: Annotated[
        list[str] | None,
        typer.Option(metavar="TASK=MODEL", help="Who judges a task, as for eval --judge (can be repeated)."),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Agree to the downloads and the judges' cost.")] = False,
    max_cost: MaxCost = None,
    price: Price = None,
    batch: Batch = None,
    kv_memory: KvMemory = None,
    allow_code_execution: AllowCode = False,
    sandbox: SandboxName = "auto",
    code_python: CodePython = None,
    json: Json = False,
) -> None:
    """Reproduce a table of the paper: print what it downloads, needs and costs, run it, and show our figures
    beside the paper's. What is finished is kept; the same command continues.

    Example: proxytune reproduce table2 --system demo
    """
    from proxytune import cli_judge, cli_reproduce, cli_run
    from proxytune.reproduce import Choice

    paths = cli_reproduce.named(path or (), "--path", "NAME=DIR")
    asked = cli_reproduce.Request(
        recipe=recipe,
        choice=Choice(system, {name: Path(place) for name, place in paths.items()}, skip_missing),
        judges=cli_reproduce.named(judge or (), "--judge", "TASK=MODEL"),
        judging=cli_judge.Request(yes=yes, max_cost=max_cost, price=price),
        limit=limit,
        out=out,
        batch=batch,
        kv_memory=kv_memory,
        code=cli_run.Code(allow_code_execution, sandbox, code_python),
    )
    cli_reproduce.reproduce(asked, plan_only=plan, json_only=json)
