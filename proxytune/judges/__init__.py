"""Who judges responses: a toxicity classifier, truth judges, a pairwise judge behind an API."""

from __future__ import annotations

from typing import TYPE_CHECKING

from proxytune.lazy import door

if TYPE_CHECKING:
    from proxytune.judges.judge import Estimate, Judge, OnProgress
    from proxytune.judges.kinds import JUDGES

__all__ = ["JUDGES", "Estimate", "Judge", "OnProgress"]

__getattr__ = door(
    __name__, {"JUDGES": "kinds", "Estimate": "judge", "Judge": "judge", "OnProgress": "judge"}
)
