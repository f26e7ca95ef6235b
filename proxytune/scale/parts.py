"""What the driver sends to a worker, what comes back, and how examples are shared out.

Whoever is free gets the next part. Parts become smaller towards the end (guided self-scheduling,
Polychronopoulos and Kuck 1987), so that workers finish together, whatever their speed and the lengths of
responses."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from proxytune.config import AlphaSchedule, Sampling, TraceKind
from proxytune.records import Completion, Example, RoleMemory, WorkerFacts

SMALLEST = 4
"""Examples of a part but for the last ones: a worker decodes the examples of a part together."""


@dataclass(frozen=True)
class AskedExample:
    """One example under its alphas."""

    example: Example
    alphas: tuple[AlphaSchedule, ...]
    texts: tuple[str, ...] | None = None
    """The texts whose log-probabilities are asked for; None where responses are generated."""

    @property
    def keys(self) -> set[Key]:
        """What comes back for it, one by one."""
        return {(self.example.id, alpha) for alpha in self.alphas}


Key = tuple[str, AlphaSchedule]
"""An example under one alpha."""


@dataclass(frozen=True)
class Settings:
    """How all examples of a run are decoded."""

    task: str
    sampling: Sampling
    trace: TraceKind = "off"
    forced: str | None = None


@dataclass(frozen=True)
class Found:
    """An example under one alpha with all of its completions, as a worker hands it back."""

    key: Key
    completions: tuple[Completion, ...]
    remarks: tuple[str, ...]
    """What the worker's decoder has remarked so far."""
    process_peak: int
    """Of the worker's process, in bytes."""
    memory: Mapping[str, RoleMemory]


@dataclass(frozen=True)
class WorkerState:
    """What a worker is, once its models are loaded."""

    facts: WorkerFacts
    notes: tuple[str, ...]
    memory: Mapping[str, RoleMemory]
    proxytune: str
    """Its version."""


@dataclass
class Queue:
    """The examples that nobody has finished, in the order in which they are given out."""

    waiting: deque[AskedExample]
    most: int
    """Examples that a worker decodes together at most: a part of more would only wait there."""
    workers: int
    out: dict[int, dict[str, AskedExample]] = field(default_factory=dict)
    """Part -> example id -> what of it has not come back."""
    parts: int = 0

    @classmethod
    def of(cls, asked: Iterable[AskedExample], most: int, workers: int) -> Queue:
        """All of it waiting."""
        return cls(deque(asked), most, workers)

    @property
    def left(self) -> int:
        """Examples of which something is missing."""
        return len(self.waiting) + sum(len(part) for part in self.out.values())

    def take(self) -> tuple[int, list[AskedExample]] | None:
        """A number and the examples of the next part; None where nothing waits."""
        if not self.waiting:
            return None
        share = -(-len(self.waiting) // (2 * self.workers))
        size = min(len(self.waiting), max(min(share, self.most), SMALLEST))
        part = [self.waiting.popleft() for _ in range(size)]
        self.parts += 1
        self.out[self.parts] = {one.example.id: one for one in part}
        return self.parts, part

    def came(self, part: int, key: Key) -> bool:
        """Count what came back; False for what was there already."""
        one = self.out.get(part, {}).get(key[0])
        if one is None or key not in one.keys:
            return False
        left = tuple(alpha for alpha in one.alphas if alpha != key[1])
        if left:
            self.out[part][key[0]] = AskedExample(one.example, left, one.texts)
        else:
            del self.out[part][key[0]]
        return True

    def lost(self, part: int) -> int:
        """Put what did not come back of a part first in the queue -> how many examples."""
        missing = list(self.out.pop(part, {}).values())
        self.waiting.extendleft(reversed(missing))
        return len(missing)

    def ended(self, part: int) -> None:
        """A part came back whole.

        Raises RuntimeError if it did not: a worker's fault that must not be passed over."""
        if missing := self.out.pop(part, {}):
            raise RuntimeError(f"a worker ended a part without {sorted(missing)}")


def whole(
    stream: Iterable[tuple[AlphaSchedule, Completion]], counts: Mapping[str, int]
) -> Iterator[tuple[Key, tuple[Completion, ...]]]:
    """Every example under every alpha, as soon as the last of its `counts` completions is there, in order."""
    waiting: dict[Key, list[Completion]] = {}
    for alpha, completion in stream:
        key = (completion.example_id, alpha)
        group = waiting.setdefault(key, [])
        group.append(completion)
        if len(group) == counts[completion.example_id]:
            yield key, tuple(sorted(waiting.pop(key), key=lambda c: c.sample))


def by_alphas(part: Sequence[AskedExample]) -> dict[tuple[AlphaSchedule, ...], list[AskedExample]]:
    """What has the same alphas together."""
    groups: dict[tuple[AlphaSchedule, ...], list[AskedExample]] = {}
    for one in part:
        groups.setdefault(one.alphas, []).append(one)
    return groups
