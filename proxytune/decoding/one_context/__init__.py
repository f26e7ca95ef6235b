"""The texts of a decoder in whose engine all models see one sequence of ids."""

from __future__ import annotations

from proxytune.decoding.one_context.texts import OneContext

__all__ = ["OneContext"]
