"""Whatever is printed goes through here or through cli/console.py.

Prompts, outputs, names, paths and servers' errors are text of others. It may hold characters that a terminal
obeys (escape sequences), that reorder or hide what stands beside them, or that no encoding has. What a person
reads is shown with these written out. What a program reads is exact in a file or a pipe, and written out on a
terminal.
"""

from __future__ import annotations

import json
import re
import sys
import unicodedata
from typing import TextIO

_SUSPECT = re.compile(r"[^\x20-\x7e]")
_JOINERS = {"\u200c", "\u200d"}
"""Invisible but needed: Persian and Indic spelling, and most emoji, are made with them."""


def is_suspect(char: str) -> bool:
    """Whether a character controls, reorders, hides or breaks what is around it, or is half a surrogate
    pair. Newline and tab are not."""
    return (
        char not in "\n\t"
        and char not in _JOINERS
        and unicodedata.category(char) in {"Cc", "Cf", "Cs", "Zl", "Zp"}
    )


def visible(text: str) -> str:
    """The text with every suspect character written out (`<U+202E>` in angle quotes)."""
    return _SUSPECT.sub(lambda match: _written(match[0]) if is_suspect(match[0]) else match[0], text)


def _written(char: str) -> str:
    return f"\u2039U+{ord(char):04X}\u203a"


def json_text(content: object, *, ascii_only: bool = False) -> str:
    """Content as JSON, with JSON's own escapes for suspect characters, or for all beyond ASCII: the same
    content to whoever reads it."""
    written = json.dumps(content, indent=2, ensure_ascii=ascii_only, allow_nan=False)
    return _SUSPECT.sub(lambda m: json.dumps(m[0])[1:-1] if is_suspect(m[0]) else m[0], written)


def show(text: object = "") -> None:
    """Lines on stdout, for a person."""
    put(sys.stdout, f"{visible(str(text))}\n")


def say(text: object, *, end: str = "\n") -> None:
    """One line on stderr."""
    put(sys.stderr, visible(" ".join(str(text).splitlines())) + end)


def write_data(text: str) -> None:
    """A piece of a response or of CSV on stdout, at once. In a file or a pipe it is exact."""
    put(sys.stdout, visible(text) if sys.stdout.isatty() else text)


def put(out: TextIO, text: str) -> None:
    """Text as it is, at once. What the stream's encoding lacks is written as an escape: half a surrogate pair
    is in none."""
    encoding = out.encoding or "utf-8"
    out.write(text.encode(encoding, "backslashreplace").decode(encoding))
    out.flush()
