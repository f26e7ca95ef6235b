"""Loads models: their weights, adapters, vocabularies, and the path that each may take."""

from __future__ import annotations

from typing import TYPE_CHECKING

from proxytune.lazy import door

if TYPE_CHECKING:
    from proxytune.models.loading import Classifier
    from proxytune.models.memory import free_memory, process_peak
    from proxytune.models.roles import Loaded, Models
    from proxytune.models.vocabulary import Tokenizer

__all__ = [
    "Classifier",
    "Loaded",
    "Models",
    "Tokenizer",
    "checkpoint",
    "free_memory",
    "plain",
    "process_peak",
]

__getattr__ = door(
    __name__,
    {
        "Classifier": "loading",
        "Loaded": "roles",
        "Models": "roles",
        "Tokenizer": "vocabulary",
        "free_memory": "memory",
        "process_peak": "memory",
    },
)
