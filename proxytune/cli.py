"""The command line: what a user can type. Bodies live in cli_run, cli_demo, cli_generate and cli_show and are
imported when a command runs, so that `--help` is instant.

A UserError is one line on stderr and exit code 2, an interruption one line and 130; every other exception is
a bug and keeps its traceback (exit code 1).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from proxytune import __version__
from proxytune.cli_options import (
    AllowCode,
    Alpha,
    As,
    AsOrAll,
    Batch,
    CodePython,
    Data,
    Json,
    JudgeName,
    KvMemory,
    Limit,
    MaxCost,
    MaxNewTokens,
    ModeName,
    Negative,
    Out,
    Price,
    RemoteCode,
    SandboxName,
    Seed,
    Shots,
    ShotsFrom,
    SystemName,
    TaskName,
    Temperature,
    Tests,
    TopK,
    TopP,
    Trace,
    Vocab,
    Yes,
)
from proxytune.errors import UserError


class Commands(TyperGroup):
    """The group of all commands, which turns errors into exit codes."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command; see the module's docstring for what becomes of errors."""
        try:
            return super().invoke(ctx)
        except UserError as error:
            _say(f"error: {error}")
            raise typer.Exit(2) from None
        except KeyboardInterrupt as error:
            _say(str(error) or "interrupted")
            raise typer.Exit(130) from None


def _say(line: str) -> None:
    """One line on stderr."""
    print(" ".join(line.split()), file=sys.stderr, flush=True)


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Proxy-tuning: logits = base + alpha * (expert - antiexpert), decoded, evaluated and explained.\n\n"
    "Begin with: proxytune demo",
)


def _version(asked: bool) -> None:
    if asked:
        print(f"proxytune {__version__}")
        raise typer.Exit


@app.callback()
def _proxytune(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    pass


@app.command()
def demo(
    limit: Annotated[
        int | None,
        typer.Option(help="Questions per task, at most. Default: 500, of toxigen 200, of humaneval 40."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Keep the runs in this folder of results.")] = None,
    json: Json = False,
) -> None:
    """The main job on the embedded demo system: how much of the gap to the directly tuned model the proxy
    closes.

    Functions that the models write are run in a sandbox; without one, humaneval is left out. Writes nothing
    unless --out is given.

    Example: proxytune demo --limit 50
    """
    from proxytune import cli_demo

    cli_demo.demo(limit=limit, out=out, json_only=json)


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The prompt, or - for stdin.")],
    system: SystemName = "demo",
    as_: As = "proxy",
    alpha: Alpha = None,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    seed: Seed = 0,
    n: Annotated[int, typer.Option("-n", help="Responses.", min=1)] = 1,
    stop: Annotated[list[str] | None, typer.Option(help="End before this string (can be repeated).")] = None,
    compare: Annotated[
        bool,
        typer.Option(
            "--compare", help="All roles side by side; the tokens that the proxy changed are marked."
        ),
    ] = False,
    batch: Batch = None,
    kv_memory: KvMemory = None,
    vocab: Vocab = None,
    allow_negative_alpha: Negative = False,
    trust_remote_code: RemoteCode = False,
    json: Json = False,
) -> None:
    """Stream a response.

    Example: proxytune generate $'Answer the following question.\\n\\nQuestion: Mukis has 26 nuts. Mukis buys
    2 more. How many nuts does Mukis have now?\\nAnswer:' --system demo --compare
    """
    from proxytune import cli_generate, cli_run

    made = cli_run.read_system(system, vocab)
    sampling = cli_run.sampling_from(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        n=n,
        stop=tuple(stop or ()),
    )
    asked = cli_generate.Request(
        prompt,
        as_,
        alpha,
        sampling,
        batch=batch,
        kv_memory=None if kv_memory is None else cli_run.parse_size(kv_memory),
        allow_negative_alpha=allow_negative_alpha,
        trust_remote_code=trust_remote_code,
    )
    cli_generate.generate(made, asked, compare=compare, json_only=json)


@app.command("eval")
def evaluate(
    task: TaskName,
    system: SystemName = "demo",
    as_: AsOrAll = "proxy",
    alpha: Alpha = None,
    data: Data = None,
    limit: Limit = None,
    shots: Shots = 0,
    shots_from: ShotsFrom = None,
    out: Out = None,
    mode: ModeName = "generate",
    trace: Trace = False,
    seed: Seed = 0,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    batch: Batch = None,
    kv_memory: KvMemory = None,
    vocab: Vocab = None,
    allow_negative_alpha: Negative = False,
    trust_remote_code: RemoteCode = False,
    allow_code_execution: AllowCode = False,
    sandbox: SandboxName = "auto",
    code_python: CodePython = None,
    judge: JudgeName = None,
    yes: Yes = False,
    max_cost: MaxCost = None,
    price: Price = None,
    json: Json = False,
) -> None:
    """Evaluate a system on a task, as one role or as all of them. An interrupted run is continued by the same
    command.

    Example: proxytune eval gsm --system demo --as all --limit 100
    """
    from proxytune import cli_judge, cli_run

    changed = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "top_k": top_k}
    asked = cli_run.Request(
        task=task,
        as_=as_,
        alpha=alpha,
        changed={name: value for name, value in changed.items() if value is not None},
        data=data,
        limit=limit,
        shots=shots,
        shots_from=shots_from,
        out=out,
        trace=trace,
        mode=mode,
        seed=seed,
        batch=batch,
        kv_memory=kv_memory,
        allow_negative_alpha=allow_negative_alpha,
        trust_remote_code=trust_remote_code,
        code=cli_run.Code(allow_code_execution, sandbox, code_python),
    )
    judging = cli_judge.Request(judge=judge, yes=yes, max_cost=max_cost, price=price, seed=seed)
    cli_judge.evaluate(cli_run.read_system(system, vocab), asked, judging, json_only=json)


@app.command()
def score(
    task: TaskName,
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="Stored predictions (.jsonl, .json, .gz), or their folder.")
    ],
    allow_code_execution: AllowCode = False,
    sandbox: SandboxName = "auto",
    code_python: CodePython = None,
    data: Tests = None,
    json: Json = False,
) -> None:
    """Score stored predictions again, from their texts: ours, or the files that the paper's repository
    published.

    Example: proxytune score gsm results/demo/gsm/proxy/predictions.jsonl
    """
    from proxytune import cli_run, cli_show

    code = cli_run.Code(allow_code_execution, sandbox, code_python)
    cli_show.score(task, file, code, data, json_only=json)


