"""What flows through the engine: requests, rows under way, and the plan of a step. No torch here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple

from proxytune.config import AlphaSchedule, Sampling

GREEDY = Sampling()

UNIT = AlphaSchedule()
"""Alpha 1 at every position."""


@dataclass(frozen=True)
class Request:
    """One response to be made. Contexts are ids per model, in that model's own vocabulary; generated tokens
    are the base's."""

    contexts: Mapping[str, tuple[int, ...]]
    key: int
    """64-bit randomness key."""
    max_new_tokens: int
    """As in `sampling`, or less where a model's window is full first."""
    sampling: Sampling = GREEDY
    """How tokens are chosen. Its texts (stops, bans) are below, in ids; its seed and the number
    of responses are in `key`."""
    eos: frozenset[int] = frozenset()
    alpha: AlphaSchedule = UNIT
    banned: frozenset[int] = frozenset()
    banned_first: frozenset[int] = frozenset()
    forced: tuple[int, ...] = ()
    """Tokens with which the response begins, whatever the logits are."""
    stop: Callable[[Sequence[int]], bool] | None = None
    """Whether the response, as ids so far, is to end here."""
    trace: bool = True
    """Whether its tokens are traced where the engine traces."""
    tag: object = None
    """The caller's own; handed back with the result."""


class TokenTrace(NamedTuple):
    """One generated token as every model saw it."""

    token: int
    alpha: float
    probability: dict[str, float]  # model -> probability of the token; "proxy" is the combination
    top: dict[str, int]  # model -> its most probable token
    divergence: Mapping[str, float] = MappingProxyType({})  # model -> KL(reference || model) in nats
    ranked: Mapping[str, Sequence[tuple[int, float]]] = MappingProxyType({})
    # model -> its most probable tokens with their natural log-probabilities, where that was asked for


@dataclass
class RowCounts:
    """What one row did so far."""

    row_steps: int = 0
    """Steps in which it got tokens."""
    drafted: int = 0
    examined: int = 0
    """Drafts up to and including the first rejected one of a step."""
    accepted: int = 0
    preemptions: int = 0


def same_start(one: Sequence[int], other: Sequence[int]) -> int:
    """How many ids two sequences begin with."""
    low, high = 0, min(len(one), len(other))
    while low < high:  # slices are compared a hundred times as fast as items one by one
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


@dataclass(eq=False)
class Row:
    """A request under way."""

    request: Request
    ticket: int
    """Order of arrival; the highest makes room first."""
    prompt: int
    """Hash of the contexts: rows that share it (and the contexts) share prompt KV."""
    ids: dict[str, list[int]]
    """Per model: context and response so far."""
    tokens: list[int] = field(default_factory=list)
    """The response so far, in the base's ids."""
    logprob: float = 0.0
    trace: list[TokenTrace] = field(default_factory=list)
    counts: RowCounts = field(default_factory=RowCounts)
    beginning: int = 0
    """Hash of the first ids of the contexts: rows that share it may share the KV of a longer beginning."""

    def same_prompt(self, other: Row) -> bool:
        """Whether the prompt KV of one serves the other."""
        return self.prompt == other.prompt and self.request.contexts == other.request.contexts

    def shared_with(self, other: Row) -> dict[str, int]:
        """Per model, how many tokens of this prompt, but for its last, another's begins with."""
        pairs = ((name, own, other.request.contexts[name]) for name, own in self.request.contexts.items())
        return {name: min(same_start(own, its), len(own) - 1, len(its) - 1) for name, own, its in pairs}


@dataclass(frozen=True)
class Plan:
    """One step: rows 0..decoding-1 decode, with room for `depths[i]` drafts each; `prefill` per model are
    prompt tokens of others."""

    decoding: int
    depths: tuple[int, ...]
    prefill: Mapping[str, tuple[Segment, ...]]

    def prompt_tokens(self, name: str) -> int:
        """How many tokens of prompts a model is fed."""
        return sum(len(segment.ids) for segment in self.prefill[name])


class Segment(NamedTuple):
    """New tokens of one row; they continue at the row's length."""

    row: int
    ids: tuple[int, ...]


class Work(NamedTuple):
    """What one model is fed in one forward: segments of distinct rows, ascending.

    `keep` are ascending indices into the tokens of all segments in a row: after which of them logits are
    wanted."""

    segments: Sequence[Segment]
    keep: Sequence[int]


@dataclass(frozen=True)
class Result:
    """A finished response."""

    request: Request
    tokens: tuple[int, ...]
    finish_reason: str
    logprob: float
    trace: tuple[TokenTrace, ...]
    counts: RowCounts = field(default_factory=RowCounts, compare=False)
