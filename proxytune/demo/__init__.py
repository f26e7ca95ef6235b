"""The miniature world of the demo: facts, sums, prices and creatures, and the texts made of them."""

from __future__ import annotations

from proxytune.demo.world import TELLING, World

__all__ = ["TELLING", "World", "corpus", "creatures", "prices", "smoke_data", "sums", "world"]
