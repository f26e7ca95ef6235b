"""`proxytune sweep-alpha`: the proxy under many alphas at once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from proxytune.cli import console
from proxytune.cli.commands.evaluate import decoded_by, prepared, with_sampling
from proxytune.cli.options import (
    API_ASKING,
    CODE,
    DECODING,
    ENGINE,
    JUDGING,
    RAY,
    SAMPLING,
    SWEEP,
    Changes,
    Json,
    RemoteCode,
    SystemName,
    TaskName,
    Vocab,
    grouped,
)
from proxytune.options import (
    ApiOptions,
    CodeOptions,
    DecodeOptions,
    EngineOptions,
    JudgeOptions,
    RayOptions,
    RunOptions,
)

Alphas = Annotated[
    str,
    typer.Option(metavar="ALPHAS", help="FROM:TO:STEP, or a list of what --alpha takes: 0,0.5,first:4,1."),
]
SweepOut = Annotated[
    Path | None,
    typer.Option("--out", help="The sweep's folder. Default: results/<system>/<task>/proxy/sweep/."),
]


@grouped(
    run=SWEEP,
    sampling=SAMPLING,
    decode=DECODING,
    engine=ENGINE,
    ray=RAY,
    code=CODE,
    judge=JUDGING,
    api=API_ASKING,
)
def sweep_alpha(
    task: TaskName,
    alphas: Alphas,
    *,
    system: SystemName = "demo",
    vocab: Vocab = None,
    trust_remote_code: RemoteCode = False,
    run: RunOptions,
    sampling: Changes,
    decode: DecodeOptions,
    engine: EngineOptions,
    ray: RayOptions,
    code: CodeOptions,
    judge: JudgeOptions,
    api: ApiOptions,
    out: SweepOut = None,
    json: Json = False,
) -> None:
    """Evaluate the proxy under many alphas at once: models are loaded once, and the alphas of an example
    share its prompt. An interrupted sweep is continued by the same command.

    Example: proxytune sweep-alpha truthfulqa --system demo --alphas 0:2:0.2 --limit 100
    """
    from proxytune.tasks.own import read_task

    made = console.read_system(system, vocab)
    read_task(task, run.mode)  # an unknown task must not wait for torch
    made.require("proxy")

    from proxytune.runs import alpha_sweep

    schedules = alpha_sweep.parse_alphas(alphas)
    judge = judge.model_copy(update={"code": code, "seed": run.seed})
    models = console.models_of(made, trust_remote_code=trust_remote_code)
    asked = prepared(models, task, with_sampling(task, run, sampling), decode, judge, api)
    folder, _ = alpha_sweep.sweep(decoded_by(asked, engine, ray), schedules, out)

    from proxytune.analysis import sweeps
    from proxytune.cli.analysis_tables import sweep_table

    found = sweeps.sweep(folder)
    if json:
        console.print_json(found.model_dump(mode="json"))
        return
    sweep_table(found)
    console.show(f"stored in {folder}")
