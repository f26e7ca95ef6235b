"""Where this checkout is, and its package in another process."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
WEIGHTS = ROOT / "proxytune" / "demo" / "weights" / "base"
"""One of the demo's models."""


def environment(**more: str) -> dict[str, str]:
    """The variables with which another process imports this checkout's proxytune."""
    return {**os.environ, "PYTHONPATH": str(ROOT), **more}
