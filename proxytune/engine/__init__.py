"""Decoding in ids and logits: what decodes together, in which order, and which token comes next.

It knows no text, file or hub: ids go in, ids come out. The door opens on first use, so that the scheduler and
the records need no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from proxytune.lazy import door

if TYPE_CHECKING:
    from proxytune.engine.engine import Chosen, Engine
    from proxytune.engine.ensemble import Ensemble, Term
    from proxytune.engine.likelihood import Continuation, likelihoods
    from proxytune.engine.request import Request, Result

__all__ = ["Chosen", "Continuation", "Engine", "Ensemble", "Request", "Result", "Term", "likelihoods"]

__getattr__ = door(
    __name__,
    {
        "Chosen": "engine",
        "Engine": "engine",
        "Ensemble": "ensemble",
        "Term": "ensemble",
        "Request": "request",
        "Result": "request",
        "Continuation": "likelihood",
        "likelihoods": "likelihood",
    },
)
