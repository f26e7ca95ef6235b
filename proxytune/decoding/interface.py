"""What decoders have in common for their callers, and what may take the place of a base."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from typing import Protocol

from proxytune.config import AlphaSchedule, Sampling, TraceKind
from proxytune.engine.runners import Runner
from proxytune.models import Loaded, Models, process_peak
from proxytune.records import Completion, Example, JsonRow, Prompt, RoleMemory, WorkerFacts

OnText = Callable[[str, int, str], None]
"""Hears of (example id, sample, new text)."""


class RemoteBase(Protocol):
    """What takes the place of the base's model."""

    def runner(self, head: Loaded) -> Runner:
        """The base as a model of the engine, in the vocabulary of `head`."""
        ...

    def context(self, prompt: Prompt) -> tuple[int, ...]:
        """Ids that stand for what the base sees before a response."""
        ...


class SteppedDecoder(ABC):
    """A decoder of this process, which hands over what each step finished. What callers ask for beside that
    follows from it: all alphas of a call, one of them, and what the process takes."""

    models: Models

    @abstractmethod
    def steps(
        self,
        asked: Sequence[tuple[Example, Sequence[AlphaSchedule]]],
        sampling: Sampling,
        *,
        task: str = "",
        trace: TraceKind = "off",
        forced: str | None = None,
        on_text: OnText | None = None,
    ) -> Generator[list[tuple[AlphaSchedule, Completion]], None, None]:
        """As `sweep`, with what every step finished, which may be nothing."""

    @abstractmethod
    def likelihood_sweep(
        self,
        examples: Sequence[Example],
        texts: Callable[[Example], Sequence[str]],
        alphas: Sequence[AlphaSchedule],
        task: str = "",
    ) -> Generator[tuple[AlphaSchedule, Completion], None, None]:
        """As `likelihoods`, under all alphas."""

    @property
    @abstractmethod
    def memory(self) -> dict[str, RoleMemory]:
        """Bytes per model that runs here."""

    def stream(
        self,
        examples: Sequence[Example],
        sampling: Sampling,
        *,
        alpha: AlphaSchedule | None = None,
        task: str = "",
        trace: TraceKind = "off",
        forced: str | None = None,
        on_text: OnText | None = None,
    ) -> Iterator[Completion]:
        """Completions in the order in which they finish, sampling.n per example.

        `alpha` overrides the system's. `task` and the example's id are part of the randomness key. `forced`
        is text with which every response begins. Raises UserError before anything is decoded if a prompt does
        not fit."""
        strength = self.models.system.alpha if alpha is None else alpha
        asked = [(example, (strength,)) for example in examples]
        found = self.sweep(asked, sampling, task=task, trace=trace, forced=forced, on_text=on_text)
        with closing(found):
            for _, completion in found:
                yield completion

    def sweep(
        self,
        asked: Sequence[tuple[Example, Sequence[AlphaSchedule]]],
        sampling: Sampling,
        *,
        task: str = "",
        trace: TraceKind = "off",
        forced: str | None = None,
        on_text: OnText | None = None,
    ) -> Generator[tuple[AlphaSchedule, Completion], None, None]:
        """As `stream`, for every example under all of its alphas at once, which share the prompt's KV.

        `on_text` does not say which alpha a text is of."""
        steps = self.steps(asked, sampling, task=task, trace=trace, forced=forced, on_text=on_text)
        with closing(steps):
            for finished in steps:
                yield from finished

    def likelihoods(
        self,
        examples: Sequence[Example],
        texts: Callable[[Example], Sequence[str]],
        *,
        alpha: AlphaSchedule | None = None,
        task: str = "",
    ) -> Iterator[Completion]:
        """The log-probability of each of an example's texts after its prompt, as numbered completions.

        A text is tokenised as a continuation; nothing follows it (no end-of-sequence)."""
        strength = self.models.system.alpha if alpha is None else alpha
        found = self.likelihood_sweep(examples, texts, [strength], task)
        with closing(found):
            for _, completion in found:
                yield completion

    @property
    def workers(self) -> dict[str, WorkerFacts]:
        """None: everything is decoded in this process."""
        return {}

    def place(self, example_id: str) -> JsonRow:
        """What this process takes at its fullest, whichever example it was."""
        kv_peak = {name: memory.kv_peak for name, memory in self.memory.items()}
        return {"process_peak": process_peak(), "kv_peak": kv_peak}

    def close(self) -> None:  # noqa: B027  (what has nothing to let go of need not say so)
        """Nothing to let go of: the models are their owner's."""
