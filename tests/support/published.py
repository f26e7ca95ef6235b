"""The paper's published runs of code, and its files of predictions."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

DS1000 = {
    "codellama-13B-t0.8": 1053,
    "codellama-7B-t0.8": 795,
    "dexperts-13B-t0.8": 649,
    "llama2-13B-t0.8": 285,
}
"""Published runs here, with the samples of 4,000 that must have passed."""
HUMANEVAL = {
    "codellama-13B-t0.8": 0.4125,
    "codellama-7B-t0.8": 0.34542682926829266,
    "dexperts-13B-t0.8": 0.2939024390243903,
    "llama2-13B-t0.8": 0.13871951219512196,
}
"""Published runs here, with the pass@1 of their stored flags (not published)."""


def rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a gzipped JSONL file."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]
