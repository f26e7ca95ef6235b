"""Continuous batching: which rows decode in this step, which tokens are prefilled, who waits and who has to
make room.

No torch here. The scheduler knows rows only by their ids and by the `Rows` of every model, which it keeps in
step: row i is the same request in all of them. Rows that decode come first and stay compact."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

from proxytune.engine.request import Plan, Request, Row, Segment

if TYPE_CHECKING:
    from proxytune.engine.kv.cache import Rows

HEADROOM = 16
"""Tokens that every row must be able to grow by before another row is let in: fewer preemptions."""


WORTH_SHARING = 16
"""Tokens with which prompts begin, in every model, that are worth taking over, and worth waiting for."""
DONORS = 8
"""Rows under way that are compared with a waiting one."""
LOOKAHEAD = 256
"""How far into the queue admission looks for requests that can start now."""


def no_drafts(rows: Sequence[Row]) -> Sequence[Sequence[int]]:
    """Plain decoding."""
    return []


class Donor(NamedTuple):
    """A row under way whose prompt begins as that of a waiting one."""

    row: int = 0
    shared: Mapping[str, int] = MappingProxyType({})
    """Per model, the tokens that both prompts begin with and whose KV is there."""
    whole: bool = False
    """Whether that is the whole prompt."""
    awaited: bool = False
    """Whether more of it will be there soon."""


class Scheduler:
    """Rows under way, and requests that wait."""

    def __init__(
        self,
        caches: Mapping[str, Rows],
        max_rows: int,
        prefill_tokens: int,
        longest: Mapping[str, int] | None = None,
    ) -> None:
        """At most `max_rows` rows at a time, and `prefill_tokens` prompt tokens per model and step.
        `longest`: most ids that one token takes in a model's vocabulary (1 by default)."""
        self.caches, self.longest = caches, longest or dict.fromkeys(caches, 1)
        self.max_rows, self.prefill_tokens = max_rows, prefill_tokens
        self.rows: list[Row] = []
        self.waiting: deque[Row] = deque()
        self.preemptions = 0
        self._tickets = 0

    def submit(self, request: Request) -> int:
        """Queue a request. -> its ticket."""
        self.waiting.append(self._fresh(request))
        return self._tickets

    def find(self, ticket: int) -> Row | None:
        """The row of a ticket, under way or waiting; None once it has left."""
        return next((row for row in (*self.rows, *self.waiting) if row.ticket == ticket), None)

    def remove(self, row: Row) -> None:
        """A row leaves before its end, and its KV is free at once."""
        if row in self.rows:
            self._drop(self.rows.index(row))
        else:
            self.waiting.remove(row)

    def forget(self) -> None:
        """No row is under way or waits. What they have in the caches is the caller's to clear."""
        self.rows.clear()
        self.waiting.clear()

    def _fresh(self, request: Request) -> Row:
        self._tickets += 1
        contexts = request.contexts.values()
        return Row(
            request,
            self._tickets,
            prompt=hash(tuple(contexts)),
            ids={name: list(ids) for name, ids in request.contexts.items()},
            beginning=hash(tuple(ids[:WORTH_SHARING] for ids in contexts)),
        )

    def plan(self, wishes: Callable[[Sequence[Row]], Sequence[Sequence[int]]] = no_drafts) -> Plan:
        """Decide the next step; admits and preempts rows on the way. `wishes`: how many drafts the decoding
        rows would like to have, the dearest wish first; where none of them fits, nobody has any."""
        self._admit()
        while True:
            decoding = self._order()
            prefill = self.prefill(decoding)
            for depths in (*map(tuple, wishes(self.rows[:decoding])), (0,) * decoding):
                growth = {n: [1 + drafts * most for drafts in depths] for n, most in self.longest.items()}
                if self.make_room(growth, prefill):
                    return Plan(decoding, depths, prefill)
            self.preempt()

    def make_room(
        self, growth: Mapping[str, Sequence[int]], prefill: Mapping[str, Sequence[Segment]]
    ) -> bool:
        """Make room in every model for so many more tokens of its first rows, before drafts are taken back,
        and for prompts of others; False, and nothing done, if there is none."""
        targets = {name: list(rows.lengths) for name, rows in self.caches.items()}
        for name, lengths in targets.items():
            for index, count in enumerate(growth[name]):
                lengths[index] += count
            for segment in prefill[name]:
                lengths[segment.row] += len(segment.ids)
        if not all(self.caches[name].fits(lengths) for name, lengths in targets.items()):
            return False
        for name, lengths in targets.items():
            self.caches[name].reserve(lengths)
        return True

    def joining(self, decoding: int) -> bool:
        """Whether a plan would let a row in, or have rows decode beside the first `decoding`."""
        if any(map(self._ready, range(decoding, len(self.rows)))):
            return True
        room = len(self.rows) < self.max_rows and self._outstanding() < self.prefill_tokens
        return bool(self.waiting) and room and decoding < len(self.rows)

    def finish(self, done: Iterable[int]) -> None:
        """Rows that ended: a waiting request with the same prompt takes the place over, or the place is
        freed."""
        for index in sorted(done, reverse=True):
            successor = self._with_same_prompt(self.rows[index])
            if successor is None:
                self._drop(index)
                continue
            self.waiting.remove(successor)
            self.rows[index] = successor
            for name, rows in self.caches.items():
                rows.rewind(index, len(successor.request.contexts[name]) - 1)

    def _with_same_prompt(self, row: Row) -> Row | None:
        """A waiting request to share the prompt KV of a row (prefix sharing)."""
        return next((other for other in islice(self.waiting, LOOKAHEAD) if row.same_prompt(other)), None)

    def pending(self, name: str, index: int) -> int:
        """Tokens of a row that a model has not seen yet."""
        return len(self.rows[index].ids[name]) - self.caches[name].lengths[index]

    def _ready(self, index: int) -> bool:
        return all(self.pending(name, index) == 1 for name in self.caches)

    def _order(self) -> int:
        """Bring the rows that can decode to the start; -> how many they are."""
        decoding = 0
        for index in range(len(self.rows)):
            if self._ready(index):
                self._swap(decoding, index)
                decoding += 1
        return decoding

    def _swap(self, one: int, other: int) -> None:
        if one == other:
            return
        self.rows[one], self.rows[other] = self.rows[other], self.rows[one]
        for rows in self.caches.values():
            rows.swap(one, other)

    def _drop(self, index: int) -> None:
        self.rows[index] = self.rows[-1]
        self.rows.pop()
        for rows in self.caches.values():
            rows.drop(index)

    def prefill(self, decoding: int) -> dict[str, tuple[Segment, ...]]:
        """The prompt tokens of the rows behind the first `decoding` that are fed next."""
        oldest = sorted(range(decoding, len(self.rows)), key=lambda index: self.rows[index].ticket)
        return {name: self._chunks(name, oldest) for name in self.caches}

    def _chunks(self, name: str, oldest: Sequence[int]) -> tuple[Segment, ...]:
        """Prompt tokens, all but a row's last, oldest row first."""
        budget = self.prefill_tokens
        chunks = []
        for index in oldest:
            count = min(self.pending(name, index) - 1, budget)
            if count > 0:
                seen = self.caches[name].lengths[index]
                chunks.append(Segment(index, tuple(self.rows[index].ids[name][seen : seen + count])))
                budget -= count
        return tuple(sorted(chunks, key=lambda segment: segment.row))

    def preempt(self) -> None:
        """The youngest row gives up its KV and waits again; what it has generated so far is kept."""
        youngest = max(range(len(self.rows)), key=lambda index: self.rows[index].ticket)
        row = self.rows[youngest]
        self._drop(youngest)
        self.waiting.appendleft(row)
        self.preemptions += 1
        row.counts.preemptions += 1

    def _admit(self) -> None:
        """Let waiting rows in while there is room and the prefill of those before them is nearly done."""
        for row in list(islice(self.waiting, LOOKAHEAD)):
            if len(self.rows) >= self.max_rows:
                return
            donor = self._donor(row)
            if donor.awaited:
                continue  # what it can share is being computed: it is let in with that in a later step
            if not donor.whole and self._outstanding() >= self.prefill_tokens:
                return
            if not self._has_room(row):
                return
            self.waiting.remove(row)
            self.rows.append(row)
            for name, rows in self.caches.items():
                if donor.shared.get(name, 0):
                    rows.admit(donor.row, donor.shared[name])
                else:
                    rows.admit()

    def _donor(self, row: Row) -> Donor:
        """Where a row can take the KV of its prompt, or of the beginning of it, from."""
        alike = [index for index, other in enumerate(self.rows) if other.beginning == row.beginning]
        same = next((index for index in alike if row.same_prompt(self.rows[index])), None)
        best, most = Donor(), 0
        for index in alike[:DONORS] if same is None else [same]:
            shared = row.shared_with(self.rows[index])
            there = {n: min(count, self.caches[n].lengths[index]) for n, count in shared.items()}
            most = max(most, sum(shared.values()))
            if sum(there.values()) > sum(best.shared.values()):
                best = Donor(index, there)
        missing = most - sum(best.shared.values())
        if missing >= (1 if same is not None else WORTH_SHARING):
            return best._replace(awaited=True)
        if same is None and sum(best.shared.values()) < WORTH_SHARING:
            return Donor()
        return best._replace(whole=same is not None)

    def _outstanding(self) -> int:
        """Prompt tokens still to be fed, of the model that has most left."""
        left = (sum(self.pending(name, i) - 1 for i in range(len(self.rows))) for name in self.caches)
        return max(left, default=0)

    def _has_room(self, row: Row) -> bool:
        """Whether every model can hold the row beside the others, as they are and with a few tokens more."""
        if not self.rows:
            return True  # checked on submission: alone it fits
        for name, rows in self.caches.items():
            lengths = [len(other.ids[name]) + HEADROOM for other in self.rows]  # once their prompts are in
            if not rows.fits([*lengths, len(row.ids[name]) + HEADROOM]):
                return False
        return True
