"""How far to draft: chosen from measured times of the forwards and measured acceptance. No torch.

Tokens per step and seconds per step are both known functions of the draft length k once the times of the
three kinds of forward and the share of accepted drafts are (performance model: Leviathan et al. 2023, section
3.3, with the expert's forwards owed anyway). k = 0, plain decoding, is one of the choices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

LADDER = (0, 1, 2, 3, 4, 6, 8)
"""Draft lengths to choose from."""
TRIED_FIRST = (0, 1, 3)
"""Draft lengths whose times are measured before anything is decided. Two tokens can cost far more than one
and four hardly more than two, so that 1 alone tells little about the others."""
TRIED_UP_TO = 512
"""Tokens per verification up to which a draft length is tried without being asked for by the estimate."""
GAIN = 1.05
"""How much faster than plain decoding the estimate must be: below that it is noise."""
SAMPLES = 2
"""Times that a measurement needs: the first call of a shape is slow."""
RECENT = 0.1
"""Weight of a new time in its size's mean."""
LEVEL = 0.3
"""Its weight in the level of all sizes."""
OUTLIER = 1.5
"""A time that is longer than expected by more than this factor counts as one that is by this factor."""
REVISIT = 32
"""Steps after which the next longer draft, or prompt lookup, is measured again, if it could win."""
MEMORY = 0.97
"""How much of the acceptance counts is kept from step to step."""
RETRY = 128
"""Plain steps after which one step drafts again, to see whether acceptance has changed."""
HOPE = 0.95
"""The acceptance that it could have changed to: where even that would not win, nothing is tried."""
PROMPT_LOOKUP_LENGTH = 6
"""Most tokens that prompt lookup drafts, unless the draft length is given."""
PROMPT_LOOKUP_ROWS = 32
"""Rows up to which prompt lookup is tried: in more, verifying its drafts costs as much as it brings."""


@dataclass
class FadingRate:
    """How many of the examined drafts were accepted; old ones fade."""

    accepted: float
    examined: float
    memory: float = MEMORY

    def add(self, accepted: int, examined: int) -> None:
        """So many of the examined ones were accepted."""
        self.accepted = self.memory * self.accepted + accepted
        self.examined = self.memory * self.examined + examined

    @property
    def value(self) -> float:
        """The share, below 1 so that it can be summed over any length."""
        return min(self.accepted / self.examined, 0.999)


def run_of(share: float, length: int) -> float:
    """How many of `length` drafts are accepted on average, where each that follows accepted ones is accepted
    with the chance `share`."""
    return share * (1 - share**length) / (1 - share)


class Ahead(NamedTuple):
    """How a step on a GPU drafts."""

    k: int
    lookup: bool = False
    """Whether the drafts come from prompt lookup; then all models read them at once."""


@dataclass
class LatencyTable:
    """Latency table: seconds of one kind of forward by its number of tokens.

    Rows grow longer and machines slower or faster while other sizes than the present one are not measured.
    So each time moves a level that all sizes share, and the mean of its own size."""

    seen: dict[int, tuple[float, float, int]] = field(default_factory=dict)
    """Size class -> mean number of tokens, mean seconds at level 1, how often."""
    level: float = 1.0

    def add(self, tokens: int, seconds: float) -> None:
        """One measurement. The best of the first ones counts, then means that outliers hardly move."""
        now = seconds / self.level
        size, mean, count = self.seen.get(_size_class(tokens), (tokens, now, 0))
        if count < SAMPLES:
            mean = min(mean, now)
        else:
            change = min(now / mean, OUTLIER)
            mean *= change**RECENT
            self.level *= change**LEVEL
        size += (tokens - size) / min(count + 1, 1 / RECENT)
        self.seen[_size_class(tokens)] = size, mean, count + 1

    def known(self, tokens: int) -> bool:
        """Whether this many tokens, or about as many, were measured often enough."""
        return any(count >= SAMPLES and 0.8 <= n / tokens <= 1.25 for n, _, count in self.seen.values())

    def below(self, tokens: int) -> float:
        """Seconds of the most tokens measured that are no more than these."""
        most = max(((n, mean) for n, mean, _ in self.seen.values() if n <= tokens), default=(0, 0.0))
        return most[1] * self.level

    def at(self, tokens: float) -> float:
        """Seconds for so many tokens: measured, between two measurements, or on the line through the last one
        and one of half as many, so that noise does not tilt it."""
        if tokens <= 0 or not self.seen:
            return 0.0
        points = sorted((n, mean * self.level) for n, mean, _ in self.seen.values())
        if tokens < points[0][0] or len(points) == 1:
            n, mean = points[0]
            return float(mean * max(1.0, tokens / n) ** 0.5)
        if tokens >= points[-1][0]:
            n1, t1 = points[-1]
            n0, t0 = next((point for point in reversed(points) if 2 * point[0] <= n1), points[0])
        else:
            upper = next(i for i, (n, _) in enumerate(points) if n > tokens)
            (n0, t0), (n1, t1) = points[upper - 1], points[upper]
        return max(t0, t0 + (t1 - t0) * (tokens - n0) / (n1 - n0))


