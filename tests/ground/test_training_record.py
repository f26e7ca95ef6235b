"""training.json: what makes two trainings the same, and what is kept of a long curve."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from proxytune.config import ModelSpec
from proxytune.errors import UserError
from proxytune.training_record import (
    MOST_POINTS,
    TRAINING,
    CurvePoint,
    TrainingRecord,
    TuningRequest,
    read_training,
    thinned,
)
from tests.support.made_runs import MADE


def request(**changes: Any) -> TuningRequest:
    """A request with some parts changed; `settings` by name."""
    usual: dict[str, Any] = {"method": "lora", "model": "m", "revision": None, "data_sha256": "0"}
    settings: dict[str, Any] = {"rate": 0.1, "epochs": 2, "seed": 0}
    known = {name: value for name, value in changes.items() if name in usual}
    settings |= {name: value for name, value in changes.items() if name not in usual}
    return TuningRequest(**{**usual, **known}, settings=settings)


def test_the_same_request_differs_in_nothing() -> None:
    assert request().difference(request()) is None


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"method": "full"}, "method 'lora' -> 'full'"),
        ({"model": "n"}, "model 'm' -> 'n'"),
        ({"revision": "r"}, "revision None -> 'r'"),
        ({"data_sha256": "1"}, "data_sha256 '0' -> '1'"),
        ({"rate": 0.2}, "rate 0.1 -> 0.2"),
        ({"seed": None}, "seed 0 -> None"),
        ({"more": 3}, "more None -> 3"),
        ({"model": "n", "rate": 0.2}, "model 'm' -> 'n', rate 0.1 -> 0.2"),
        (
            {"method": "full", "model": "n", "rate": 0.2, "seed": 9},
            "method 'lora' -> 'full', model 'm' -> 'n', rate 0.1 -> 0.2",
        ),
    ],
)
def test_what_differs_is_told_from_there_to_here(change: dict[str, Any], says: str) -> None:
    assert request(**change).difference(request()) == says
    assert request().difference(request(**change)) is not None
    assert request(more=3).difference(request(other=4)) == "more None -> 3, other 4 -> None"


def curve(length: int, held_out: tuple[int, ...] = ()) -> list[CurvePoint]:
    """A curve of so many steps, with a held-out loss at some."""
    return [CurvePoint(step=at, held_out=0.5 if at in held_out else None) for at in range(length)]


@pytest.mark.parametrize(
    ("length", "held_out", "steps"),
    [
        (0, (), []),
        (1, (), [0]),
        (3, (), [0, 1, 2]),
        (1000, (), [*range(1000)]),
        (1001, (), [*range(0, 1001, 2)]),
        (1002, (), [*range(0, 1001, 2), 1001]),
        (2001, (4, 5), sorted({*range(0, 2001, 3), 4, 5, 2000})),
    ],
)
def test_a_long_curve_is_thinned(length: int, held_out: tuple[int, ...], steps: list[int]) -> None:
    assert MOST_POINTS == 1000
    assert [point.step for point in thinned(curve(length, held_out))] == steps


def test_what_is_written_is_read(tmp_path: Path) -> None:
    assert read_training(tmp_path) is None
    record = TrainingRecord(
        status="unfinished", request=request(), result="adapter", antiexpert=ModelSpec(model="m"), examples=3,
        tokens=9, parameters=10, trainable=2, estimated_bytes=1.5, provenance=MADE,
    )  # fmt: skip
    record.write(tmp_path)
    assert TRAINING == "training.json" and read_training(tmp_path) == record
    assert (tmp_path / TRAINING).read_bytes().endswith(b"}\n")
    usual = {
        "schema_version": 1, "held_out": 0, "learned": {}, "cut": 0, "steps": 0, "epochs": 0.0,
        "best_step": None, "stopped_early": False, "seconds": 0.0, "cpu_seconds": 0.0, "tokens_seen": 0,
        "peak_bytes": 0, "before_bytes": 0, "resumed": 0, "curve": (), "notes": (),
    }  # fmt: skip
    assert record.model_dump(include=set(usual)) == usual
    (tmp_path / TRAINING).write_text('{"status": "done"}')
    with pytest.raises(UserError, match=r"training\.json' is damaged: .* \(and \d+ more\)$"):
        read_training(tmp_path)
