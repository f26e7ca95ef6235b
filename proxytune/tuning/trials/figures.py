"""The figures of a trial, as a file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel

from proxytune.run_files import write_atomically


def write_figures(path: Path, figures: Sequence[BaseModel]) -> None:
    """Replace the file by these figures, in one step."""
    content = [one.model_dump(mode="json") for one in figures]
    write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())
