"""Decoding in ids and logits: what decodes together, in which order, and which token comes next."""
