"""What one call of a decoder carries through the engine, counts, and can end before its end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from proxytune.config import AlphaSchedule
from proxytune.engine import Engine, Request, Result
from proxytune.records import Example, Took
from proxytune.terminal import WorkSoFar


@dataclass
class DecodeStats:
    """What decoding took so far."""

    seconds: float = 0.0
    prefill_seconds: float = 0.0
    """The part of them that went to prompts."""
    prompt_tokens: int = 0
    generated_tokens: int = 0
    preemptions: int = 0
    row_steps: int = 0
    drafted: int = 0
    examined: int = 0
    accepted: int = 0

    def after(self, engine: Engine) -> DecodeStats:
        """These figures and those of an engine."""
        counts = {name: getattr(self, name) + count for name, count in vars(engine.counts).items()}
        return DecodeStats(preemptions=self.preemptions + engine.scheduler.preemptions, **counts)


@dataclass(frozen=True)
class Tag:
    """What a request carries through the engine."""

    example: Example
    sample: int
    alpha: AlphaSchedule

    @property
    def where(self) -> tuple[str, int]:
        """What names the response within a call."""
        return self.example.id, self.sample

    def __repr__(self) -> str:
        return self.example.id


@dataclass(frozen=True)
class Scored:
    """What a given text carries through the engine."""

    example: Example
    number: int
    text: str

    def __repr__(self) -> str:
        return f"{self.example.id}, text {self.number + 1}"


@dataclass
class RunningStream:
    """The responses of one call, by the tickets of its engine."""

    engine: Engine
    tickets: dict[tuple[str, int], list[int]] = field(default_factory=dict)
    finished: int = 0
    finished_tokens: int = 0
    shared: Took = field(default_factory=Took)
    """The time that was shared out to responses, and the tokens of those."""

    def submit(self, request: Request) -> None:
        """One more response is to be made."""
        assert isinstance(request.tag, Tag)
        self.tickets.setdefault(request.tag.where, []).append(self.engine.submit(request))

    def ended(self, result: Result) -> None:
        """One of them is finished."""
        self.finished += 1
        self.finished_tokens += len(result.tokens)

    def took(self, results: Sequence[Result], target: str) -> list[Took]:
        """What each response took that has just ended.

        Of the time that is not shared out yet it takes its part by tokens: of decoding by the tokens
        generated so far, of prefill by the prompts that were begun. The last one takes what is left."""
        counts, found = self.engine.counts, []
        prompts = [len(result.request.contexts[target]) for result in results]
        begun = sum(prompts) + sum(len(r.request.contexts[target]) for r in self.engine.scheduler.rows)
        for result, prompt in zip(results, prompts, strict=True):
            before, tokens = self.shared, len(result.tokens)
            prefill = (counts.prefill_seconds - before.prefill_seconds) * prompt / begun
            decode = counts.seconds - counts.prefill_seconds - (before.seconds - before.prefill_seconds)
            seconds = prefill + decode * tokens / max(counts.generated_tokens - before.generated_tokens, 1)
            begun -= prompt
            self.shared = Took(
                seconds=before.seconds + seconds,
                prefill_seconds=before.prefill_seconds + prefill,
                generated_tokens=before.generated_tokens + tokens,
            )
            found.append(Took(seconds, prefill, prompt, tokens, **vars(result.counts)))
        return found

    def cancel(self, example_id: str, sample: int | None) -> bool:
        """As `Decoder.cancel`."""
        asked = [
            ticket
            for (name, number), tickets in self.tickets.items()
            if name == example_id and sample in (None, number)
            for ticket in tickets
        ]
        return any([self.engine.cancel(ticket) for ticket in asked])

    def work(self) -> WorkSoFar:
        """What is known of them."""
        scheduler, counts = self.engine.scheduler, self.engine.counts
        return WorkSoFar(
            finished=self.finished,
            finished_tokens=self.finished_tokens,
            open=tuple(
                (len(row.tokens), row.request.max_new_tokens)
                for row in (*scheduler.rows, *tuple(scheduler.waiting))
            ),
            unread=sum(not row.tokens for row in tuple(scheduler.waiting)),
            decode_seconds=counts.seconds - counts.prefill_seconds,
            prefill_seconds=counts.prefill_seconds,
        )


@dataclass
class ScoringTexts:
    """The texts of one call that are scored."""

    left: int
    ended: int = 0
    seconds: float = 0.0

    def add(self, seconds: float, *, ended: bool) -> None:
        """Time went by, and one more may be scored."""
        self.seconds += seconds
        self.ended += ended
        self.left -= ended

    def work(self) -> WorkSoFar:
        """What is known of them."""
        return WorkSoFar(finished=self.ended, unread=self.left, prefill_seconds=self.seconds, scoring=True)
