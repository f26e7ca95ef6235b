"""Where text meets the engine: prompts, stop strings, streams, and the decoder of a role."""

from __future__ import annotations

from typing import TYPE_CHECKING

from proxytune.lazy import door

if TYPE_CHECKING:
    from proxytune.decoding.conversations import Conversation
    from proxytune.decoding.decoder import Decoder
    from proxytune.decoding.open_batch import Asked, OpenBatch
    from proxytune.decoding.prompts import opened
    from proxytune.decoding.remarks import notes_on, stored_response
    from proxytune.decoding.sample import sample_context

__all__ = [
    "Asked",
    "Conversation",
    "Decoder",
    "OpenBatch",
    "notes_on",
    "opened",
    "sample_context",
    "stored_response",
]

__getattr__ = door(
    __name__,
    {
        "Asked": "open_batch",
        "Conversation": "conversations",
        "Decoder": "decoder",
        "OpenBatch": "open_batch",
        "notes_on": "remarks",
        "opened": "prompts",
        "sample_context": "sample",
        "stored_response": "remarks",
    },
)
