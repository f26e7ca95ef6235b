"""Runs code that a model wrote: backends, the root that it sees, the worker inside."""

from __future__ import annotations

from proxytune.sandbox.root import MIB
from proxytune.sandbox.sandbox import LOST, Job, Limits, Outcome, Program, Sandbox

__all__ = ["LOST", "MIB", "Job", "Limits", "Outcome", "Program", "Sandbox"]
