"""The frozen records that flow through proxytune:

Example -> Prompt -> Contexts (ids per role) -> engine -> Completion (+ Trace) -> Score -> Run (JSON) ->
report"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, field
from textwrap import shorten
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, computed_field, field_serializer, model_validator

from proxytune.config import RunSpec
from proxytune.errors import UserError

FinishReason = Literal["eos", "stop", "length", "nan", "template", "unseen"]
"""`nan`: the logits after the last token were no numbers, or infinite, so the response could not go on.
`template`: a chat template has no text for the example, which was not asked.
`unseen`: what was needed is not among the tokens that an endpoint shows."""
FAULTS = frozenset({"nan", "template", "unseen"})
"""Reasons that are faults: their example has no score."""
FAULT = "fault"
"""The column of a stored row that has the reason, where its example ended in one."""
NO_SCORE: Mapping[str, str] = {"unjudged": "not judged", "not_run": "not executed", "faulty": "no score"}
"""Metrics that give the share of examples without a score, and what stands in the place of a score where a
run has no other."""
UNSCORED = frozenset(NO_SCORE)
SHOWN = 60
"""Characters of a response in its repr."""
JsonRow = dict[str, Any]
"""An object of a JSON-lines file: an item of public data, a stored prediction."""
SCHEMA = 1
"""Version of run.json and predictions.jsonl; raised when a field changes its meaning."""


@dataclass(frozen=True)
class Prompt:
    """One prompt in the pieces from which every role's context is made (decoding/prompts.py)."""

    plain: str
    """What the base and the antiexpert see, response prefix included."""
    user: str
    """The user's message when a chat model is evaluated as itself."""
    system: str | None = None
    """The system message of chat contexts; plain contexts never see it."""
    response_prefix: str = ""
    """Text put after the chat template, where the response begins ("Answer:")."""
    ids: Mapping[str, tuple[int, ...]] | None = None
    """What every model sees, in its own ids, where the caller knows it; the texts are not read then."""
    messages: tuple[tuple[str, str], ...] = ()
    """A conversation: who speaks (`system`, `user`, `assistant`), and what. Every model gets it in its own
    format, with the response prefix after it; the other texts are not read then."""


@dataclass(frozen=True)
class Example:
    """One item of a task."""

    id: str
    """Unique within the task; part of the randomness key and of what resume matches."""
    prompt: Prompt
    target: dict[str, Any] = field(default_factory=dict)
    """What the scorer needs; stored with the prediction."""


def named_by_content(prompts: Sequence[str | Prompt]) -> list[Example]:
    """Examples whose ids, and so whose sampling noise, depend on the prompt and on how often it came before:
    not on what else is asked, or in which order."""
    if isinstance(prompts, str) or not all(isinstance(prompt, str | Prompt) for prompt in prompts):
        raise UserError('prompts must be a list of texts: write generate(["..."])')
    seen: dict[Prompt, int] = {}
    examples = []
    for one in prompts:
        prompt = Prompt(plain=one, user=one) if isinstance(one, str) else one
        seen[prompt] = seen.get(prompt, 0) + 1
        # a conversation goes by its plain text, whichever formats the models get it in
        named = Prompt(prompt.plain, prompt.plain) if prompt.messages else prompt
        content = repr(astuple(named)[:-1]).encode("utf-8", "backslashreplace")
        digest = hashlib.sha256(content).hexdigest()[:16]
        examples.append(Example(id=f"{digest}-{seen[prompt]}", prompt=prompt))
    return examples


@dataclass(frozen=True)
class TracedToken:
    """One generated token: how probable each role found it, and what each would have chosen instead."""

    text: str
    id: int
    probability: dict[str, float]
    """Role -> probability of the chosen token, before bans and temperature."""
    top: dict[str, str]
    """Role -> text of its most probable token (its name where it has no text of its own)."""
    alpha: float
    divergence: dict[str, float] = field(default_factory=dict)
    """`base`, `proxy` -> KL(tuned || role) in nats, where agreement is traced."""

    def row(self) -> dict[str, Any]:
        """As trace.jsonl holds it: without an empty divergence."""
        named = {"text": self.text, "id": self.id, "probability": self.probability, "top": self.top}
        return {**named, "alpha": self.alpha, **({"divergence": self.divergence} if self.divergence else {})}


