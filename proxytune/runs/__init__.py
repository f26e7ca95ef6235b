"""Runs: evaluate, continue, sweep, judge."""
