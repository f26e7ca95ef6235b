"""Tasks of one's own, in a Python file, and what runs of them still tell where that file is not read."""

from __future__ import annotations

from proxytune.tasks.own.facts import facts_of
from proxytune.tasks.own.files import read_task

__all__ = ["facts_of", "read_task"]
