"""What a caller sets beside the system and the task: what a run asks, how it is computed, who judges it, and
whether code may be run. One frozen record per idea, the same in Python and on the command line: a field is
the argument, the option and its help text at once.

Nothing here imports torch."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import BeforeValidator, ConfigDict, Field, field_validator

from proxytune.config import AlphaSchedule, Mode, Sampling, TraceKind, parse_alpha
from proxytune.errors import UserError
from proxytune.schema import Record

LONGEST_DRAFT = 15
"""Drafts and the token before them are one query of the attention, of at most 16 tokens."""

_UNITS = {
    "": 1,
    "K": 10**3,
    "M": 10**6,
    "G": 10**9,
    "T": 10**12,
    "KI": 2**10,
    "MI": 2**20,
    "GI": 2**30,
    "TI": 2**40,
}


def parse_size(value: object) -> object:
    """`4GB`, `512 MiB` or a number of bytes -> bytes."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?", value.strip().upper())
    if match is None or match[2] not in _UNITS or not (found := int(float(match[1]) * _UNITS[match[2]])):
        raise ValueError("no amount of memory: write 4GB, 512MB or a number of bytes")
    return found


def parse_draft_length(value: object) -> object:
    """`auto`, `off` or a length, which may be written as text."""
    if value in ("auto", "off"):
        return value
    try:
        length = int(str(value))
    except ValueError:
        length = -1
    if not 0 <= length <= LONGEST_DRAFT:
        raise ValueError(f"give 'auto', 'off' or a length from 0 to {LONGEST_DRAFT}")
    return length


def parse_price(value: object) -> object:
    """`2,8` -> US dollars per million tokens, in and out."""
    if not isinstance(value, str):
        return value
    try:
        numbers = [float(part) for part in value.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) != 2 or not all(0 <= number < 1e6 for number in numbers):
        raise ValueError("must be two numbers: USD per million tokens, IN,OUT")
    return numbers[0], numbers[1]


def read_alpha(value: object) -> AlphaSchedule | None:
    """What `--alpha` takes -> a schedule."""
    return None if value is None else parse_alpha(value)


class Options(Record):
    """A record whose fields are options: their docstrings are the help texts."""

    model_config = ConfigDict(use_attribute_docstrings=True)


class RunOptions(Options):
    """What decides a run's outputs beside the system, the task and the role; None is the system's or the
    task's own."""

    alpha: Annotated[AlphaSchedule | float | str | None, BeforeValidator(read_alpha)] = None
    """0 to 10, or first:N, warmup:N, linear:FROM:TO:N. Default: the system's."""
    sampling: Sampling | None = None
    """How tokens are chosen. Default: the task's."""
    data: str | None = Field(default=None, json_schema_extra={"metavar": "FILE|hub|generated|plumbing"})
    """Where the items come from: a file, the hub, the demo world (generated), or smoke data that only checks
    that the task runs (plumbing). Default: the system's, or hub."""
    limit: int | None = None
    """Only the first N items."""
    shots: int = 0
    """Few-shot items before each question."""
    shots_from: str | None = Field(default=None, json_schema_extra={"metavar": "FILE"})
    """Draw few-shot items from this file."""
    mode: Mode = "generate"
    """generate; likelihood: compare given answers by their log-probabilities; choices: compare the letters of
    the choices by theirs."""
    defer: float | None = Field(default=None, gt=0.0, le=1.0, json_schema_extra={"metavar": "GAMMA"})
    """With a base behind an API: let it speak alone, many tokens per request, and the expert alone where the
    base's most probable token has less than GAMMA (0.3, say). Another distribution than proxy-tuning."""
    trace: TraceKind = Field(default="off", json_schema_extra={"metavar": "[tokens|agreement]"})
    """Store every token's probability under each role; agreement: also how far base and proxy are from the
    tuned model."""
    seed: int = 0
    """Of the sampling noise, and of the choice of few-shot items. (0 leaves the seed of `sampling`.)"""
    forced: str | None = None
    """Text with which every response is made to begin."""
    allow_negative_alpha: bool = False
    """Allow alpha below 0: it undoes what the expert was tuned for."""


class ApiOptions(Options):
    """What a base behind an API may cost, and how it is asked. Nothing here changes a token."""

    parallel: int = Field(default=16, ge=1, le=256)
    """With a base behind an API: so many requests at a time."""
    api_deadline: float = Field(default=120.0, gt=0, le=3600, allow_inf_nan=False)
    """Seconds for one request to it, from connecting to the last byte."""
    api_retries: int = Field(default=6, ge=0, le=100)
    """How often a request that failed is sent again."""
    yes: bool = False
    """Agree to what the API costs."""
    max_cost: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    """Spend at most this many US dollars on it."""
    price: Annotated[tuple[float, float] | None, BeforeValidator(parse_price)] = Field(
        default=None, json_schema_extra={"metavar": "IN,OUT"}
    )
    """Its price in USD per million tokens."""