EXACT = 8
"""Up to this many tokens every number is a class of its own."""
WIDTH = 1.15
"""How far apart the sizes of a larger class are: single times are too noisy to be compared."""


def _size_class(tokens: int) -> int:
    return tokens if tokens <= EXACT else EXACT + round(math.log(tokens / EXACT) / math.log(WIDTH))


STEP_WIDE = 150
"""Tokens per verification up to which whole steps on a GPU are tried: beyond, products are compute-bound."""


@dataclass
class StepDraftLength:
    """Chooses the draft length from the measured times of whole steps: a graph is not looked into."""

    times: dict[tuple[int, bool], LatencyTable] = field(default_factory=dict)
    """By rows, and whether prompt lookup drafts: seconds of a step by its tokens per row, k + 1."""
    started: int = 0
    """Steps, counted by who starts them."""

    def add(self, rows: int, ahead: Ahead, seconds: float) -> None:
        """A step of so many rows took so long."""
        self._of(rows, ahead.lookup).add(ahead.k + 1, seconds)

    def choose(
        self, rows: int, acceptance: float | None, matched: float = 0.0, lookup_acceptance: float = 0.0
    ) -> Ahead:
        """What a step of so many rows does. `acceptance` is the expert's, None where there is none to draft;
        `matched` is the share of the rows in which prompt lookup found drafts, `lookup_acceptance` how likely
        its next token is right."""
        times, expert = self._of(rows), acceptance or 0.0
        lengths = LADDER if acceptance is not None else (0,)
        for k in TRIED_FIRST:
            if k in lengths and self._fits(rows, k) and not times.known(k + 1):
                return Ahead(k)

        def speed(k: int, share: float = expert) -> float:
            seconds = times.at(k + 1)
            return (1 + run_of(share, k)) / seconds if seconds else 0.0

        fitting = [k for k in lengths if self._fits(rows, k)]
        best = max(fitting, key=speed)
        best = best if speed(best) > GAIN * speed(0) else 0
        longest = max(k for k in LADDER if k <= PROMPT_LOOKUP_LENGTH and self._fits(rows, k))
        if (
            longest
            and matched
            and self._lookup_speed(rows, longest, matched, lookup_acceptance) > GAIN * speed(best)
        ):
            return Ahead(longest, lookup=True)
        if best == 0 and self.started % RETRY == RETRY - 1:
            return Ahead(int(any(speed(k, HOPE) > GAIN * speed(0) for k in fitting)))
        return Ahead(best)

    def _lookup_speed(self, rows: int, k: int, matched: float, lookup_acceptance: float) -> float:
        """Tokens per second and row; until it was measured, and now and then to measure it again, as if
        reading the drafts took no time."""
        looked_up, again = self._of(rows, lookup=True), self.started % REVISIT == REVISIT - 1
        known = looked_up.known(k + 1) and not again
        seconds = looked_up.at(k + 1) if known else self._of(rows).at(1)
        return (1 + matched * run_of(lookup_acceptance, k)) / seconds if seconds else 0.0

    def _of(self, rows: int, lookup: bool = False) -> LatencyTable:
        return self.times.setdefault((rows, lookup), LatencyTable())

    @staticmethod
    def _fits(rows: int, k: int) -> bool:
        return k == 0 or rows * (k + 1) <= STEP_WIDE