@dataclass(frozen=True)
class Took:
    """What one response took, or all of an example: the counts of a Cost, under its names. The time of what
    is computed together is shared out by tokens."""

    seconds: float = 0.0
    prefill_seconds: float = 0.0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    preemptions: int = 0
    row_steps: int = 0
    drafted: int = 0
    examined: int = 0
    accepted: int = 0
    api_calls: int = 0
    api_prompt_tokens: int = 0
    api_completion_tokens: int = 0
    deferred: int = 0


@dataclass(frozen=True, repr=False)
class Completion:
    """One response to one example."""

    example_id: str
    sample: int
    text: str
    """Cut before the stop string; never holds the end-of-sequence token."""
    token_ids: tuple[int, ...]
    """What was generated, in the base's ids, end-of-sequence and stop string included."""
    finish_reason: FinishReason
    logprob: float
    """Sum of the log-probabilities (natural) of the tokens under the combined distribution, before bans and
    warping."""
    trace: tuple[TracedToken, ...] = ()
    remark: str | None = None
    """Why it is not what was asked for: a window that was full first, or what failed."""
    bounded: bool | None = None
    """Whether the log-probability is of a token that an endpoint does not show, and so the largest that it
    can be; None where the whole distribution is known."""
    took: Took = field(default=Took(), compare=False)

    def __repr__(self) -> str:
        """In one line, whatever it holds."""
        traced = ", traced" if self.trace else ""
        shown = shorten(repr(self.text), SHOWN, placeholder="…'")
        return f"Completion({shown}, {len(self.token_ids)} tokens, {self.finish_reason}{traced})"

    @property
    def fault(self) -> str | None:
        """Why the response, or its log-probability, is none; None where it is one."""
        return self.finish_reason if self.finish_reason in FAULTS else None


class Metric(BaseModel):
    """A figure with its 95% bootstrap interval over examples. Never NaN: what has no score is left out."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    value: float
    """0, and null in JSON, for a figure over no example."""
    low: float | None = None
    high: float | None = None
    unit: Literal["share", "percent", "number"] = "share"
    """share: 0 to 1. percent: 0 to 100. number: a count, a length."""
    n: int | None = None
    """Examples that the figure is over, which may be fewer than the run has. None for a figure that is no
    mean over examples, and in runs of versions before 0.2.0."""
    of: int | None = None
    """Examples that the figure is meant for, where these are not all: the problems of one library."""

    @model_validator(mode="before")
    @classmethod
    def _nothing(cls, content: Any) -> Any:
        """Read null as it was written: for a figure over no example, and no other."""
        if isinstance(content, dict) and content.get("n") == 0 and content.get("value") is None:
            return {**content, "value": 0.0}
        return content

    @field_serializer("value", when_used="json")
    def _null(self, value: float) -> float | None:
        return None if self.n == 0 else value

    def over(self, n: int) -> tuple[int, int]:
        """How many examples it is over and of how many, in a run of n: of those that it is meant for, where
        one of them lacks it."""
        counted = n if self.n is None else self.n
        meant = n if self.of is None else self.of
        return counted, meant if counted < meant else n

    def lacks(self, n: int) -> bool:
        """Whether an example of a run of n lacks it that should have it."""
        return self.n is not None and self.n < (n if self.of is None else self.of)


class Provenance(BaseModel):
    """Where a run's figures come from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    proxytune: str
    git_commit: str | None
    python: str
    packages: dict[str, str]
    device: str
    platform: str
    threads: int
    command: str


class RoleMemory(BaseModel):
    """The price of one model: bytes of weights, and of KV cache at its fullest."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    weights: int
    kv_peak: int
    shared_with: str | None = None
    """The role whose weights these are (an adapter on them adds only its own bytes)."""
    path: Literal["packed", "reference"] = "packed"
    """packed: batched forwards with our KV cache. reference: the slow exact path for other model families."""
    tokenizer: str | None = None
    """The adapter's folder, where the tokenizer or its chat template came from there."""


