"""One model behind two operations: run a forward over ragged rows, and move those rows about."""

from __future__ import annotations

from proxytune.engine.runners import lora
from proxytune.engine.runners.lora import SharedLora
from proxytune.engine.runners.reference import ReferenceRunner
from proxytune.engine.runners.runner import ModelRunner, Runner, Work, feed
from proxytune.engine.runners.vocab_map import VocabMap

__all__ = [
    "ModelRunner",
    "ReferenceRunner",
    "Runner",
    "SharedLora",
    "VocabMap",
    "Work",
    "feed",
    "lora",
]