@dataclass
class DraftLength:
    """Chooses the draft length from the measurements of one engine."""

    draft: LatencyTable = field(default_factory=LatencyTable)
    """The draft models, once per draft."""
    read: LatencyTable = field(default_factory=LatencyTable)
    """One forward of the draft models, by its tokens."""
    verify: LatencyTable = field(default_factory=LatencyTable)
    """The others, on all drafts together."""
    close: LatencyTable = field(default_factory=LatencyTable)
    """The draft models again, where all drafts were accepted, and the choice of the last token."""
    lookup: LatencyTable = field(default_factory=LatencyTable)
    """All models at once, on drafts of prompt lookup."""
    acceptance: FadingRate = field(default_factory=lambda: FadingRate(2.8, 4.0))
    """Drafts of an expert that the proxy was asked about; the start is a guess."""
    guesses: FadingRate = field(default_factory=lambda: FadingRate(1.0, 2.0))
    """Tokens from prompt lookup that the drafter was asked about."""
    lookup_acceptance: FadingRate = field(default_factory=lambda: FadingRate(1.0, 2.0, memory=0.9))
    """Tokens from prompt lookup against those of the proxy, whether they were drafts or not. Repetition comes
    and goes: what is old counts for little."""
    forwards: float = 1.0
    drafted: float = 1.0
    """Forwards of the draft models per draft: below 1 where prompt lookup guesses right."""
    steps: StepDraftLength = field(default_factory=StepDraftLength)
    """Of the steps that run on a GPU as one."""
    plain_steps: int = 0
    _asked: int = 0
    _steps: int = 0
    _matched: int = 0

    def choose(self, rows: int) -> int:
        """The draft length for a step of so many rows."""
        if rows == 0:
            return 0
        for k in TRIED_FIRST:
            if rows * (k + 1) <= TRIED_UP_TO and not self._measured(rows, k) and self._promising(rows, k):
                return k
        plain, best = self.speed(rows, 0), max(LADDER, key=lambda k: self.speed(rows, k))
        if best == 0 or self.speed(rows, best) < GAIN * plain:
            self.plain_steps += 1
            if self.plain_steps % RETRY or rows * 2 > TRIED_UP_TO:
                return 0
            return int(any(self.speed(rows, k, share=HOPE) > GAIN * plain for k in LADDER))
        return self._revisited(rows, best)

    def _revisited(self, rows: int, best: int) -> int:
        """The draft length, or now and then the next longer one: its time may be of a slow minute."""
        self._steps += 1
        longer = next((k for k in LADDER if k > best), best)
        if self._steps % REVISIT or rows * (longer + 1) > TRIED_UP_TO:
            return best
        known = self.verify.at(rows * (best + 1))
        return longer if self.speed(rows, longer, known) > GAIN * self.speed(rows, best) else best

    def _measured(self, rows: int, k: int) -> bool:
        return self.verify.known(rows * (k + 1)) and (k == 0 or self.draft.known(rows) or not self.draft.seen)

    def _promising(self, rows: int, k: int) -> bool:
        """Whether drafts of length k would win if reading them cost no more than what was measured so far."""
        known = self.verify.below(rows * (k + 1))
        return k == 0 or self.speed(rows, k, known) > GAIN * self.speed(rows, 0)

    def speed(self, rows: int, k: int, verify: float | None = None, share: float | None = None) -> float:
        """Estimated tokens per second and row with drafts of length k; 0 where nothing is known yet. `verify`
        are the seconds of the verification if they are not to be estimated, `share` is the acceptance if it
        is not to be the measured one."""
        a = self.acceptance.value if share is None else share
        all_accepted = a**k
        seconds = self.verify.at(rows * (k + 1)) if verify is None else verify
        seconds += k * self.draft.at(rows) * self.forwards / self.drafted
        # one row that needs the closing forward is enough for it to run
        seconds += (1 - (1 - all_accepted) ** rows) * self.close.at(max(1.0, rows * all_accepted))
        return (1 + run_of(a, k)) / seconds if seconds else 0.0

    def prefers_lookup(self, found: Sequence[int], k: int) -> bool:
        """Whether prompt lookup serves all models better than k drafts of the expert. `found` are the lengths
        of its drafts, one per row, 0 where it found none."""
        rows, tokens = len(found), len(found) + sum(found)
        plain = self.verify.at(rows)
        if tokens == rows or not plain:
            return False
        self._matched += 1
        if self.lookup.known(tokens) and self._matched % REVISIT:
            seconds = self.lookup.at(tokens)
        else:  # the draft models' time grows as that of the others does
            seconds = self.verify.at(tokens) * (1 + self.close.at(rows) / plain)
        expected = sum(1 + run_of(self.lookup_acceptance.value, length) for length in found)
        return expected / rows / seconds > GAIN * self.speed(rows, k)

    def saw_drafts(self, rows: int, forwards: int, drafted: int, seconds: float) -> None:
        """Note drafts, and what their forwards took."""
        self.draft.add(rows, seconds / forwards)
        self.forwards = MEMORY * self.forwards + forwards * rows
        self.drafted = MEMORY * self.drafted + drafted

    def guessing(self, rows: int, length: int) -> bool:
        """Whether the drafter should read tokens of prompt lookup in one of `rows` rows beside its last
        token: where that saves more of its forwards than it costs. A forward is shared by all rows. Now and
        then it is tried in any case, to be measured."""
        self._asked += 1
        if self._asked % 16 == 0 or not self.read.seen:
            return True
        alone = self.read.at(rows)
        return run_of(self.guesses.value, length) * alone / rows > self.read.at(rows + length) - alone
