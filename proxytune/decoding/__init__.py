"""Where text meets the engine: prompts, stop strings, streams, and the decoder of a role."""

from __future__ import annotations

from typing import TYPE_CHECKING

from proxytune.lazy import door

if TYPE_CHECKING:
    from proxytune.decoding.call import DecodeStats
    from proxytune.decoding.decoder import Decoder
    from proxytune.decoding.prompts import templated
    from proxytune.decoding.remarks import notes_on, stored_response
    from proxytune.decoding.templates import TemplateFault

__all__ = ["DecodeStats", "Decoder", "TemplateFault", "notes_on", "stored_response", "templated"]

__getattr__ = door(
    __name__,
    {
        "DecodeStats": "call",
        "Decoder": "decoder",
        "TemplateFault": "templates",
        "notes_on": "remarks",
        "stored_response": "remarks",
        "templated": "prompts",
    },
)
