"""Runs: evaluate, continue, sweep, judge."""

from __future__ import annotations

from typing import TYPE_CHECKING

from proxytune.lazy import door

if TYPE_CHECKING:
    from proxytune.runs.evaluation import evaluate
    from proxytune.runs.steered import generate, load

__all__ = [
    "alpha_sweep",
    "evaluate",
    "evaluation",
    "generate",
    "judging",
    "load",
    "session",
    "verdicts",
]

__getattr__ = door(__name__, {"evaluate": "evaluation", "generate": "steered", "load": "steered"})
