"""What a format of another tool is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Format:
    """The files of another tool."""

    summary: str
    """What is written, in a few words."""
    files: Callable[[Path], Mapping[str, bytes]]
    """The folder of a run -> file names and their content."""
    then: Callable[[Sequence[str]], tuple[str, ...]]
    """The files that were written -> what to do with them."""
