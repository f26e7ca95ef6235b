"""Attention over packed tokens of ragged rows, as Hugging Face modules call it."""
