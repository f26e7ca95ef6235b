"""Runs: evaluate, continue, sweep, judge. A system that is loaded, and a conversation with it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from proxytune.lazy import door

if TYPE_CHECKING:
    from proxytune.runs.chat import Chat
    from proxytune.runs.evaluation import evaluate
    from proxytune.runs.steered import load

__all__ = [
    "Chat",
    "alpha_sweep",
    "evaluate",
    "evaluation",
    "judging",
    "load",
    "session",
    "verdicts",
]

__getattr__ = door(__name__, {"Chat": "chat", "evaluate": "evaluation", "load": "steered"})
