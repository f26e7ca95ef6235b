"""Machines with little memory."""

from __future__ import annotations

import pytest


def leave_free(patch: pytest.MonkeyPatch, count: int) -> None:
    """So many bytes are free, wherever a model goes."""
    for place in ("models.memory", "models.loading", "checks.system"):
        patch.setattr(f"proxytune.{place}.free_memory", lambda where=None: count)
