"""Text of others in our page: model outputs are hostile until they went through here.

Escaping of HTML is Jinja's (autoescape) and the browser's (`textContent`). What they do not stop is made
harmless by `visible` of proxytune/terminal.py (characters that reorder, hide or break the text around them)
and here (the ends of script elements inside embedded JSON).
"""

from __future__ import annotations

import json
from typing import Any

from proxytune.terminal import visible

__all__ = ["clipped", "embedded", "visible"]

_UNSAFE_IN_SCRIPT = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"}


def clipped(text: str, limit: int) -> str:
    """`text`, or its first `limit` characters and how many are missing."""
    if len(text) <= limit:
        return text
    return f"{text[:limit]}\u2026 ({len(text) - limit} characters more in predictions.jsonl)"


def embedded(content: Any) -> str:
    """`content` as JSON for a <script type="application/json"> element: pure ASCII, and no character in it
    that HTML reads as markup, so that nothing can close the element."""
    found = json.dumps(content, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for char, safe in _UNSAFE_IN_SCRIPT.items():
        found = found.replace(char, safe)
    return found
