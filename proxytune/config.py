"""What a user can set, declared once: a field is the YAML key, the help text and the entry in run.json.

Unknown keys are errors everywhere. Nothing here imports torch."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PlainSerializer,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)

from proxytune.api_spec import ApiSpec
from proxytune.errors import UserError, did_you_mean
from proxytune.processes import TENSOR
from proxytune.schema import Record, explain, mark
from proxytune.yaml_files import read_yaml

Role = Literal["base", "antiexpert", "expert", "proxy", "tuned"]
ROLES: tuple[Role, ...] = get_args(Role)
"""In the order in which they are evaluated and shown: the second large model comes last."""
Chat = Literal["none", "llama2", "tokenizer"]
DType = Literal["float64", "float32", "bfloat16", "float16", "auto"]
TraceKind = Literal["off", "tokens", "agreement"]
"""tokens: each role's probability and first choice. agreement: also how far base and proxy are from tuned."""
Mode = Literal["generate", "likelihood", "choices"]

SMOKE = "plumbing"
"""The data source of smoke data: its items only check that a task runs. They measure no model."""
SOURCES = ("generated", SMOKE, "hub")
"""Where items come from that are in no file."""
MAX_ALPHA = 10.0
MIN_TEMPERATURE = 1e-3
"""Lowest temperature above 0: below it logits overflow, and sampling is greedy anyway."""


DEMO_SCHEME = "demo://"
"""How the model of a spec begins that ships with proxytune."""


class AlphaSchedule(Record):
    """The strength of the expert-minus-antiexpert shift at each position of the response.

    Written as a number (`0.5`) or `first:N[:A]` (A for the first N tokens, then 0), `warmup:N[:A]` (0 for N
    tokens, then A), `linear:FROM:TO:N` (from FROM to TO over N tokens, then TO). A is 1 unless given."""

    kind: Literal["constant", "first", "warmup", "linear"] = "constant"
    start: float = 1.0
    """Alpha at position 0."""
    end: float = 1.0
    """Alpha from position `length` on."""
    length: int = Field(default=0, ge=0)
    """How many response tokens the first part lasts."""

    def at(self, position: int) -> float:
        """Alpha for the response token at `position` (0 is the first)."""
        if position >= self.length:
            return self.end
        if self.kind == "linear":
            return self.start + (self.end - self.start) * position / self.length
        return self.start

    @property
    def text(self) -> str:
        """The form that `parse_alpha` reads back."""
        start, end = (repr(value).removesuffix(".0") for value in (self.start, self.end))
        match self.kind:
            case "constant":
                return end
            case "first":
                return f"first:{self.length}" + ("" if self.start == 1 else f":{start}")
            case "warmup":
                return f"warmup:{self.length}" + ("" if self.end == 1 else f":{end}")
            case "linear":
                return f"linear:{start}:{end}:{self.length}"

    def check(self, *, allow_negative: bool = False) -> AlphaSchedule:
        """Raise UserError unless every alpha is finite and within bounds.

        A negative alpha undoes what the expert was tuned for (for example its safety tuning). So it has to be
        asked for.
        """
        for value in (self.start, self.end):
            if not math.isfinite(value) or abs(value) > MAX_ALPHA:
                raise UserError(
                    f"alpha = {value:g} is out of range: it must be a finite number from 0 to {MAX_ALPHA:g}"
                )
            if value < 0 and not allow_negative:
                raise UserError(
                    f"alpha = {value:g} is negative: it would undo what the expert was tuned for. "
                    "If that is what you want, add --allow-negative-alpha"
                )
        return self


def parse_alpha(value: object) -> AlphaSchedule:
    """`0.5`, `"first:16"`, `"warmup:100"`, `"linear:0:1:200"` or a schedule itself -> AlphaSchedule
    (UserError if not)."""
    if isinstance(value, AlphaSchedule):
        return value
    kind, *parts = str(value).split(":")
    try:
        match kind, parts:
            case "first", [n, *a] if len(a) < 2:
                return AlphaSchedule(kind="first", length=int(n), start=float(a[0]) if a else 1.0, end=0.0)
            case "warmup", [n, *a] if len(a) < 2:
                return AlphaSchedule(kind="warmup", length=int(n), start=0.0, end=float(a[0]) if a else 1.0)
            case "linear", [start, end, n]:
                return AlphaSchedule(kind="linear", start=float(start), end=float(end), length=int(n))
            case number, []:
                return AlphaSchedule(start=float(number), end=float(number))
    except (ValueError, UserError):
        pass
    raise UserError(
        f"alpha '{value}' is not a number from 0 to {MAX_ALPHA:g}, first:N, warmup:N or linear:FROM:TO:N"
    )


