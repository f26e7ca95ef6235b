"""Makes experts: the methods behind `proxytune tune`, and the demo's own models."""

from __future__ import annotations

from typing import TYPE_CHECKING

from proxytune.lazy import door

if TYPE_CHECKING:
    from proxytune.tuning.methods import METHODS
    from proxytune.tuning.options import TuneOptions, read_settings
    from proxytune.tuning.session import TuneJob, plan, tune

__all__ = ["METHODS", "TuneJob", "TuneOptions", "plan", "read_settings", "tune"]

__getattr__ = door(
    __name__,
    {
        "METHODS": "methods",
        "TuneJob": "session",
        "TuneOptions": "options",
        "plan": "session",
        "read_settings": "options",
        "tune": "session",
    },
)
