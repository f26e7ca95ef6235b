"""`proxytune init`, and the files that it writes, which work as they are."""

from __future__ import annotations

from proxytune.cli.init.command import init

__all__ = ["init"]
