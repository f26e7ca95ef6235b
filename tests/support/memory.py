"""Machines with little memory."""

from __future__ import annotations

import pytest


def leave_free(patch: pytest.MonkeyPatch, count: int) -> None:
    """So many bytes are free, wherever a model goes."""
    for place in ("memory", "loading"):
        patch.setattr(f"proxytune.models.{place}.free_memory", lambda where=None: count)
