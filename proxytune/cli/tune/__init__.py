"""`proxytune tune`: one command per method, and `merge`."""

from __future__ import annotations

from proxytune.cli.tune.command import tune

__all__ = ["tune"]
