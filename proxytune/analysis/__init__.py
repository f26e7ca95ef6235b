"""The paper's analyses of stored runs and traces. No model is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from proxytune.lazy import door

if TYPE_CHECKING:
    from proxytune.analysis.analysis import Analysis, published, read_once

__all__ = ["Analysis", "failures", "listing", "positions", "published", "read_once", "sweeps", "tokens"]

__getattr__ = door(__name__, {"Analysis": "analysis", "published": "analysis", "read_once": "analysis"})
