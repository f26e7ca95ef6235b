"""Speculative decoding: who drafts, and how far."""

from __future__ import annotations

from proxytune.engine.speculative.drafter import Speculation

__all__ = ["Speculation"]
