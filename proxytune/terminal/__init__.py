"""What people see while proxytune works: text of others made harmless, the progress line, the time left."""

from __future__ import annotations

from typing import TYPE_CHECKING

from proxytune.lazy import door

if TYPE_CHECKING:
    from proxytune.terminal.progress import Progress
    from proxytune.terminal.text import json_text, put, say, show, visible, write_data
    from proxytune.terminal.time_left import WorkSoFar

__all__ = ["Progress", "WorkSoFar", "json_text", "put", "say", "show", "visible", "write_data"]

__getattr__ = door(
    __name__,
    {
        "Progress": "progress",
        "WorkSoFar": "time_left",
        "json_text": "text",
        "put": "text",
        "say": "text",
        "show": "text",
        "visible": "text",
        "write_data": "text",
    },
)
