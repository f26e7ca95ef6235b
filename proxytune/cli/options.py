"""The options of the commands. What several commands share is declared once: single arguments here, groups in
the records of `options` and `config`, whose fields become options with their docstrings as help.

A command takes a whole record as a parameter, and `grouped` opens it into one option per field:

    @grouped(decode=DECODING)
    def generate(prompt: Prompt, decode: DecodeOptions) -> None: ...
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import typer
from pydantic import BaseModel, BeforeValidator, ValidationError
from pydantic.fields import FieldInfo
from rich.markup import escape

from proxytune.config import Sampling, system_names
from proxytune.errors import UserError
from proxytune.options import (
    ApiOptions,
    CodeOptions,
    DecodeOptions,
    EngineOptions,
    JudgeOptions,
    RayOptions,
    RunOptions,
    ServeOptions,
)
from proxytune.schema import explain

R = TypeVar("R", bound=BaseModel)

SIMPLE = (bool, int, float, str)
"""Types that the command line reads by itself; everything else is read as text by the record."""


@dataclass(frozen=True)
class OptionGroup:
    """The fields of a record as options under one heading."""

    record: type[BaseModel]
    title: str
    leave_out: frozenset[str] = frozenset()
    flags: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Field -> how it is written, where that is not its name."""
    defaults: Mapping[str, object] = field(default_factory=dict)
    """What this command has in place of the record's defaults."""
    changes: bool = False
    """Whether the command gets a mapping of what was given, and not a record: the rest has other defaults."""
    shows_defaults: bool = False
    """With `changes`: show the record's defaults, which hold unless something else was asked for."""

    @property
    def fields(self) -> dict[str, FieldInfo]:
        """The fields that are options."""
        return {n: info for n, info in self.record.model_fields.items() if n not in self.leave_out}

    def parameters(self) -> list[inspect.Parameter]:
        """The options as parameters of a Typer command."""
        return [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=self._default(name, info),
                annotation=Annotated[self._type(info), self._option(name, info)],
            )
            for name, info in self.fields.items()
        ]

    def made(self, values: Mapping[str, object]) -> Any:
        """The record of these values, or the mapping of those that were given; UserError that names the
        option that is wrong."""
        given = {name: value for name, value in values.items() if value is not None and value != []}
        return given if self.changes else build(self.record, given)

    def _default(self, name: str, info: FieldInfo) -> object:
        default = self.defaults.get(name, info.default)
        return None if self.changes or isinstance(default, tuple) else default

    def _type(self, info: FieldInfo) -> Any:
        """What Typer reads for a field; None beside it where nothing need be given."""
        read = (
            str if any(isinstance(m, BeforeValidator) for m in info.metadata) else _read_as(info.annotation)
        )
        return read if read is bool and not self.changes else read | None

    def _shown_default(self, info: FieldInfo) -> bool | str:
        """What the help says of a field that is not given."""
        shown = info.default not in (None, False, ()) and (self.shows_defaults or not self.changes)
        return str(info.default) if shown and self.changes else shown

    def _option(self, name: str, info: FieldInfo) -> Any:
        extra = info.json_schema_extra if isinstance(info.json_schema_extra, dict) else {}
        metavar = str(extra["metavar"]) if "metavar" in extra else None
        return typer.Option(
            *self.flags.get(name, (option_name(name),)),
            help=escape(" ".join((info.description or "").split())),
            metavar="TEXT" if self._type(info) == list[str] | None else metavar,
            rich_help_panel=self.title,
            show_default=self._shown_default(info),
        )


def option_name(name: str) -> str:
    """How the command line writes a field."""
    return f"--{name.replace('_', '-')}"


