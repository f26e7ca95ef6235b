"""Which decoder serves a role, and the consent to what it costs where the base is behind an API."""

from __future__ import annotations

from typing import TYPE_CHECKING

from proxytune.lazy import door

if TYPE_CHECKING:
    from proxytune.runs.decoders.choice import AnyDecoder, client_of, consent, decoder_for

__all__ = ["AnyDecoder", "client_of", "consent", "decoder_for"]

__getattr__ = door(__name__, dict.fromkeys(__all__, "choice"))
