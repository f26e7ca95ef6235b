"""Runs code that a model wrote: backends, the root that it sees, the worker inside."""
