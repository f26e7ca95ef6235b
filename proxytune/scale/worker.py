"""One worker: a process with the models and an engine of its own, which decodes what it is sent."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from proxytune import __version__
from proxytune.config import AlphaSchedule, Role, System
from proxytune.errors import UserError
from proxytune.options import DecodeOptions
from proxytune.records import Completion, Example, WorkerFacts
from proxytune.scale.parts import AskedExample, Found, Settings, WorkerState, by_alphas, whole


@dataclass(frozen=True)
class WorkerSetup:
    """What a worker loads."""

    system: System
    role: Role
    decode: DecodeOptions
    agreement: bool = False
    trust_remote_code: bool = False


class Worker:
    """What runs as an actor. It knows nothing of Ray."""

    def __init__(self, setup: WorkerSetup) -> None:
        self.setup = setup

    def load(self) -> WorkerState:
        """Load the models -> what this worker is. UserError where the machine it runs on lacks something."""
        import torch

        from proxytune.decoding import Decoder
        from proxytune.models import Models

        setup = self.setup
        where = socket.gethostname()
        try:
            models = Models(setup.system, trust_remote_code=setup.trust_remote_code)
            self.decoder = Decoder(models, setup.role, setup.decode, agreement=setup.agreement)
        except UserError as error:
            raise UserError(f"the worker on {where}: {error}") from None
        device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu"
        facts = WorkerFacts(host=where, pid=os.getpid(), device=device, log=_log())
        return WorkerState(facts, tuple(self.decoder.notes()), self.decoder.memory, __version__)

    def decode(self, part: Sequence[AskedExample], settings: Settings) -> Iterator[Found]:
        """Every example under every alpha, as soon as it is whole."""
        from proxytune.models import process_peak

        counts = {
            one.example.id: settings.sampling.n if one.texts is None else len(one.texts) for one in part
        }
        for key, completions in whole(self._stream(part, settings), counts):
            yield Found(
                key, completions, tuple(self.decoder.remarks), process_peak(), dict(self.decoder.memory)
            )

    def _stream(
        self, part: Sequence[AskedExample], settings: Settings
    ) -> Iterator[tuple[AlphaSchedule, Completion]]:
        generated = [(one.example, one.alphas) for one in part if one.texts is None]
        if generated:
            yield from self.decoder.sweep(
                generated,
                settings.sampling,
                task=settings.task,
                trace=settings.trace,
                forced=settings.forced,
            )
        texts = {one.example.id: one.texts for one in part if one.texts is not None}

        def texts_of(example: Example) -> Sequence[str]:
            return texts[example.id]

        for alphas, group in by_alphas([one for one in part if one.texts is not None]).items():
            examples = [one.example for one in group]
            yield from self.decoder.likelihood_sweep(examples, texts_of, alphas, settings.task)


def _log() -> str | None:
    """The file that this process writes its messages to, where the system says so."""
    found = Path("/proc/self/fd/2")
    return str(found.resolve()) if found.exists() and found.resolve().is_file() else None
