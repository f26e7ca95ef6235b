"""A batch that responses join and leave between two steps: what a server decodes in."""

from __future__ import annotations

from proxytune.decoding.open_batch.batch import Asked, OpenBatch, ScoredText
from proxytune.decoding.open_batch.responses import Piece, SeenToken

__all__ = ["Asked", "OpenBatch", "Piece", "ScoredText", "SeenToken"]
