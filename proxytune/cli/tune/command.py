"""`proxytune tune`: makes an expert, one command per method, and merges adapters into their models."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from proxytune.cli import console
from proxytune.cli.options import Json, OptionGroup, RemoteCode, build, grouped
from proxytune.errors import UserError, needs_extra
from proxytune.processes import is_first
from proxytune.training_record import SYSTEM, TRAINING, TrainingRecord
from proxytune.tuning import METHOD_HELP, TuneOptions, left_out

GIB = 2**30

tune = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Make an expert: tune a small model by one of five methods. Needs the extra `tune`.\n\n"
    "Example: proxytune tune lora --model demo://antiexpert --data gsm8k:generated --out my-expert",
)

Model = Annotated[
    str,
    typer.Option(
        metavar="MODEL", help="The small model: a folder, a hub id, or demo://NAME. It is the antiexpert."
    ),
]
Out = Annotated[
    Path, typer.Option(metavar="DIR", help="The expert's folder. The same command goes on in it.")
]
Settings = Annotated[
    str | None,
    typer.Option(
        "--settings", metavar="NAME|FILE", help="Take settings from configs/tune (gsm-lora), or a YAML."
    ),
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run", help="Print trainable parameters, data and memory by estimate, and train nothing."
    ),
]


def _command(method: str) -> Callable[..., None]:
    """The command of one method, with the settings that it has."""
    group = OptionGroup(
        TuneOptions, "How it is tuned", leave_out=left_out(method), changes=True, shows_defaults=True
    )

    @grouped(settings=group)
    def run(
        model: Model,
        *,
        out: Out,
        preset: Settings = None,
        settings: Mapping[str, Any],
        dry_run: DryRun = False,
        json: Json = False,
    ) -> None:
        needs_extra("proxytune tune", "trl", "tune")
        options = _options(method, preset, settings)

        from proxytune.tuning import plan

        job = plan(method, model, options)
        if dry_run:
            _print_estimate(job, json)
            return
        for note in job.notes:
            console.say(f"note: {note}")

        from proxytune.tuning import tune as train

        made = train(job, out)
        if is_first():
            _print_record(made, out, json)

    run.__doc__ = "\n\n".join(
        (
            METHOD_HELP[method],
            "The same command goes on after a kill, with the same weights at the end.",
            f"Example: proxytune tune {method} --model demo://antiexpert --data gsm8k:generated --out mine",
        )
    )
    return run


def _options(method: str, preset: str | None, given: Mapping[str, Any]) -> TuneOptions:
    """The settings of a preset with those that were given in their place."""
    from proxytune.tuning import read_settings

    start = {} if preset is None else read_settings(preset, method)
    return build(TuneOptions, {**start, **given})


for name in METHOD_HELP:
    tune.command(name)(_command(name))


@tune.command()
def merge(
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="The adapter's folder.")],
    *,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the merged model goes.")],
    model: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="The model that it was tuned on. Default: as training.json says."),
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="The dtype of the merged weights; auto is the model's own.")
    ] = "float32",
    trust_remote_code: RemoteCode = False,
) -> None:
    """Write a model with an adapter in its weights: an ordinary checkpoint that needs no adapter.

    Example: proxytune tune merge my-expert --out my-merged-expert
    """
    from proxytune.config import ModelSpec
    from proxytune.models import plain
    from proxytune.training_record import read_training

    record = read_training(Path(adapter))
    if model is None and record is None:
        raise UserError(f"no {TRAINING} in '{adapter}' says which model it is for: give --model MODEL")
    named = model if model is not None or record is None else record.antiexpert.model
    spec = build(ModelSpec, {"model": named, "adapter": adapter, "dtype": dtype})
    plain.merge(spec, out, trust_remote_code=trust_remote_code)
    if record is not None and record.antiexpert.quantization != "none":
        console.say("note: it was tuned on 4-bit weights; the merged model has the unquantised ones below it")
    console.show(f"merged into {out}")


@tune.command()
def shrink(
    model: Annotated[str, typer.Option(metavar="MODEL", help="The large model.")],
    *,
    layers: Annotated[int, typer.Option(help="How many of its layers are kept, evenly spread.", min=1)],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the small model goes.")],
) -> None:
    """Make a small model of a family that has none: a large one with layers left out. Heal it with
    `proxytune tune full --teacher MODEL`.

    Example: proxytune tune shrink --model demo://base --layers 2 --out small
    """
    from proxytune.tuning import without_layers

    console.show(f"{without_layers(model, layers, out):,} parameters in {out}")


def _print_estimate(job: Any, json: bool) -> None:
    """What --dry-run finds."""
    need, data = job.estimate, job.train
    found = {
        "method": job.method.name,
        "model": job.spec.model,
        "parameters": need.parameters,
        "trainable": need.trainable,
        "examples": len(data.ids),
        "held_out": len(job.held_out.ids),
        "tokens": data.tokens,
        "longest": data.longest,
        "learning_rate": job.learning_rate,
        "memory_bytes": round(need.bytes),
        "memory_parts": {name: round(size) for name, size in need.parts.items()},
        "notes": list(job.notes),
    }
    if json:
        console.print_json(found)
        return
    share = need.trainable / need.parameters
    console.show(
        f"{job.method.name} on {job.spec.model}: {need.trainable:,} of {need.parameters:,} parameters "
        f"are trained ({share:.1%})"
    )
    console.show(
        f"{len(data.ids):,} examples, {data.tokens:,} tokens, the longest has {data.longest:,}; "
        f"{len(job.held_out.ids):,} held out; learning rate {job.learning_rate:g}"
    )
    parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in need.parts.items())
    console.show(f"memory about {need.bytes / GIB:.2f} GiB by estimate: {parts}")
    for note in job.notes:
        console.show(f"note: {note}")


def _print_record(record: TrainingRecord, out: Path, json: bool) -> None:
    """What a training came to."""
    if json:
        console.print_json({**record.model_dump(mode="json", exclude={"curve"}), "folder": str(out)})
        return
    losses = [point.loss for point in record.curve if point.loss is not None]
    held = [point.held_out for point in record.curve if point.held_out is not None]
    console.show(
        f"{record.request.method}: {record.trainable:,} of {record.parameters:,} parameters, "
        f"{record.steps} steps, {record.tokens_seen:,} tokens in {record.seconds:.1f} s, "
        f"memory {record.peak_bytes / GIB:.2f} GiB"
    )
    console.show(
        f"loss {losses[0]:.4f} to {losses[-1]:.4f}" + (f", held out {min(held):.4f}" if held else "")
    )
    if record.best_step is not None:
        console.show(f"kept: the weights of step {record.best_step}")
    console.show(f'stored in {out}; try: proxytune generate "..." --system {out / SYSTEM} --compare')
