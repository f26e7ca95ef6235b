"""Stored runs as tables, charts and a page. No model is loaded."""

from __future__ import annotations

__all__ = ["escape", "examples", "page", "paper_tables", "readme_table", "tables"]