def _read_as(annotation: Any) -> Any:
    """The simple type in which the command line reads a value of this type."""
    if get_origin(annotation) is Annotated:
        return _read_as(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        kinds = {_read_as(kind) for kind in get_args(annotation) if kind is not NoneType}
        return kinds.pop() if len(kinds) == 1 else str
    if get_origin(annotation) is tuple and get_args(annotation)[1:] == (...,):
        return list[str]
    return str if get_origin(annotation) is Literal or annotation not in SIMPLE else annotation


def build(record: type[R], values: Mapping[str, object]) -> R:
    """The record of these values; UserError that names the option and the value that is wrong."""
    try:
        return record.model_validate(dict(values))
    except ValidationError as error:
        name, _, reason = explain(error).partition(": ")
        first = name.split(".")[0]
        raise UserError(f"{option_name(first)} {values.get(first)!r}: {reason}") from None


def grouped(**groups: OptionGroup) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Open the parameters of a command that are named here into the options of their group."""

    def opened(command: Callable[..., None]) -> Callable[..., None]:
        parameters: list[inspect.Parameter] = []
        for parameter in inspect.signature(command, eval_str=True).parameters.values():
            group = groups.get(parameter.name)
            alone = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)]
            parameters += alone if group is None else group.parameters()

        def run(**values: object) -> None:
            made = {
                name: group.made({option: values.pop(option) for option in group.fields})
                for name, group in groups.items()
            }
            command(**values, **made)

        run.__name__, run.__doc__, run.__module__ = command.__name__, command.__doc__, command.__module__
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return run

    return opened


Changes = Mapping[str, Any]
"""Sampling settings that were given; the task has its own for the rest."""

RUN = OptionGroup(RunOptions, "What is asked", leave_out=frozenset({"sampling", "forced"}))
SWEEP = OptionGroup(
    RunOptions, "What is asked", leave_out=frozenset({"sampling", "forced", "alpha", "trace", "defer"})
)
SAMPLING = OptionGroup(
    Sampling,
    "How tokens are chosen (default: as the task says)",
    leave_out=frozenset({"seed"}),
    flags={"n": ("-n",)},
    changes=True,
)
RESPONSE = OptionGroup(
    Sampling, "How tokens are chosen", flags={"n": ("-n",)}, defaults={"max_new_tokens": 256}
)
CONVERSATION = OptionGroup(
    Sampling, "How tokens are chosen", leave_out=frozenset({"n"}), defaults={"max_new_tokens": 512}
)
DECODING = OptionGroup(DecodeOptions, "How it is computed", leave_out=frozenset({"progress", "api"}))
ENGINE = OptionGroup(EngineOptions, "Which engine")
RAY = OptionGroup(RayOptions, "Decoding on workers")
JUDGING = OptionGroup(JudgeOptions, "Who judges", leave_out=frozenset({"seed", "batch", "code"}))
JUDGING_ALONE = OptionGroup(JudgeOptions, "Who judges", leave_out=frozenset({"code"}))
CONSENT = OptionGroup(JudgeOptions, "Who judges", leave_out=frozenset({"judge", "seed", "batch", "code"}))
PRICES = frozenset({"yes", "max_cost", "price"})
API = OptionGroup(ApiOptions, "A base behind an API")
API_ASKING = OptionGroup(ApiOptions, "A base behind an API", leave_out=PRICES)
"""Beside a judge's options, which have the same price and limit."""
SERVING = OptionGroup(ServeOptions, "Who may ask, and how much")
CODE = OptionGroup(CodeOptions, "Running model-written code")

MODELS = "Models"


def _tasks(incomplete: str) -> list[str]:
    from proxytune.tasks import TASKS

    return [name for name in TASKS if name.startswith(incomplete)]


def _systems(incomplete: str) -> list[str]:
    return [name for name in system_names() if name.startswith(incomplete)]


TaskName = Annotated[
    str,
    typer.Argument(
        metavar="TASK",
        help="A task (`proxytune tasks`), or a Python file of your own (`proxytune init task`).",
        autocompletion=_tasks,
    ),
]
SystemName = Annotated[
    str,
    typer.Option(
        "--system",
        "-s",
        metavar="S",
        help="A system's name (`proxytune systems`) or a YAML file.",
        autocompletion=_systems,
        rich_help_panel=MODELS,
    ),
]
SystemArgument = Annotated[
    str,
    typer.Argument(
        metavar="SYSTEM",
        help="A system's name (`proxytune systems`) or a YAML file.",
        autocompletion=_systems,
    ),
]
As = Annotated[
    str, typer.Option("--as", help="base, expert, antiexpert, tuned or proxy.", rich_help_panel=MODELS)
]
AsOrAll = Annotated[
    str,
    typer.Option(
        "--as",
        metavar="ROLE,...|all",
        help="base, expert, antiexpert, tuned or proxy; several of them (base,proxy), or all.",
        rich_help_panel=MODELS,
    ),
]
Alpha = Annotated[
    str | None,
    typer.Option(
        metavar="A",
        help="0 to 10, or first:N, warmup:N, linear:FROM:TO:N. Default: the system's.",
        rich_help_panel=MODELS,
    ),
]
NegativeAlpha = Annotated[
    bool,
    typer.Option(
        "--allow-negative-alpha",
        help="Allow alpha below 0: it undoes what the expert was tuned for.",
        rich_help_panel=MODELS,
    ),
]
Vocab = Annotated[
    str | None,
    typer.Option(
        help="strict (vocabularies must agree) or intersect (combine on the shared tokens).",
        rich_help_panel=MODELS,
    ),
]
RemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code", help="Run Python code that comes with a checkpoint.", rich_help_panel=MODELS
    ),
]
Out = Annotated[Path | None, typer.Option(help="The run's folder. Default: results/<system>/<task>/<as>/.")]
Tests = Annotated[
    str | None,
    typer.Option("--data", metavar="FILE|hub", help="The items, with the tests to run code against."),
]
Verbose = Annotated[
    bool, typer.Option("--verbose", help="With --json: all of run.json, with every setting and what it took.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")]
