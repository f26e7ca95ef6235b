"""The miniature world of the demo: its facts, its word problems, its text, and the committed weights of its
models."""

from __future__ import annotations

__all__ = ["corpus", "creatures", "prices", "smoke_data", "sums", "world"]
