"""Stored runs as tables, charts and a page. No model is loaded."""

from __future__ import annotations

__all__ = ["design", "escape", "examples", "notebook", "page", "paper_tables", "tables"]
