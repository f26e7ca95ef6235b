"""How far to draft: chosen from measured times of the forwards and measured acceptance. No torch.

Tokens per step and seconds per step are both known functions of the draft length k once the times of the
three kinds of forward and the share of accepted drafts are (performance model: Leviathan et al. 2023, section
3.3, with the expert's forwards owed anyway). k = 0, plain decoding, is one of the choices."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

LADDER = (0, 1, 2, 3, 4, 6, 8)
"""Draft lengths to choose from."""
TRIED_FIRST = (0, 1, 3)
"""Draft lengths whose times are measured before anything is decided. Two tokens can cost far more than one
and four hardly more than two, so that 1 alone says little about the others."""
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
"""Steps after which the next longer draft is measured again, if it could win."""
MEMORY = 0.97
"""How much of the acceptance counts is kept from step to step."""
RETRY = 128
"""Plain steps after which one step drafts again, to see whether acceptance has changed."""


@dataclass
class Times:
    """Seconds of one kind of forward by its number of tokens.

    Rows grow longer and machines slower or faster while other sizes than the present one are not measured:
    what a time tells is told to all sizes by the level, and what it tells of its own size by a mean."""

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
class StepPace:
    """How far to draft, from the measured times of whole steps: a graph is not looked into."""

    times: dict[int, Times] = field(default_factory=dict)
    """By rows: seconds of a step by its tokens per row, k + 1."""
    plain_steps: int = 0

    def choose(self, rows: int, acceptance: float) -> int:
        """The draft length for a step of so many rows."""
        times, a = self.times.setdefault(rows, Times()), min(acceptance, 0.999)
        for k in TRIED_FIRST:
            if rows * (k + 1) <= STEP_WIDE and not times.known(k + 1):
                return k

        def speed(k: int) -> float:
            seconds = times.at(k + 1)
            return (1 - a ** (k + 1)) / (1 - a) / seconds if seconds else 0.0

        best = max((k for k in LADDER if k == 0 or rows * (k + 1) <= STEP_WIDE), key=speed)
        if best == 0 or speed(best) < GAIN * speed(0):
            self.plain_steps += 1
            return 1 if rows * 2 <= STEP_WIDE and self.plain_steps % RETRY == 0 else 0
        return best


@dataclass
class Pace:
    """Measurements of one engine, and the draft length that they speak for."""

    draft: Times = field(default_factory=Times)
    """The front, once per draft."""
    verify: Times = field(default_factory=Times)
    """The others, on all drafts together."""
    close: Times = field(default_factory=Times)
    """The front again, where all drafts stood, and the choice of the last token."""
    accepted: float = 2.8
    examined: float = 4.0
    """Drafts that the proxy was asked about, decayed; the start is a guess of 0.7."""
    hits: float = 1.0
    guesses: float = 2.0
    """Tokens of earlier passages that the drafter was asked about, decayed."""
    forwards: float = 1.0
    drafted: float = 1.0
    """Forwards of the front per draft: below 1 where earlier passages are guessed right."""
    steps: StepPace = field(default_factory=StepPace)
    """Of the steps that run on a GPU as one."""
    plain_steps: int = 0
    _asked: int = 0
    _steps: int = 0

    @property
    def acceptance(self) -> float:
        """Share of drafts that stand."""
        return self.accepted / self.examined

    def choose(self, rows: int) -> int:
        """The draft length for a step of so many rows."""
        if rows == 0:
            return 0
        for k in TRIED_FIRST:
            if rows * (k + 1) <= TRIED_UP_TO and not self._measured(rows, k) and self._promising(rows, k):
                return k
        best = max(LADDER, key=lambda k: self.speed(rows, k))
        if best == 0 or self.speed(rows, best) < GAIN * self.speed(rows, 0):
            self.plain_steps += 1
            worth = rows * 2 <= TRIED_UP_TO and self.plain_steps % RETRY == 0
            return 1 if worth else 0
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

    def speed(self, rows: int, k: int, verify: float | None = None) -> float:
        """Estimated tokens per second and row with drafts of length k; 0 where nothing is known yet. `verify`
        are the seconds of the verification if they are not to be estimated."""
        a = min(self.acceptance, 0.999)
        tokens = (1 - a ** (k + 1)) / (1 - a)
        all_stood = a**k
        seconds = self.verify.at(rows * (k + 1)) if verify is None else verify
        seconds += k * self.draft.at(rows) * self.forwards / self.drafted
        # one row that needs the closing forward is enough for it to run
        seconds += (1 - (1 - all_stood) ** rows) * self.close.at(max(1.0, rows * all_stood))
        return tokens / seconds if seconds else 0.0

    def saw_drafts(self, rows: int, forwards: int, drafted: int, seconds: float) -> None:
        """The front ran ahead."""
        self.draft.add(rows, seconds / forwards)
        self.forwards = MEMORY * self.forwards + forwards * rows
        self.drafted = MEMORY * self.drafted + drafted

    def saw_acceptance(self, accepted: int, examined: int) -> None:
        """So many of the examined drafts stood."""
        self.accepted = MEMORY * self.accepted + accepted
        self.examined = MEMORY * self.examined + examined

    def saw_guess(self, hits: int, guessed: int) -> None:
        """The drafter agreed with so many of the guessed tokens, and was asked about one more if any is
        left."""
        self.hits = MEMORY * self.hits + hits
        self.guesses = MEMORY * self.guesses + min(guessed, hits + 1)

    def guessing(self) -> bool:
        """Whether earlier passages are worth a guess: not where the drafter disagrees with them."""
        self._asked += 1
        return self.hits > 0.3 * self.guesses or self._asked % 16 == 0
