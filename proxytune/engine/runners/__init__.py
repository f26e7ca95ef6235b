"""One model behind two operations: run a forward over ragged rows, and move those rows about."""

from __future__ import annotations

from proxytune.engine.runners.lora import SharedLora, SpanLora, SpanMismatch
from proxytune.engine.runners.reference import ReferenceRunner
from proxytune.engine.runners.runner import ModelRunner, Runner, feed
from proxytune.engine.runners.vocab_map import VocabMap

__all__ = [
    "ModelRunner",
    "ReferenceRunner",
    "Runner",
    "SharedLora",
    "SpanLora",
    "SpanMismatch",
    "VocabMap",
    "feed",
]
