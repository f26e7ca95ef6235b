"""What decodes the examples of a run: the models of this process, a base behind an API, or workers elsewhere;
and the consent to what it costs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from proxytune.lazy import door

if TYPE_CHECKING:
    from proxytune.runs.decoders.choice import AnyDecoder, client_of, consent, decoder_for, decoder_here
    from proxytune.runs.decoders.run_decoder import OpenDecoder, RunDecoder

__all__ = ["AnyDecoder", "OpenDecoder", "RunDecoder", "client_of", "consent", "decoder_for", "decoder_here"]

__getattr__ = door(
    __name__,
    {
        **dict.fromkeys(["AnyDecoder", "client_of", "consent", "decoder_for", "decoder_here"], "choice"),
        **dict.fromkeys(["OpenDecoder", "RunDecoder"], "run_decoder"),
    },
)
