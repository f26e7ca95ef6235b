"""The arguments and options that commands share, each declared once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

TaskName = Annotated[str, typer.Argument(metavar="TASK", help="A task; `proxytune tasks` lists them.")]
SystemName = Annotated[
    str,
    typer.Option("--system", "-s", metavar="S", help="A system's name (`proxytune systems`) or a YAML file."),
]
As = Annotated[str, typer.Option("--as", help="base, expert, antiexpert, tuned or proxy.")]
AsOrAll = Annotated[str, typer.Option("--as", help="base, expert, antiexpert, tuned, proxy, or all of them.")]
Alpha = Annotated[
    str | None,
    typer.Option(help="0 to 10, or first:N, warmup:N, linear:FROM:TO:N. Default: the system's."),
]
Alphas = Annotated[
    str,
    typer.Option(metavar="ALPHAS", help="FROM:TO:STEP, or a list of what --alpha takes: 0,0.5,first:4,1."),
]
Negative = Annotated[
    bool,
    typer.Option(
        "--allow-negative-alpha", help="Allow alpha below 0: it undoes what the expert was tuned for."
    ),
]
Vocab = Annotated[
    str | None,
    typer.Option(help="strict (vocabularies must agree) or intersect (combine on the shared tokens)."),
]
RemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that comes with a checkpoint.")
]
MaxNewTokens = Annotated[int | None, typer.Option(help="Cut responses after this many tokens.")]
Temperature = Annotated[float | None, typer.Option(help="0 is greedy.")]
TopP = Annotated[
    float | None, typer.Option(help="Sample from the smallest set that has this probability; 1 is off.")
]
TopK = Annotated[int | None, typer.Option(help="Sample among the k most probable tokens; 0 is off.")]
Seed = Annotated[int, typer.Option(help="Of the sampling noise (and of the choice of few-shot items).")]
Batch = Annotated[
    int | None, typer.Option(help="At most this many rows at a time. Default: what memory allows.")
]
KvMemory = Annotated[
    str | None, typer.Option(help="Memory for the KV caches, e.g. 4GB. Default: what is free.")
]
Speculate = Annotated[
    str,
    typer.Option(
        metavar="auto|off|K",
        help="Let the expert draft tokens that the others verify together: by measurement, never, or K at a "
        "time. The tokens are the same.",
    ),
]
Drafter = Annotated[
    str | None,
    typer.Option(
        metavar="EXPERT|lookup",
        help="Which of several experts drafts: expert (default), expert2, ...; lookup: only what prompt and "
        "response have said before is a draft.",
    ),
]
Data = Annotated[
    str | None,
    typer.Option(
        metavar="FILE|hub|generated|plumbing",
        help="Where the items come from: a file, the hub, the demo world (generated), or items that only "
        "check that the task runs (plumbing). Default: the system's, or hub.",
    ),
]
Limit = Annotated[int | None, typer.Option(help="Only the first N items.")]
Shots = Annotated[int, typer.Option(help="Few-shot items before each question.")]
ShotsFrom = Annotated[str | None, typer.Option(metavar="FILE", help="Draw few-shot items from this file.")]
Out = Annotated[Path | None, typer.Option(help="The run's folder. Default: results/<system>/<task>/<as>/.")]
SweepOut = Annotated[
    Path | None, typer.Option(help="The sweep's folder. Default: results/<system>/<task>/proxy/sweep/.")
]
ModeName = Annotated[
    str, typer.Option(help="generate, or likelihood: compare given answers by their log-probabilities.")
]
Trace = Annotated[
    str | None,
    typer.Option(
        "--trace",
        metavar="[agreement]",
        help="Store every token's probability under each role; agreement: also how far base and proxy are "
        "from the tuned model.",
    ),
]
JudgeName = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL",
        help="Who judges the responses: default, none, a folder or hub id (MODEL#LABEL; TRUTH,INFO), or a "
        "model of the endpoint in OPENAI_BASE_URL.",
    ),
]
Yes = Annotated[bool, typer.Option("--yes", help="Agree to what a judge behind an API costs.")]
MaxCost = Annotated[
    float | None, typer.Option(help="Spend at most this many US dollars on the judge.", min=0)
]
Price = Annotated[
    str | None, typer.Option(metavar="IN,OUT", help="The judge's price in USD per million tokens.")
]
AllowCode = Annotated[
    bool,
    typer.Option("--allow-code-execution", help="Run model-written code (humaneval, ds1000), in a sandbox."),
]
SandboxName = Annotated[
    str,
    typer.Option("--sandbox", help="auto, bubblewrap, namespaces, or weak (a separate process with limits)."),
]
CodePython = Annotated[
    str | None,
    typer.Option(metavar="PYTHON", help="The interpreter that runs the code. Default: proxytune's own."),
]
Tests = Annotated[
    str | None,
    typer.Option("--data", metavar="FILE|hub", help="The items, with the tests to run code against."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")]