class WorkerFacts(BaseModel):
    """A process that decoded a part of a run, and what it did of it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: str
    pid: int
    device: str
    log: str | None = None
    """The file of its messages, on its host."""
    examples: int = 0
    generated_tokens: int = 0
    seconds: float = 0.0
    """Prefill and decoding."""
    process_peak: int = 0
    """Resident memory at its largest, in bytes."""

    @property
    def name(self) -> str:
        """Host and process."""
        return f"{self.host}:{self.pid}"


_QUOTIENTS = ("acceptance", "accepted_per_step", "tokens_per_step")
"""What run.json stores of a cost beside its counts."""


class Cost(BaseModel):
    """What the stored examples of a run took, whichever sessions made them. What a session that was stopped
    had under way is in no figure. Quotients are stored for those who read the file; only the counts are read
    back."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    seconds: float = 0.0
    """Prefill and decoding, without loading."""
    prefill_seconds: float = 0.0
    """The part of them that went to prompts. Runs of versions before 0.2.0 have 0 here."""
    prompt_tokens: int = 0
    generated_tokens: int = 0
    memory: dict[str, RoleMemory] = {}
    process_peak: int = 0
    """Resident memory of the process at its largest, in bytes: weights, KV, and all that is around them. Runs
    of versions before 0.2.0 have 0 here."""
    preemptions: int = 0
    sessions: int = 1
    """1 + how often the run was resumed."""
    row_steps: int = 0
    """Steps of the decoding loop, counted once per response that took part."""
    drafted: int = 0
    """Tokens that were drafted ahead of the large model."""
    examined: int = 0
    """Drafts up to and including the first rejected one of a step."""
    accepted: int = 0
    """Accepted drafts."""
    workers: dict[str, WorkerFacts] = {}
    """The processes that decoded the examples, where it was not the run's own."""
    api_calls: int = 0
    """Requests to a base behind an API; replies that were stored already are none."""
    api_prompt_tokens: int = 0
    """Of them, as reported, or else the most that it can be."""
    api_completion_tokens: int = 0
    deferred: int = 0
    """Tokens that the expert wrote, where the base deferred to it."""

    @model_validator(mode="before")
    @classmethod
    def _counts_alone(cls, content: Any) -> Any:
        """Leave out stored quotients: they follow from the counts."""
        if not isinstance(content, dict):
            return content
        return {name: value for name, value in content.items() if name not in _QUOTIENTS}

    @property
    def decode_seconds(self) -> float:
        """Decoding alone."""
        return max(self.seconds - self.prefill_seconds, 0.0)

    @property
    def tokens_per_second(self) -> float | None:
        """Generated tokens per second of decoding, or None before anything was generated."""
        return self.generated_tokens / self.decode_seconds if self.decode_seconds else None

    @computed_field  # type: ignore[prop-decorator]
    @property
    def acceptance(self) -> float | None:
        """Acceptance rate: the accepted share of examined drafts, or None where nothing was drafted."""
        return self.accepted / self.examined if self.examined else None

    @computed_field  # type: ignore[prop-decorator]
    @property
    def accepted_per_step(self) -> float | None:
        """Mean accepted length: accepted drafts of a response per step, 0 for plain decoding."""
        return self.accepted / self.row_steps if self.row_steps else None

    @computed_field  # type: ignore[prop-decorator]
    @property
    def tokens_per_step(self) -> float | None:
        """Mean tokens of a response per step: 1 for plain decoding."""
        return self.generated_tokens / self.row_steps if self.row_steps else None


class TaskFacts(BaseModel):
    """What reports need of a run's task, stored with the run: the task may be in a file that they do not
    read."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    asked: str = "prompt"
    """The column of a stored row that shows what was asked."""
    lower_is_better: bool = False
    hateful: bool = False
    fault_column: str | None = None
    """As in Task."""
    file: str | None = None
    """The Python file of a task of one's own, as it was named."""


class Run(BaseModel):
    """run.json: a result that explains itself."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: int = SCHEMA
    status: Literal["running", "done"]
    spec: RunSpec
    n: int = 0
    """Examples scored."""
    metrics: dict[str, Metric] = {}
    headline: str
    """The metric that tables show."""
    judge: str | None = None
    """Who judged the responses: a model, or several."""
    facts: TaskFacts | None = None
    """Of its task; None in runs of versions before 0.2.0."""
    cost: Cost = Cost()
    notes: tuple[str, ...] = ()
    """What a reader of the figures should know: how prompts were changed, which responses failed."""
    started: str
    finished: str | None = None
    made: Provenance

    def __repr__(self) -> str:
        """In one line: the spec alone would fill a screen."""
        spec, score = self.spec, self.score
        shown = (
            NO_SCORE.get(self.headline, "no score") if score is None else f"{self.headline} {score.value:.4g}"
        )
        where = f"{spec.task} as {spec.role} on {spec.system.name}"
        return f"Run({where}: {shown}, {self.n} examples, {self.status})"

    def figure(self, name: str) -> Metric | None:
        """A metric that is a score; None where the run has none of that name, or over no example."""
        found = None if name in UNSCORED else self.metrics.get(name)
        return None if found is None or found.n == 0 else found

    @property
    def score(self) -> Metric | None:
        """What tables show; None where nothing was judged or executed, or every example failed."""
        return self.figure(self.headline)
