"""The miniature world of the demo: facts, sums, prices and creatures, and the texts made of them."""

from __future__ import annotations

from proxytune.demo.world import World

__all__ = ["TELLING", "World", "corpus", "creatures", "prices", "smoke_data", "sums", "world"]

TELLING = {"gsm": (22, 23, 16), "truthfulqa": (1,)}
"""Items of the generated tasks of which one answer shows what the demo is about: base and proxy differ, and
the proxy is right."""
