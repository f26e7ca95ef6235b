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
from typer.core import TyperCommand, TyperGroup

from proxytune import __version__
from proxytune.cli.commands.analyze import analyze
from proxytune.cli.commands.recipes import reproduce, sweep_alpha
from proxytune.cli.options import (
    AllowCode,
    Alpha,
    As,
    AsOrAll,
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
    Out,
    Price,
    RemoteCode,
    SandboxName,
    Seed,
    Shots,
    ShotsFrom,
    Speculate,
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
    from proxytune.cli.commands import demo as cli_demo

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
    speculate: Speculate = "auto",
    drafter: Drafter = None,
    vocab: Vocab = None,
    allow_negative_alpha: Negative = False,
    trust_remote_code: RemoteCode = False,
    json: Json = False,
) -> None:
    """Stream a response.

    Example: proxytune generate $'Answer the following question.\\n\\nQuestion: Mukis has 26 nuts. Mukis buys
    2 more. How many nuts does Mukis have now?\\nAnswer:' --system demo --compare
    """
    from proxytune.cli.commands import evaluate as cli_run
    from proxytune.cli.commands import generate as cli_generate

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
        speculate=speculate,
        drafter=drafter,
        allow_negative_alpha=allow_negative_alpha,
        trust_remote_code=trust_remote_code,
    )
    cli_generate.generate(made, asked, compare=compare, json_only=json)


class TraceCommand(TyperCommand):
    """A command whose `--trace` may stand without its value, `tokens`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Say the value where it was left out."""
        said: list[str] = []
        for argument, after in zip(args, [*args[1:], ""], strict=True):
            said.append(argument)
            if argument == "--trace" and after not in ("tokens", "agreement"):
                said.append("tokens")
        return super().parse_args(ctx, said)


@app.command("eval", cls=TraceCommand)
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
    trace: Trace = None,
    seed: Seed = 0,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    batch: Batch = None,
    kv_memory: KvMemory = None,
    speculate: Speculate = "auto",
    drafter: Drafter = None,
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
    """Evaluate a system on a task, as one role or all of them. The same command continues a stopped run.

    Example: proxytune eval gsm --system demo --as all --limit 100
    """
    from proxytune.cli.commands import evaluate as cli_run
    from proxytune.cli.commands import judge as cli_judge

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
        trace=cli_run.read_trace(trace),
        mode=mode,
        seed=seed,
        how=cli_run.Decoding(batch, kv_memory, speculate, drafter),
        allow_negative_alpha=allow_negative_alpha,
        trust_remote_code=trust_remote_code,
        code=cli_run.Code(allow_code_execution, sandbox, code_python),
    )
    judging = cli_judge.Request(judge=judge, yes=yes, max_cost=max_cost, price=price, seed=seed)
    cli_judge.evaluate(cli_run.read_system(system, vocab), asked, judging, json_only=json)


app.command("sweep-alpha")(sweep_alpha)


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
    from proxytune.cli.commands import evaluate as cli_run
    from proxytune.cli.commands import show as cli_show

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
    from proxytune.cli.commands import evaluate as cli_run
    from proxytune.cli.commands import judge as cli_judge

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
    from proxytune.cli.commands import judge as cli_judge

    cli_judge.export(format_, run, out, json_only=json)


@app.command()
def report(
    results: Annotated[Path, typer.Argument(help="A folder of results.")] = Path("results"),
    html: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write one page that needs nothing else: tables, curves, tokens."),
    ] = None,
    figures: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write every figure as an SVG file into this folder.")
    ] = None,
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
    """The stored runs as tables (score, gap closed, memory and time per token of every role, and the paper's
    tables with our figures beside its own), or as a page with figures and a token-level view.

    Example: proxytune report results --html report.html
    """
    from proxytune.cli.commands import report_page as cli_report
    from proxytune.cli.commands import show as cli_show

    asked = cli_show.ReportRequest(
        markdown=markdown, write=write, examples=examples, show_hateful=show_hateful
    )
    if html is not None or figures is not None:
        cli_report.report(results, asked, html=html, figures=figures)
    else:
        cli_show.report(results, asked)


app.command()(reproduce)


@app.command()
def tasks(json: Json = False) -> None:
    """The tasks: what they measure, where their data comes from, and whether each can run here now.

    Example: proxytune tasks
    """
    from proxytune.cli.commands import tasks as cli_tasks

    cli_tasks.tasks(json_only=json)


@app.command()
def systems(json: Json = False) -> None:
    """The systems that ship with proxytune: their models and alpha.

    Example: proxytune systems --json
    """
    from proxytune.cli.commands import show as cli_show

    cli_show.systems(json_only=json)


app.add_typer(analyze, name="analyze")
