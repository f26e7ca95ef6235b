"""Text of others in our page: model outputs are hostile until they went through here.

Escaping of HTML is Jinja's (autoescape) and the browser's (`textContent`). What they do not stop is made
harmless by `visible` of `proxytune.terminal` (characters that reorder, hide or break the text around them)
and here (the ends of script elements inside embedded JSON, and the markup of Markdown).
"""

from __future__ import annotations

import json
import re
from typing import Any

from proxytune.terminal import visible

__all__ = ["cell", "clipped", "embedded", "in_markdown", "visible"]

_MARKUP = re.compile(r"[\\`*|~$<&]|\](?=[(\[:])|(?<!\w)_|_(?!\w)")
"""Of Markdown. A bracket alone is none, nor is an underscore within a name."""
_ENTITIES = {"<": "&lt;", "&": "&amp;"}
_BAR = re.compile(r"(?<!\\)((?:\\\\)*)\|")
"""A bar and the backslashes before it, of which none belongs to it."""
_UNSAFE_IN_SCRIPT = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"}


def in_markdown(text: str) -> str:
    """The text in one line of Markdown that shows it as it is: no markup, no HTML, no end of a cell."""
    line = " ".join(visible(text).split())
    return _MARKUP.sub(lambda match: _ENTITIES.get(match[0], f"\\{match[0]}"), line)


def cell(text: str) -> str:
    """Markdown that cannot end its cell of a table: no bar without a backslash, and one line."""
    return _BAR.sub(r"\1\\|", " ".join(visible(text).splitlines()))


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
