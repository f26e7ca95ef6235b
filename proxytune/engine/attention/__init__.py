"""Attention over packed tokens of ragged rows, as Hugging Face modules call it."""

from __future__ import annotations

from proxytune.engine.attention.attention import NAME, Discovery, Forward, MissingContext, attend
from proxytune.engine.attention.fused_forward import FusedForward
from proxytune.engine.attention.llama_forward import LlamaForward

__all__ = ["NAME", "Discovery", "Forward", "FusedForward", "LlamaForward", "MissingContext", "attend"]
