"""Decoding in ids and logits: what decodes together, in which order, and which token comes next.

It knows no text, file or hub: ids go in, ids come out. The door opens on first use, so that the scheduler and
the records need no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from proxytune.lazy import door

if TYPE_CHECKING:
    from proxytune.engine.engine import Engine
    from proxytune.engine.ensemble import Ensemble, Term
    from proxytune.engine.likelihood import Continuation, likelihoods
    from proxytune.engine.request import Request, Result
    from proxytune.engine.speculative.drafter import Speculation

__all__ = ["Continuation", "Engine", "Ensemble", "Request", "Result", "Speculation", "Term", "likelihoods"]

__getattr__ = door(
    __name__,
    {
        "Engine": "engine",
        "Ensemble": "ensemble",
        "Term": "ensemble",
        "Request": "request",
        "Result": "request",
        "Speculation": "speculative.drafter",
        "Continuation": "likelihood",
        "likelihoods": "likelihood",
    },
)
