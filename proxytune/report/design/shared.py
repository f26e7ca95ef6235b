"""What the pages of proxytune share: their design, the token view, and what lets exactly our scripts run. The
report, notebooks and the server's playground are made of it."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path

SHARED_STYLES = ("design.css", "tokens.css")
THEME = "theme.js"
"""Runs before anything is painted."""
TOKENS = "tokens.js"


def asset(name: str) -> str:
    """A file of proxytune/report/assets."""
    return (Path(__file__).parent.parent / "assets" / name).read_text(encoding="utf-8")


def styles(own: str) -> str:
    """The shared styles, and a page's own behind them."""
    return "\n".join([*map(asset, SHARED_STYLES), own])


def source_hash(text: str) -> str:
    """The source expression of a Content-Security-Policy that allows exactly this script, or style."""
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return f"'sha256-{digest}'"
