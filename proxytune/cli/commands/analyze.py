"""`proxytune analyze`: the paper's analyses of stored runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from proxytune.cli.options import Json

analyze = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="The paper's analyses of stored runs. They read runs and traces only and load no model.\n\n"
    "Example: proxytune analyze positions RUN, where RUN is a folder that `proxytune eval --trace` wrote",
)

TracedRun = Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a traced run of the proxy.")]
Csv = Annotated[bool, typer.Option("--csv", help="Print the table as CSV on stdout and nothing else.")]


@analyze.command()
def positions(run: TracedRun, json: Json = False, csv: Csv = False) -> None:
    """Influence by position: where the proxy's first choice is not the base's, and how far it shifts the
    chosen token's probability.

    Example: proxytune analyze positions results/demo/gsm/proxy/trace=tokens-1c9d8a58
    """
    from proxytune.cli import analysis_tables as analyze_tables

    analyze_tables.positions(run, json_only=json, csv_only=csv)


@analyze.command()
def ngrams(
    run: Annotated[
        Path,
        typer.Argument(
            metavar="RUN", help="The folder of a traced run, or with --words a file of predictions."
        ),
    ],
    min_count: Annotated[int, typer.Option(help="Only tokens that occur this often.", min=1)] = 100,
    top: Annotated[int, typer.Option(help="How many tokens.", min=1)] = 20,
    words: Annotated[
        str | None,
        typer.Option(help="Look these up in place of the most promoted: A,B,C, or paper (its twenty)."),
    ] = None,
    json: Json = False,
    csv: Csv = False,
) -> None:
    """The tokens that the proxy promotes most, each with its most common 4-gram by the paper's rule.

    Example: proxytune analyze ngrams results/demo/truthfulqa/proxy/trace=tokens-1c9d8a58 --min-count 50
    """
    from proxytune.cli import analysis_tables as analyze_tables

    analyze_tables.ngrams(run, min_count, top, words, json_only=json, csv_only=csv)


@analyze.command()
def equations(run: TracedRun, json: Json = False, csv: Csv = False) -> None:
    """Left against right of `=`: is it the reasoning or the arithmetic that the proxy changes? By the paper's
    rule and a corrected one, with Welch's t-test.

    Example: proxytune analyze equations results/demo/gsm/proxy/trace=tokens-1c9d8a58
    """
    from proxytune.cli import analysis_tables as analyze_tables

    analyze_tables.equations(run, json_only=json, csv_only=csv)


@analyze.command()
def skip(
    sweep: Annotated[
        Path, typer.Argument(metavar="SWEEP", help="The folder of a sweep over 0, first:1, first:4, ..., 1.")
    ],
    control: Annotated[
        Path | None,
        typer.Option(metavar="RUN", help="A run of the base whose opener was forced, on the same items."),
    ] = None,
    json: Json = False,
    csv: Csv = False,
) -> None:
    """Late skip: score, repetition and length when the correction ends after t tokens.

    Example: proxytune analyze skip results/demo/gsm/proxy/sweep
    """
    from proxytune.cli import analysis_tables as analyze_tables

    analyze_tables.skip(sweep, control, json_only=json, csv_only=csv)


@analyze.command()
def agreement(
    run: Annotated[
        Path,
        typer.Argument(metavar="RUN", help="A run of the proxy or the tuned model with --trace agreement."),
    ],
    json: Json = False,
    csv: Csv = False,
) -> None:
    """How near base and proxy are to the directly tuned model: divergence, and shared first choices.

    Example: proxytune analyze agreement results/demo/gsm/tuned/trace=agreement-5a0d2e1f
    """
    from proxytune.cli import analysis_tables as analyze_tables

    analyze_tables.agreement(run, json_only=json, csv_only=csv)


@analyze.command()
def failures(
    first: Annotated[
        Path, typer.Argument(metavar="RUN", help="The folder of a run, for example the base's.")
    ],
    second: Annotated[Path, typer.Argument(metavar="RUN", help="Another on the same items.")],
    metric: Annotated[str | None, typer.Option(help="The score that decides what is right.")] = None,
    show: Annotated[int, typer.Option(help="How many items to show of each kind.", min=0)] = 5,
    json: Json = False,
    csv: Csv = False,
) -> None:
    """Items that one run has right and the other wrong, with McNemar's test. --json and --csv list all.

    Example: proxytune analyze failures results/demo/gsm/base results/demo/gsm/proxy
    """
    from proxytune.cli import analysis_tables as analyze_tables

    analyze_tables.failures(first, second, metric, show, json_only=json, csv_only=csv)
