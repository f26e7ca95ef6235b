"""Loads models: their weights, adapters, vocabularies, and the path that each may take."""

from __future__ import annotations

from typing import TYPE_CHECKING

from proxytune.lazy import door

if TYPE_CHECKING:
    from proxytune.models.checkpoint import load_config, resolve
    from proxytune.models.loading import Loaded, Models
    from proxytune.models.memory import free_memory, weights_needed
    from proxytune.models.vocabulary import Tokenizer

__all__ = ["Loaded", "Models", "Tokenizer", "free_memory", "load_config", "resolve", "weights_needed"]

__getattr__ = door(
    __name__,
    {
        "Loaded": "loading",
        "Models": "loading",
        "Tokenizer": "vocabulary",
        "free_memory": "memory",
        "load_config": "checkpoint",
        "resolve": "checkpoint",
        "weights_needed": "memory",
    },
)
