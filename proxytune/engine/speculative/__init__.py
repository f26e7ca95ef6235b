"""Speculative decoding: who drafts, and how far."""