Alpha = Annotated[
    AlphaSchedule,
    BeforeValidator(parse_alpha),
    PlainSerializer(lambda schedule: schedule.text, return_type=str),
]


class Sampling(Record):
    """How the next token is chosen, and when a response ends. The docstrings are the command line's help."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    max_new_tokens: int = Field(default=512, ge=1)
    """A response is cut after this many tokens (finish_reason `length`)."""
    min_new_tokens: int = Field(default=0, ge=0)
    """End-of-sequence is banned before this many tokens."""
    temperature: float = Field(default=0.0, ge=0.0, le=100.0, allow_inf_nan=False)
    """0 is greedy: the first of the largest logits."""
    top_k: int = Field(default=0, ge=0)
    """Sample among the k most probable tokens only; 0 is off."""
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    """Sample from the smallest set of tokens whose probability reaches this; 1 is off."""
    min_p: float = Field(default=0.0, ge=0.0, le=1.0)
    """Sample among the tokens that are at least this times as probable as the most probable one; 0 is off."""
    n: int = Field(default=1, ge=1)
    """Responses per prompt; the prompt is computed once for all of them."""
    seed: int = 0
    """Together with the example's id, the sample and the position it decides the noise; batch and order do
    not."""
    stop: tuple[str, ...] = ()
    """A response ends before the first of these strings, however it is tokenised (finish_reason `stop`)."""
    ban: tuple[str, ...] = ()
    """Strings whose single-token forms (with and without a leading space) are never generated."""
    ban_first: tuple[str, ...] = ()
    """The same, for the first token of the response only."""

    @property
    def cuts(self) -> bool:
        """Whether anything beside the temperature limits which tokens can be drawn."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0

    @field_validator("temperature")
    @classmethod
    def _zero_or_not(cls, value: float) -> float:
        if 0 < value < MIN_TEMPERATURE:
            raise ValueError(f"{value:g} is below {MIN_TEMPERATURE:g}: use 0 for greedy decoding")
        return value

    @field_validator("stop", "ban", "ban_first")
    @classmethod
    def _no_empty_text(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if "" in value:
            raise ValueError("an empty string would match everywhere")
        return value


class ModelSpec(Record):
    """One model: where it is and how it is loaded."""

    model: str | None = None
    """A folder, a hub id, or demo://NAME for a model that ships with proxytune."""
    adapter: str | None = None
    """A PEFT folder (LoRA or prompt tuning). Without `model` it sits on the antiexpert and shares its
    weights."""
    dtype: DType = "auto"
    """The dtype of the weights; auto is the checkpoint's own."""
    device_map: str | dict[str, int | str] | None = None
    """Where the layers go: auto, cpu, cuda:1 or a map as in accelerate; none is the first GPU, or the CPU.
    tensor: every layer split over the processes of torchrun."""
    quantization: Literal["none", "int8", "int4", "8bit", "4bit"] = "none"
    """Load the weights quantised: int8 and int4 (weights of the linear layers; int4 on a CPU only), or 8bit
    and 4bit by bitsandbytes. On a CPU they are fast with bfloat16 activations."""
    chat: Chat = "none"
    """The prompt format: none (plain text), llama2 (the paper's), tokenizer (the chat template in the
    checkpoint)."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    trust_remote_code: bool = False
    """Run Python code that comes with the checkpoint. Off: only code in transformers is run."""

    @model_validator(mode="after")
    def _something_to_load(self) -> ModelSpec:
        if self.model is None and self.adapter is None:
            raise ValueError("a model needs `model: DIR or hub id`, or `adapter: DIR` on the antiexpert")
        return self


class ExpertSpec(ModelSpec):
    """One of several experts: logits = base + alpha * sum_i weight_i * (expert_i - antiexpert_i)."""

    weight: float = Field(default=1.0, allow_inf_nan=False)
    antiexpert: ModelSpec | None = None
    """This expert's own antiexpert; the system's unless given."""


def _kind_of_base(value: object) -> str:
    """Which record a base is read as."""
    behind = "api" in value if isinstance(value, Mapping) else isinstance(value, ApiSpec)
    return mark(ApiSpec if behind else ModelSpec)


Base = Annotated[
    Annotated[ModelSpec, Tag(mark(ModelSpec))] | Annotated[ApiSpec, Tag(mark(ApiSpec))],
    Discriminator(_kind_of_base),
]


class System(Record):
    """The models of all roles and alpha."""

    name: str = "custom"
    description: str = ""
    base: Base
    """The large model that is steered: its weights, or the endpoint that it is behind."""
    expert: ModelSpec | None = None
    """The small tuned model."""
    experts: tuple[ExpertSpec, ...] = ()
    """Several weighted experts in place of one."""
    antiexpert: ModelSpec | None = None
    """The small model before its tuning."""
    tuned: ModelSpec | None = None
    """The directly tuned large model, the ceiling."""
    alpha: Alpha = AlphaSchedule()
    """Strength of the shift, a number or a schedule over response positions."""
    vocab: Literal["strict", "intersect"] = "strict"
    """strict: vocabularies must agree token by token. intersect: combine on the shared tokens only."""
    data: dict[str, str] = Field(default_factory=dict)
    """Where a task's items come from by default: `generated` (the demo world), `plumbing` (smoke data, which
    only checks that the task runs), `hub`, or a file. A recipe (`proxytune reproduce`) asks a system that
    names its own data only what it names."""
    judges: dict[str, str] = Field(default_factory=dict)
    """Who judges a task's responses by default: a model as for --judge, or `none`. Else the task's own."""

    @model_validator(mode="after")
    def _one_way_to_name_experts(self) -> System:
        if self.expert is not None and self.experts:
            raise ValueError("give either `expert` or `experts`, not both")
        return self

    def __repr__(self) -> str:
        return f"System({self.name}: {', '.join(self.roles)})"

    @property
    def expert_specs(self) -> tuple[ExpertSpec, ...]:
        """The experts with their weights, whichever way they were named."""
        if self.expert is not None:
            return (ExpertSpec(**self.expert.model_dump()),)
        return self.experts

    @property
    def endpoint(self) -> ApiSpec | None:
        """Where the base is behind an API; None where its weights are here."""
        return self.base if isinstance(self.base, ApiSpec) else None

    def local_base(self, what: str = "this") -> ModelSpec:
        """The base's spec. UserError where it is behind an API: `what` needs its weights."""
        if isinstance(self.base, ApiSpec):
            raise UserError(
                f"the base of system '{self.name}' is behind an API ({self.base}), and {what} needs its "
                "weights: eval, sweep-alpha, generate and check work with it (docs/black-box.md)"
            )
        return self.base

    def require_one_process(self, what: str) -> None:
        """UserError where a model is split over the processes of torchrun: all of them would have to hear of
        what `what` is asked."""
        specs = [self.base, *self.expert_specs, self.antiexpert, self.tuned]
        if any(isinstance(spec, ModelSpec) and spec.device_map == TENSOR for spec in specs):
            raise UserError(
                f"system '{self.name}' has `device_map: {TENSOR}`, which {what} cannot use: eval, "
                "sweep-alpha and generate can (docs/scale.md)"
            )

    @property
    def roles(self) -> tuple[Role, ...]:
        """The roles that this system can be evaluated as."""
        have = {
            "base": True,
            "expert": bool(self.expert_specs),
            "antiexpert": self.antiexpert is not None,
            "tuned": self.tuned is not None,
            "proxy": bool(self.expert_specs)
            and all(e.antiexpert or self.antiexpert for e in self.expert_specs),
        }
        return tuple(role for role in ROLES if have[role])

    def require(self, role: str) -> Role:
        """`role` as a Role, or a UserError with the roles that the system has."""
        if role not in ROLES:
            raise did_you_mean("role", role, ROLES)
        if role not in self.roles:
            raise UserError(f"system '{self.name}' cannot run as '{role}': it has {', '.join(self.roles)}")
        return role

    def require_agreement(self, role: Role) -> None:
        """UserError unless agreement with direct tuning can be traced on the outputs of `role`."""
        self.local_base("--trace agreement")
        if role not in ("proxy", "tuned"):
            raise UserError(f"--trace agreement is of --as proxy or --as tuned, not of '{role}'")
        for needed in ("tuned", "proxy"):
            self.require(needed)


