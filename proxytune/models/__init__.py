"""Loads models: their weights, adapters, vocabularies, and the path that each may take."""
