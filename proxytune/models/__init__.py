"""Loads models: their weights, adapters, vocabularies, and the path that each may take."""

from __future__ import annotations

from typing import TYPE_CHECKING

from proxytune.lazy import door

if TYPE_CHECKING:
    from proxytune.models.checkpoint import load_config, resolve
    from proxytune.models.memory import free_memory, process_peak, weights_needed
    from proxytune.models.roles import Loaded, Models
    from proxytune.models.vocabulary import Tokenizer

__all__ = [
    "Loaded",
    "Models",
    "Tokenizer",
    "free_memory",
    "load_config",
    "process_peak",
    "resolve",
    "weights_needed",
]

__getattr__ = door(
    __name__,
    {
        "Loaded": "roles",
        "Models": "roles",
        "Tokenizer": "vocabulary",
        "free_memory": "memory",
        "load_config": "checkpoint",
        "process_peak": "memory",
        "resolve": "checkpoint",
        "weights_needed": "memory",
    },
)
