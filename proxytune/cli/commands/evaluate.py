"""`proxytune eval`: one role of a system, or all of them, on a task."""

from __future__ import annotations

from dataclasses import replace
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, get_args

from typer.core import TyperCommand

from proxytune.cli import console
from proxytune.cli.options import (
    API_ASKING,
    CODE,
    DECODING,
    ENGINE,
    JUDGING,
    RAY,
    RUN,
    SAMPLING,
    AsOrAll,
    Changes,
    Json,
    Out,
    RemoteCode,
    SystemName,
    TaskName,
    Verbose,
    Vocab,
    build,
    grouped,
)
from proxytune.config import Sampling, TraceKind
from proxytune.errors import UserError
from proxytune.options import (
    ApiOptions,
    CodeOptions,
    DecodeOptions,
    EngineOptions,
    JudgeOptions,
    RayOptions,
    RunOptions,
)
from proxytune.records import Run

if TYPE_CHECKING:
    from proxytune.models import Models
    from proxytune.runs import evaluation


class EvalCommand(TyperCommand):
    """A command whose `--trace` and `--ray` may come without a value; they are `tokens` and `local` then."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Give the value where it was left out."""
        given: list[str] = []
        for argument, after in zip_longest(args, args[1:], fillvalue=""):
            given.append(argument)
            if argument == "--trace" and after not in get_args(TraceKind):
                given.append("tokens")
            if argument == "--ray" and not (":" in after or after in ("auto", "local")):
                given.append("local")
        return super().parse_args(ctx, given)


@grouped(
    run=RUN,
    sampling=SAMPLING,
    decode=DECODING,
    engine=ENGINE,
    ray=RAY,
    code=CODE,
    judge=JUDGING,
    api=API_ASKING,
)
def evaluate(
    task: TaskName,
    *,
    system: SystemName = "demo",
    as_: AsOrAll = "proxy",
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
    out: Out = None,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Evaluate a system on a task, as one role, several or all. The same command continues a stopped run.

    Example: proxytune eval gsm --system demo --as all --limit 100
    """
    from proxytune.tasks.own import read_task

    made = console.read_system(system, vocab)
    read_task(task, run.mode)  # an unknown task must not wait for torch
    roles = made.roles if as_ == "all" else tuple(made.require(role.strip()) for role in as_.split(","))

    judge = judge.model_copy(update={"code": code, "seed": run.seed})
    models = console.models_of(made, trust_remote_code=trust_remote_code)
    asked = prepared(models, task, with_sampling(task, run, sampling), decode, judge, api)
    asked = decoded_by(asked, engine, ray)
    if as_ == "all" or len(roles) > 1:
        print_all(list(asked.run_all(out, roles).values()), json_only=json, verbose=verbose)
        return
    one, folder = asked.run(roles[0], out)
    if json and not verbose:
        console.print_json({**in_short(one), "folder": str(folder)})
        return
    console.print_run(one, folder, json_only=json)


def with_sampling(task: str, run: RunOptions, changes: Changes) -> RunOptions:
    """The options with the sampling settings that were given in place of the task's."""
    from proxytune.tasks.own import read_task

    if not changes:
        return run
    settings = read_task(task, run.mode).sampling
    return run.model_copy(update={"sampling": build(Sampling, {**settings.model_dump(), **changes})})


def prepared(
    models: Models,
    task: str,
    run: RunOptions,
    decode: DecodeOptions,
    judge: JudgeOptions,
    api: ApiOptions,
) -> evaluation.Evaluation:
    """What a command evaluates, with its judge and its sandbox checked. Prints on stderr what is loaded,
    what judging costs, and whether code is run."""
    from proxytune.runs import evaluation
    from proxytune.tasks.own import read_task

    price = {"yes": judge.yes, "max_cost": judge.max_cost, "price": judge.price}
    own = api.model_copy(update=price)
    decode = decode.model_copy(update={"api": own})
    made = evaluation.Evaluation(models.system, task, run, decode, judge, console.dialogue(), models)
    made.check()
    if made.sandbox is not None:
        console.name_sandbox(made.sandbox)
    elif read_task(task, run.mode).execute is not None:
        console.say(f"note: {console.NOT_ALLOWED}")
    return made


def decoded_by(asked: evaluation.Evaluation, engine: EngineOptions, ray: RayOptions) -> evaluation.Evaluation:
    """The same evaluation, decoded by another engine or on workers where they were asked for. UserError for
    options that do not go together."""
    engine.check()
    if engine.engine == "own":
        return on_workers(asked, ray)
    if ray != RayOptions():
        raise UserError("--ray starts workers with proxytune's engine: leave it out with --engine vllm")
    if asked.options.trace != "off" or asked.options.defer is not None:
        raise UserError(
            "--engine vllm stores no --trace and defers to nobody: leave these out, or use --engine own"
        )
    from proxytune.integrations.vllm_plugin import vllm_decoder

    return replace(asked, open_decoder=vllm_decoder(asked.models, engine))


def on_workers(asked: evaluation.Evaluation, ray: RayOptions) -> evaluation.Evaluation:
    """The same evaluation, decoded on workers where they were asked for. UserError for options of workers
    without them."""
    if ray.ray is None:
        if ray != RayOptions():
            raise UserError("--workers and --gpus-per-worker are of --ray: add it, or leave them out")
        return asked
    if asked.system.endpoint is not None:
        raise UserError("--ray is for models that run here: a base behind an API is asked by one process")
    asked.system.require_one_process("--ray")

    from proxytune.scale import ray_decoder

    trusted = asked.models.trust_remote_code
    return replace(asked, open_decoder=ray_decoder(ray, trust_remote_code=trusted))


def in_short(run: Run) -> dict[str, object]:
    """What a run came to, as JSON under the names of run.json."""
    spec, parts = run.spec, {"status", "n", "headline", "metrics", "judge", "notes"}
    asked = {"system": spec.system.name, "task": spec.task, "as": spec.role, "alpha": spec.alpha.text}
    return {**asked, **run.model_dump(mode="json", include=parts)}


def print_all(runs: list[Run], *, json_only: bool, verbose: bool) -> None:
    """The roles of a system under each other, with the gap closed."""
    from proxytune.report import tables

    rows = tables.role_rows(runs)
    if json_only:
        gap = next((row.gap_closed for row in rows if row.role == "proxy"), None)
        named = {run.spec.role: run.model_dump(mode="json") if verbose else in_short(run) for run in runs}
        console.print_json({"task": runs[0].spec.task, "n": runs[0].n, "gap_closed": gap, "runs": named})
        return
    for own in tables.alike(rows):
        console.show_table(tables.rich_table(own))
