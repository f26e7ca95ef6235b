"""`proxytune lm-eval`: lm-eval's tasks with a system as the model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from proxytune.cli import console
from proxytune.cli.options import (
    DECODING,
    ENGINE,
    MODELS,
    Alpha,
    As,
    NegativeAlpha,
    RemoteCode,
    Vocab,
    grouped,
)
from proxytune.config import load_system
from proxytune.options import DecodeOptions, EngineOptions

LM_EVAL = "What lm-eval is asked"

System = Annotated[
    str,
    typer.Option(
        "--system",
        metavar="S",
        help="A system's name (`proxytune systems`) or a YAML file.",
        rich_help_panel=MODELS,
    ),
]
Tasks = Annotated[
    str,
    typer.Option(
        "--tasks",
        metavar="TASK,...",
        help="lm-eval's tasks (`lm-eval ls tasks`), or YAML files of your own.",
        rich_help_panel=LM_EVAL,
    ),
]
Out = Annotated[
    Path,
    typer.Option(
        help="Where results go: lm-eval's files to OUT/<system>/lm-eval, a run of each task beside them."
    ),
]


@grouped(decode=DECODING, engine=ENGINE)
def lm_eval(
    context: typer.Context,
    *,
    system: System = "demo",
    as_: As = "proxy",
    alpha: Alpha = None,
    allow_negative_alpha: NegativeAlpha = False,
    vocab: Vocab = None,
    trust_remote_code: RemoteCode = False,
    tasks: Tasks,
    decode: DecodeOptions,
    engine: EngineOptions,
    out: Out = Path("results"),
) -> None:
    """Run tasks of lm-eval with a system as the model.

    Every other option is lm-eval's own (`lm-eval run --help`): --limit, --num_fewshot, --apply_chat_template,
    --gen_kwargs, --include_path ... Needs the extra `lmeval`.

    Example: proxytune lm-eval --system demo --as proxy --tasks gsm8k --limit 20
    """
    engine.check()
    made = load_system(system)
    made.require_one_process("lm-eval")
    if as_ in ("base", "proxy"):
        made.local_base("lm-eval")

    from proxytune.integrations import LmEvalCall, run_lm_eval

    asked: dict[str, object] = {
        "role": as_,
        "alpha": alpha,
        "allow_negative_alpha": allow_negative_alpha,
        "vocab": vocab,
        "trust_remote_code": trust_remote_code,
        **decode.model_dump(exclude_defaults=True),
        **engine.model_dump(exclude_defaults=True),
    }
    settings = {name: value for name, value in asked.items() if value is not None and value is not False}
    results, runs = run_lm_eval(LmEvalCall(system, tasks, settings, tuple(context.args), out))
    console.say(f"lm-eval's files are in {results.parent}")
    for folder in runs:
        console.say(f"stored in {folder}")
