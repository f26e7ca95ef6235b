"""The paper's published figures, the recipes that reproduce them, and what a recipe costs."""

from __future__ import annotations

__all__ = ["cost", "published", "recipes"]
