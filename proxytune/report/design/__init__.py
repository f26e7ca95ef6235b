"""The design that the report, notebooks and the server's playground share."""

from __future__ import annotations

from proxytune.report.design.shared import THEME, TOKENS, asset, source_hash, styles

__all__ = ["THEME", "TOKENS", "asset", "source_hash", "styles"]
