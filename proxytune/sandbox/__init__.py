"""Runs code that a model wrote: backends, the root that it sees, the worker inside."""

from __future__ import annotations

from proxytune.sandbox.inside.plain import NOT_APART
from proxytune.sandbox.root import MIB
from proxytune.sandbox.sandbox import LOST, Limits, Sandbox
from proxytune.sandbox.talk import Job, Outcome, Program

__all__ = ["LOST", "MIB", "NOT_APART", "Job", "Limits", "Outcome", "Program", "Sandbox"]
