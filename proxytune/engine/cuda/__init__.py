"""A decoding step as one CUDA graph, and the loop that starts and reads it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from proxytune.lazy import door

if TYPE_CHECKING:
    from proxytune.engine.cuda.graphs import FUSED_LAYER, OTHER_LAYER, reserve

__all__ = ["FUSED_LAYER", "OTHER_LAYER", "reserve"]

__getattr__ = door(__name__, dict.fromkeys(("FUSED_LAYER", "OTHER_LAYER", "reserve"), "graphs"))
