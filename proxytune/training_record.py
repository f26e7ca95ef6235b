"""training.json: what an expert was tuned on, how, and how the loss went. It lies beside the weights.

Nothing here imports torch, so that reports can read it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from proxytune.config import ModelSpec
from proxytune.errors import UserError
from proxytune.records import Provenance
from proxytune.run_files import content_of, write_atomically
from proxytune.schema import explain

TRAINING = "training.json"
SYSTEM = "system.yaml"
TRAINING_SCHEMA = 1
"""Version of training.json; raised when a field changes its meaning."""
NAMES_OF_DATA = {"data", "validation", "limit"}
"""Settings that say where the examples are from. What they are decides, by `data_sha256`: a file may move."""
MOST_POINTS = 1000
"""Of a stored curve; of a longer one every n-th is kept."""


class CurvePoint(BaseModel):
    """The losses at one step."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    step: int
    loss: float | None = None
    """Mean cross-entropy, in nats per learned token, of the batches of this step."""
    held_out: float | None = None
    """The same of all held-out examples, after this step."""
    learning_rate: float | None = None


class TuningRequest(BaseModel):
    """What decides the weights. Two trainings with equal requests are the same; resume relies on it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: str
    model: str
    revision: str | None = None
    settings: dict[str, Any]
    """The options, with the method's own where none were given."""
    data_sha256: str

    def difference(self, other: TuningRequest) -> str | None:
        """Which of their settings differ, in words; None where none does."""
        mine, theirs = ({**one.model_dump(exclude={"settings"}), **one.settings} for one in (self, other))
        names = (name for name in mine | theirs if name not in NAMES_OF_DATA)
        found = [name for name in names if mine.get(name) != theirs.get(name)]
        return (
            None if not found else ", ".join(f"{n} {theirs.get(n)!r} -> {mine.get(n)!r}" for n in found[:3])
        )


class TrainingRecord(BaseModel):
    """A training and what it came to."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: int = TRAINING_SCHEMA
    status: Literal["unfinished", "finished"]
    request: TuningRequest
    result: Literal["weights", "adapter"]
    antiexpert: ModelSpec
    """The very model that the expert was tuned from; decoding has to run it as it is here."""
    examples: int
    held_out: int = 0
    tokens: int
    """Of all examples, once."""
    learned: dict[str, int] = Field(default_factory=dict)
    """How often each token is learned, in one pass over the examples."""
    cut: int = 0
    """Examples whose completion was cut at max_length."""
    parameters: int
    trainable: int
    estimated_bytes: float
    """What the estimate before training said of the memory."""
    steps: int = 0
    epochs: float = 0.0
    best_step: int | None = None
    """The step whose weights were kept, where held-out examples decided it."""
    stopped_early: bool = False
    seconds: float = 0.0
    """Of the loop; of its last part where it was resumed."""
    cpu_seconds: float = 0.0
    """CPU time of the process over that loop: it does not depend on what else the machine does."""
    tokens_seen: int = 0
    """Tokens that went through the expert, padding left out."""
    peak_bytes: int = 0
    """Of the process, or of the GPU where there is one, at its largest in the last part."""
    before_bytes: int = 0
    """The same before the model was loaded: what the libraries take."""
    resumed: int = 0
    """How often it went on from a checkpoint."""
    curve: tuple[CurvePoint, ...] = ()
    notes: tuple[str, ...] = ()
    provenance: Provenance

    def write(self, folder: Path) -> None:
        """Write training.json in one step."""
        write_atomically(folder / TRAINING, (self.model_dump_json(indent=1) + "\n").encode())


def read_training(folder: Path) -> TrainingRecord | None:
    """The record in a folder; None if it has none. UserError for a damaged one."""
    path = folder / TRAINING
    if not path.exists():
        return None
    try:
        return TrainingRecord.model_validate_json(content_of(path))
    except ValidationError as error:
        raise UserError(f"'{path}' is damaged: {explain(error)}") from None


def thinned(points: Sequence[CurvePoint]) -> tuple[CurvePoint, ...]:
    """At most about MOST_POINTS of a curve: all with a held-out loss, every n-th of the others, the last."""
    every = -(-len(points) // MOST_POINTS)
    return tuple(
        p
        for place, p in enumerate(points)
        if p.held_out is not None or place % max(every, 1) == 0 or place == len(points) - 1
    )
