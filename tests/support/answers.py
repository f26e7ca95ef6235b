"""Files of items, and responses to them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from proxytune.records import Completion


def jsonl(path: Path, rows: list[Any]) -> Path:
    """Write rows as JSONL."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def completions(text: str) -> list[Completion]:
    """A completion with this text."""
    return [Completion(example_id="0", sample=0, text=text, token_ids=(), finish_reason="eos", logprob=0.0)]


def json_list(path: Path, rows: list[Any]) -> str:
    """Write rows as a JSON list; the path as the command line has it."""
    path.write_text(json.dumps(rows), encoding="utf-8")
    return str(path)
