"""Where text meets the engine: prompts, stop strings, streams, and the decoder of a role."""

from __future__ import annotations

from typing import TYPE_CHECKING

from proxytune.lazy import door

if TYPE_CHECKING:
    from proxytune.decoding.conversations import Conversation
    from proxytune.decoding.decoder import Decoder
    from proxytune.decoding.interface import SteppedDecoder
    from proxytune.decoding.prompts import ids_of, opened
    from proxytune.decoding.remarks import notes_on, stored_response
    from proxytune.decoding.sample import sample_context

__all__ = [
    "Conversation",
    "Decoder",
    "SteppedDecoder",
    "ids_of",
    "notes_on",
    "opened",
    "sample_context",
    "stored_response",
]

__getattr__ = door(
    __name__,
    {
        "Conversation": "conversations",
        "Decoder": "decoder",
        "SteppedDecoder": "interface",
        "ids_of": "prompts",
        "notes_on": "remarks",
        "opened": "prompts",
        "sample_context": "sample",
        "stored_response": "remarks",
    },
)