@app.command("judge")
def judge_run(
    task: TaskName,
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a finished run.")],
    judge: JudgeName = None,
    yes: Yes = False,
    max_cost: MaxCost = None,
    price: Price = None,
    seed: Annotated[int, typer.Option(help="Of the order in which two outputs are shown.")] = 0,
    batch: Batch = None,
    allow_code_execution: AllowCode = False,
    sandbox: SandboxName = "auto",
    code_python: CodePython = None,
    data: Tests = None,
    json: Json = False,
) -> None:
    """Judge the responses of a finished run, or run the code that they hold. Judgements that cost money are
    cached: asking twice costs once.

    Example: proxytune judge toxigen results/llama2-13b/toxigen/proxy --judge tomh/toxigen_roberta
    """
    from proxytune import cli_judge, cli_run

    asked = cli_judge.Request(
        judge=judge or "default", yes=yes, max_cost=max_cost, price=price, seed=seed, batch=batch
    )
    code = cli_run.Code(allow_code_execution, sandbox, code_python)
    cli_judge.judge(task, run, asked, code, data, json_only=json)


@app.command()
def export(
    format_: Annotated[str, typer.Argument(metavar="FORMAT", help="alpaca_eval.")],
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a finished run.")],
    out: Annotated[Path | None, typer.Option(help="The folder to write to. Default: the run's.")] = None,
    json: Json = False,
) -> None:
    """Write a run in the files of another tool: alpaca_eval's model_outputs.json and reference_outputs.json.

    Example: proxytune export alpaca_eval results/llama2-13b/alpaca_farm/proxy
    """
    from proxytune import cli_judge

    cli_judge.export(format_, run, out, json_only=json)


@app.command()
def report(
    results: Annotated[Path, typer.Argument(help="A folder of results.")] = Path("results"),
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown instead of tables.")] = False,
    write: Annotated[
        bool,
        typer.Option(
            "--write", help="Write RESULTS/README.md, and the table in README.md where it has a place for it."
        ),
    ] = False,
    examples: Annotated[
        int, typer.Option(help="Also what each role said to the first N examples of every task.", min=0)
    ] = 0,
    show_hateful: Annotated[
        bool, typer.Option("--show-hateful", help="Show ToxiGen's texts, which are hidden otherwise.")
    ] = False,
) -> None:
    """The stored runs as tables: score, gap closed, memory and time per token of every role, and the paper's
    tables with our figures beside its own.

    Example: proxytune report results --markdown
    """
    from proxytune import cli_show

    asked = cli_show.ReportRequest(
        markdown=markdown, write=write, examples=examples, show_hateful=show_hateful
    )
    cli_show.report(results, asked)


@app.command()
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


@app.command()
def tasks(json: Json = False) -> None:
    """The tasks: what they measure, where their data comes from, and whether each can run here now.

    Example: proxytune tasks
    """
    from proxytune import cli_tasks

    cli_tasks.tasks(json_only=json)


@app.command()
def systems(json: Json = False) -> None:
    """The systems that ship with proxytune: their models and alpha.

    Example: proxytune systems --json
    """
    from proxytune import cli_show

    cli_show.systems(json_only=json)
