"""What decodes the examples of a run: a decoder in this process, or whatever decodes as one does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

from proxytune.config import AlphaSchedule, RunSpec, Sampling, TraceKind
from proxytune.options import DecodeOptions
from proxytune.records import Completion, Example, JsonRow, RoleMemory, WorkerFacts
from proxytune.terminal import WorkSoFar


class RunDecoder(Protocol):
    """Decodes as the role of a run."""

    @property
    def remarks(self) -> list[str]:
        """What was done to prompts or runs that a reader of the responses should know; it comes as they are
        read."""

    @property
    def memory(self) -> Mapping[str, RoleMemory]:
        """Bytes per model, in one process."""

    @property
    def workers(self) -> Mapping[str, WorkerFacts]:
        """The processes that decode beside this one."""

    def notes(self) -> list[str]:
        """What a user should know about how the models are run."""

    def work(self) -> WorkSoFar:
        """What is known of the call that is going on."""

    def place(self, example_id: str) -> JsonRow:
        """Where an example was decoded, and what that took at its fullest."""

    def stream(
        self,
        examples: Sequence[Example],
        sampling: Sampling,
        *,
        alpha: AlphaSchedule | None = None,
        task: str = "",
        trace: TraceKind = "off",
        forced: str | None = None,
    ) -> Iterator[Completion]:
        """The completions of every example, in the order in which they finish."""

    def likelihoods(
        self,
        examples: Sequence[Example],
        texts: Callable[[Example], Sequence[str]],
        *,
        alpha: AlphaSchedule | None = None,
        task: str = "",
    ) -> Iterator[Completion]:
        """The log-probabilities of each example's texts."""

    def sweep(
        self,
        asked: Sequence[tuple[Example, Sequence[AlphaSchedule]]],
        sampling: Sampling,
        *,
        task: str = "",
        trace: TraceKind = "off",
        forced: str | None = None,
    ) -> Iterator[tuple[AlphaSchedule, Completion]]:
        """As `stream`, for every example under all of its alphas."""

    def likelihood_sweep(
        self,
        examples: Sequence[Example],
        texts: Callable[[Example], Sequence[str]],
        alphas: Sequence[AlphaSchedule],
        task: str = "",
    ) -> Iterator[tuple[AlphaSchedule, Completion]]:
        """As `likelihoods`, under all alphas."""

    def close(self) -> None:
        """Let go of what is held beside the models."""


OpenDecoder = Callable[[RunSpec, DecodeOptions], RunDecoder]
"""Makes what decodes a run; UserError where it cannot."""
