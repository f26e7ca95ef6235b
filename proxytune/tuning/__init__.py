"""Makes experts: the methods behind `proxytune tune`, and the demo's own models."""

from __future__ import annotations

from typing import TYPE_CHECKING

from proxytune.lazy import door

if TYPE_CHECKING:
    from proxytune.tuning.methods import METHODS
    from proxytune.tuning.options import METHOD_HELP, TuneOptions, left_out, read_settings
    from proxytune.tuning.session import plan, tune
    from proxytune.tuning.shrink import without_layers

__all__ = [
    "METHODS",
    "METHOD_HELP",
    "TuneOptions",
    "left_out",
    "plan",
    "read_settings",
    "tune",
    "without_layers",
]

__getattr__ = door(
    __name__,
    {
        "METHODS": "methods",
        "METHOD_HELP": "options",
        "TuneOptions": "options",
        "left_out": "options",
        "plan": "session",
        "read_settings": "options",
        "tune": "session",
        "without_layers": "shrink",
    },
)
