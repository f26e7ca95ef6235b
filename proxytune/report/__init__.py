"""Stored runs as tables, charts and a page. No model is loaded."""