class DecodeOptions(Options):
    """How decoding is computed. Nothing here changes a token."""

    batch: int | None = Field(default=None, ge=1)
    """At most this many sequences at a time. Default: what memory allows."""
    kv_memory: Annotated[int | None, BeforeValidator(parse_size)] = Field(default=None, ge=1)
    """Memory for the KV caches of all models, e.g. 4GB. Default: a share of what is free."""
    speculate: Annotated[Literal["auto", "off"] | int, BeforeValidator(parse_draft_length)] = Field(
        default="auto", json_schema_extra={"metavar": "auto|off|K"}
    )
    """Let the expert draft tokens that the others verify together: by measurement, never, or K at a time. The
    tokens are the same."""
    drafter: str | None = Field(default=None, json_schema_extra={"metavar": "EXPERT|lookup"})
    """Which of several experts drafts: expert (default), expert2, ...; lookup: what followed the same words
    earlier in prompt and response is the draft (prompt lookup)."""
    threads: int | None = Field(default=None, ge=1, le=1024)
    """CPU threads of torch. Default: torch's own choice, which OMP_NUM_THREADS changes."""
    progress: bool = True
    """Show on stderr how far a run is."""
    api: ApiOptions = ApiOptions()
    """How a base behind an API is asked, and what that may cost."""

    @property
    def draft_length(self) -> int | None:
        """`speculate` as a number: None is by measurement, 0 never."""
        return {"auto": None, "off": 0}[self.speculate] if isinstance(self.speculate, str) else self.speculate


class RayOptions(Options):
    """Workers on Ray, each with an engine of its own."""

    ray: str | None = Field(default=None, json_schema_extra={"metavar": "[ADDRESS]"})
    """Decode on workers of this Ray cluster (HOST:PORT, auto: the one that this machine belongs to); without
    an address, on one started here."""
    workers: int = Field(default=2, ge=1, le=4096)
    """Processes, each with all of the models."""
    gpus_per_worker: float = Field(default=0, ge=0, le=64)
    """GPUs of each."""


class EngineOptions(Options):
    """Which engine decodes, and over how many devices it splits a model."""

    engine: Literal["own", "vllm"] = "own"
    """own: proxytune's, the reference. vllm: for many requests at a time (docs/vllm.md; needs the extra
    `vllm`)."""
    tensor_parallel: int = Field(default=1, ge=1, le=64, json_schema_extra={"metavar": "N"})
    """Split every layer over N devices."""
    eager: bool = False
    """With vLLM: compile nothing. It starts a minute sooner and decodes more slowly."""

    def check(self) -> None:
        """UserError for options of vLLM without it."""
        if self.engine == "own" and self != EngineOptions():
            raise UserError("--tensor-parallel and --eager are of --engine vllm: add it, or leave them out")


class CodeOptions(Options):
    """Whether code that a model wrote may be run, and where."""

    allow_code_execution: bool = False
    """Run model-written code (humaneval, ds1000), in a sandbox."""
    sandbox: str = "auto"
    """auto, bubblewrap, namespaces, or weak (a separate process with limits)."""
    code_python: str | None = Field(default=None, json_schema_extra={"metavar": "PYTHON"})
    """The interpreter that runs the code. Default: proxytune's own."""


class JudgeOptions(Options):
    """Who judges responses, and what that may cost."""

    judge: str | None = Field(default=None, json_schema_extra={"metavar": "MODEL"})
    """Who judges the responses: default, none, a folder or hub id (MODEL#LABEL; TRUTH,INFO), or a model of
    the endpoint in OPENAI_BASE_URL."""
    yes: bool = False
    """Agree to what an API costs: a judge's, or the base's."""
    max_cost: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    """Spend at most this many US dollars on the API."""
    price: Annotated[tuple[float, float] | None, BeforeValidator(parse_price)] = Field(
        default=None, json_schema_extra={"metavar": "IN,OUT"}
    )
    """The API's price in USD per million tokens."""
    seed: int = 0
    """Of the order in which two outputs are shown."""
    batch: int | None = Field(default=None, ge=1)
    """At most this many rows at a time, for a judge that runs here."""
    code: CodeOptions = CodeOptions()
    """For tasks that are scored by running code."""

    @field_validator("judge")
    @classmethod
    def _named(cls, value: str | None) -> str | None:
        if value is not None and not value.strip():
            raise ValueError("name a model, or none")
        return value


class ServeOptions(Options):
    """Where a server listens, who may ask, and how much at a time."""

    host: str = "127.0.0.1"
    """The address to listen on: only this machine can reach 127.0.0.1."""
    port: int = Field(default=8000, ge=0, le=65535)
    """The port; 0 takes a free one."""
    roles: str | None = Field(default=None, json_schema_extra={"metavar": "ROLE,..."})
    """The roles that can be asked, each as a model of its own. Default: all of the system."""
    api_key_file: str | None = Field(default=None, json_schema_extra={"metavar": "FILE"})
    """A file with the key that requests must bring. Default: PROXYTUNE_API_KEY, or no key."""
    max_waiting: int = Field(default=256, ge=0)
    """Responses that may wait for room in the batch; further requests get 429."""
    max_choices: int = Field(default=128, ge=1)
    """Responses that one request may ask for: prompts times n."""
    max_body: Annotated[int, BeforeValidator(parse_size)] = Field(default=4_000_000, ge=1)
    """Largest body of a request, e.g. 4MB."""
    max_stops: int = Field(default=16, ge=1)
    """Stop strings of a request."""
    stalled_seconds: float = Field(default=60.0, gt=0, allow_inf_nan=False)
    """A client that takes nothing for so long is cut off."""
    shutdown_seconds: float = Field(default=30.0, ge=0, allow_inf_nan=False)
    """On SIGTERM, responses under way may go on for so long."""
