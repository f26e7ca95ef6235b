"""What a check of a system found: one record per role, and one for memory and machine. No torch here."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from proxytune.schema import Record

Path = Literal["packed", "reference", "unknown"]


class Finding(Record):
    """One thing that a user should know."""

    level: Literal["problem", "note"]
    """A problem keeps the system from running as it is; a note does not."""
    about: str
    """A role, `vocabulary`, `memory` or `machine`."""
    text: str
    """One line."""


class ContextShown(Record):
    """What a role sees of the sample prompt."""

    form: Literal["direct", "in_ensemble"]
    """direct: evaluated as itself. in_ensemble: as the expert inside the proxy."""
    text: str
    ids: tuple[int, ...]
    tokens: tuple[str, ...]


class RoleCheck(Record):
    """One model of the system."""

    name: str
    """base, expert, expert2, antiexpert, antiexpert2 or tuned."""
    model: str
    """The folder, file or hub id, and its adapter."""
    kind: str | None = None
    """The class in transformers; None where the model cannot be read."""
    parameters: int | None = None
    dtype: str = "auto"
    quantization: str = "none"
    chat: str = "none"
    path: Path = "unknown"
    """packed: batched forwards with our KV cache. reference: the slow exact path."""
    reason: str = ""
    """Why it takes the reference path, or why the path is not known."""
    examined: str | None = None
    """What the path was found out on: the loaded `weights`, or a small `copy` of the configuration."""
    window: int | None = None
    """Most tokens that it takes; None without a bound."""
    tokens: int | None = None
    """Tokens of the tokenizer."""
    head: int | None = None
    """Rows of the output head; those beyond the tokenizer are padding and are cut."""
    special: dict[str, tuple[str, int] | None] = Field(default_factory=dict)
    """bos, eos and pad: token and id."""
    contexts: tuple[ContextShown, ...] = ()
    weights: int | None = None
    """Bytes of its weights."""
    shared_with: str | None = None
    """The role that holds the same weights."""
    kv_per_token: int | None = None
    """Bytes of KV cache for a token; None where the model keeps a cache of its own."""


class MemoryCheck(Record):
    """What the models that decode together take, against what is free."""

    weights: dict[str, int]
    """Bytes per distinct model, by the first role that has it."""
    total: int
    """Bytes of the proxy's weights: the tuned model is loaded alone."""
    kv_per_token: int
    """Bytes of KV for one token over all of the proxy's models."""
    sequences: int
    length: int
    kv_batch: int
    """Bytes of KV for a batch of so many sequences of this length."""
    free: int
    """Bytes that are free now: on the first GPU, or all of them for `device_map: auto`; without one, of the
    CPU."""


class MachineCheck(Record):
    """Where it would run."""

    device: str
    cores: int
    """Cores that this process may use."""
    threads: int
    load: float
    """Processes that wanted a core, averaged over the last minute."""
    compiler: str | None
    """Why attention on the CPU goes through torch, slower; None where it is compiled."""
    sandbox: str | None
    """The backend in which model-written code would run; None where none isolates."""


class SystemCheck(Record):
    """Everything about one system."""

    system: str
    with_weights: bool
    speculation: str
    """`yes`, or why decoding does without."""
    vocabulary: dict[str, str]
    """Per model: how its vocabulary stands to the base's."""
    roles: tuple[RoleCheck, ...]
    memory: MemoryCheck
    machine: MachineCheck
    findings: tuple[Finding, ...]

    @property
    def problems(self) -> tuple[Finding, ...]:
        """What keeps the system from running, in the order in which it was found."""
        return tuple(finding for finding in self.findings if finding.level == "problem")
