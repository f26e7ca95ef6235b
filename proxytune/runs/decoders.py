"""What decodes the examples of a run: a decoder in this process, or whatever decodes as one does."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Protocol

from proxytune.config import AlphaSchedule, RunSpec, Sampling, TraceKind
from proxytune.decoding import Decoder
from proxytune.models import Models
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

    def sweep(
        self,
        asked: Sequence[tuple[Example, Sequence[AlphaSchedule]]],
        sampling: Sampling,
        *,
        task: str = "",
        trace: TraceKind = "off",
        forced: str | None = None,
    ) -> Generator[tuple[AlphaSchedule, Completion], None, None]:
        """The completions of every example under each of its alphas, in the order in which they finish."""

    def likelihood_sweep(
        self,
        examples: Sequence[Example],
        texts: Callable[[Example], Sequence[str]],
        alphas: Sequence[AlphaSchedule],
        task: str = "",
    ) -> Generator[tuple[AlphaSchedule, Completion], None, None]:
        """The log-probabilities of each example's texts under every alpha."""

    def close(self) -> None:
        """Let go of what is held beside the models."""


OpenDecoder = Callable[[RunSpec, DecodeOptions], RunDecoder]
"""Makes what decodes a run; UserError where it cannot."""


def decoder_here(models: Models) -> OpenDecoder:
    """Decode in this process."""

    def opened(spec: RunSpec, how: DecodeOptions) -> RunDecoder:
        return Decoder(models, spec.role, how, agreement=spec.trace == "agreement")

    return opened