class RunSpec(Record):
    """Everything that decides a run's outputs. Two runs with equal specs are the same run; resume relies on
    it."""

    task: str
    system: System
    role: Role = "proxy"
    alpha: Alpha
    sampling: Sampling
    data: str
    """generated, plumbing, hub or the file's name (its content is in `data_sha256`)."""
    data_sha256: str
    limit: int | None = None
    shots: int = 0
    trace: TraceKind = "off"
    mode: Mode = "generate"
    """generate: responses are scored. likelihood: given texts are compared by their log-probabilities.
    choices: the letters of the choices are."""
    defer: float | None = None
    """Where the base's most probable token has less than this, the expert alone speaks: another distribution
    than proxy-tuning. None is proxy-tuning."""
    forced: str | None = None
    """Text with which every response is made to begin (the demo's control)."""

    @property
    def remark(self) -> str | None:
        """What is shown beside the figures, wherever they are shown; None for ordinary runs."""
        said = ["smoke data"] if self.data == SMOKE else []
        said += [] if self.defer is None else [f"deferral below {self.defer:g}, not proxy-tuning"]
        return ", ".join(said) or None


def cache_folder() -> Path:
    """Where what can be made again is kept: PROXYTUNE_CACHE, or proxytune in the user's cache folder."""
    own = os.environ.get("PROXYTUNE_CACHE")
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(own) if own else root / "proxytune"


