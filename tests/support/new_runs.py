"""Runs that have just begun."""

from __future__ import annotations

from typing import Any

from proxytune.config import ModelSpec, RunSpec, Sampling, System, parse_alpha
from proxytune.records import Run
from tests.support.made_runs import MADE

SYSTEM = System(name="tiny", base=ModelSpec(model="nowhere"))


def spec(**changes: Any) -> RunSpec:
    """The RunSpec of these tests with some settings changed."""
    whole: dict[str, Any] = {
        "task": "gsm", "system": SYSTEM, "role": "base", "alpha": parse_alpha(1), "sampling": Sampling(),
        "data": "generated", "data_sha256": "0" * 64, **changes,
    }  # fmt: skip
    return RunSpec(**whole)


def new(**changes: Any) -> Run:
    """A Run that has just begun."""
    return Run(status="running", spec=spec(**changes), headline="exact_match", started="now", made=MADE)
