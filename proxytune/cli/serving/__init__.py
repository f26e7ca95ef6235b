"""`proxytune serve`."""

from __future__ import annotations

from proxytune.cli.serving.command import serve

__all__ = ["serve"]
