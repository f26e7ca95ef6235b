"""The key that requests must bring."""

from __future__ import annotations

import os
from pathlib import Path

from proxytune.errors import UserError
from proxytune.options import ServeOptions

KEY_NAME = "PROXYTUNE_API_KEY"
SHORTEST_KEY = 8


def read_key(options: ServeOptions) -> str | None:
    """The key that requests must bring; None where there is none. UserError for one that is too short or
    cannot be read."""
    if options.api_key_file is None:
        found = os.environ.get(KEY_NAME)
        where = KEY_NAME
    else:
        path = Path(options.api_key_file).expanduser()
        where = f"--api-key-file '{path}'"
        try:
            found = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is no text"
            raise UserError(f"{where}: {reason}") from None
    if found is None:
        return None
    key = found.strip()
    if len(key) < SHORTEST_KEY or not key.isascii() or not key.isprintable() or " " in key:
        raise UserError(f"{where} holds no key: at least {SHORTEST_KEY} letters, without spaces")
    return key
