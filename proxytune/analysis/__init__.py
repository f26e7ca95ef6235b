"""The paper's analyses of stored runs and traces. No model is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from proxytune.lazy import door

if TYPE_CHECKING:
    from proxytune.analysis.analysis import Analysis, published
    from proxytune.analysis.listing import ListedRun

__all__ = ["Analysis", "ListedRun", "failures", "listing", "positions", "published", "sweeps", "tokens"]

__getattr__ = door(__name__, {"Analysis": "analysis", "ListedRun": "listing", "published": "analysis"})
