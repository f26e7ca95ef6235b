"""The commands that make many runs, `sweep-alpha` and `reproduce`: what a user can type. Their bodies are in
cli_sweep and cli_reproduce."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from proxytune.cli.options import (
    AllowCode,
    Alphas,
    Batch,
    CodePython,
    Data,
    Drafter,
    Json,
    JudgeName,
    KvMemory,
    Limit,
    MaxCost,
    MaxNewTokens,
    ModeName,
    Negative,
    Price,
    RemoteCode,
    SandboxName,
    Seed,
    Shots,
    ShotsFrom,
    Speculate,
    SweepOut,
    SystemName,
    TaskName,
    Temperature,
    Vocab,
    Yes,
)


def sweep_alpha(
    task: TaskName,
    alphas: Alphas,
    system: SystemName = "demo",
    data: Data = None,
    limit: Limit = None,
    shots: Shots = 0,
    shots_from: ShotsFrom = None,
    out: SweepOut = None,
    mode: ModeName = "generate",
    seed: Seed = 0,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = None,
    batch: Batch = None,
    kv_memory: KvMemory = None,
    speculate: Speculate = "auto",
    drafter: Drafter = None,
    vocab: Vocab = None,
    allow_negative_alpha: Negative = False,
    trust_remote_code: RemoteCode = False,
    allow_code_execution: AllowCode = False,
    judge: JudgeName = None,
    yes: Yes = False,
    max_cost: MaxCost = None,
    price: Price = None,
    json: Json = False,
) -> None:
    """Evaluate the proxy under many alphas at once: models are loaded once, and the alphas of an example
    share its prompt. An interrupted sweep is continued by the same command.

    Example: proxytune sweep-alpha truthfulqa --system demo --alphas 0:2:0.2 --limit 100
    """
    from proxytune.cli.commands import evaluate as cli_run
    from proxytune.cli.commands import judge as cli_judge
    from proxytune.cli.commands import sweep_alpha as cli_sweep

    changed = {"max_new_tokens": max_new_tokens, "temperature": temperature}
    asked = cli_run.Request(
        task=task,
        as_="proxy",
        alpha=None,
        changed={name: value for name, value in changed.items() if value is not None},
        data=data,
        limit=limit,
        shots=shots,
        shots_from=shots_from,
        out=out,
        trace="off",
        mode=mode,
        seed=seed,
        how=cli_run.Decoding(batch, kv_memory, speculate, drafter),
        allow_negative_alpha=allow_negative_alpha,
        trust_remote_code=trust_remote_code,
        code=cli_run.Code(allow_code_execution, "auto", None),
    )
    judging = cli_judge.Request(judge=judge, yes=yes, max_cost=max_cost, price=price, seed=seed)
    cli_sweep.sweep(cli_run.read_system(system, vocab), alphas, asked, judging, json_only=json)


def reproduce(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe in configs/recipes, table2 say.")],
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
    from proxytune.cli.commands import evaluate as cli_run
    from proxytune.cli.commands import judge as cli_judge
    from proxytune.cli.commands import reproduce as cli_reproduce
    from proxytune.paper.cost import Choice

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