def shipped(relative: str) -> Path:
    """A file or folder that ships with proxytune: inside the installed package, or at the root of the
    checkout."""
    package = Path(__file__).parent
    inside = package / relative
    return inside if inside.exists() else package.parent / relative


def system_names() -> list[str]:
    """The systems in configs/systems."""
    return sorted(path.stem for path in shipped("configs/systems").glob("*.yaml"))


def load_system(name_or_path: str | Path) -> System:
    """The system of that name in configs/systems, or of that YAML file."""
    path = Path(name_or_path)
    if path.suffix not in {".yaml", ".yml"}:
        if str(name_or_path) not in system_names():
            error = did_you_mean("system", str(name_or_path), system_names())
            raise UserError(f"{error}. Or give the path of a .yaml file")
        path = shipped("configs/systems") / f"{name_or_path}.yaml"
        return parse_system(read_yaml(path), path, Path.cwd())
    return parse_system(read_yaml(path), path, path.parent)


def as_system(system: System | str | Path) -> System:
    """A System, or the one that a name or a path names; what is neither is a UserError."""
    if isinstance(system, System):
        return system
    if not isinstance(system, str | Path):
        raise UserError(f"{system!r:.80} is no system: give a System, a name or the path of a YAML file")
    return load_system(system)


def parse_system(content: Mapping[str, Any], path: Path, folder: Path) -> System:
    """A System from the YAML mapping of `path`. Model folders that begin with ./ or ../ are taken from
    `folder`: that of the YAML file, or the current one for a system that ships with proxytune."""
    raw = {"name": path.stem, **content}
    for role in ("base", "expert", "antiexpert", "tuned"):
        if isinstance(raw.get(role), Mapping):
            raw[role] = _beside(raw[role], folder)
    if isinstance(raw.get("experts"), list):
        raw["experts"] = [_beside(e, folder) if isinstance(e, Mapping) else e for e in raw["experts"]]
    try:
        return System.model_validate(raw)
    except ValidationError as error:
        raise UserError(f"'{path}': {explain(error, System)}") from None


def _beside(spec: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The spec with its relative folders resolved against `folder`."""
    found = dict(spec)
    if "api" in found:
        return found
    for key in ("model", "adapter"):
        value = found.get(key)
        if isinstance(value, str) and value.startswith(("./", "../")):
            found[key] = str((folder / value).resolve())
    if isinstance(found.get("antiexpert"), Mapping):
        found["antiexpert"] = _beside(found["antiexpert"], folder)
    return found
