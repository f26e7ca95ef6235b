"""A base that does not run here, as a decoder knows it."""

from __future__ import annotations

from typing import Protocol

from proxytune.engine.runners import Runner
from proxytune.models import Loaded
from proxytune.records import Prompt


class RemoteBase(Protocol):
    """What takes the place of the base's model."""

    def runner(self, head: Loaded) -> Runner:
        """The base as a model of the engine, in the vocabulary of `head`."""
        ...

    def context(self, prompt: Prompt) -> tuple[int, ...]:
        """Ids that stand for what the base sees before a response."""
        ...
