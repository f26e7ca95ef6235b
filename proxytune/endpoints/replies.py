"""What models behind an API said, and what it cost: one small SQLite file, safe to share.

A call is entered with its estimate before it is sent, and with what it cost when it has ended. So a kill
loses no reply that arrived and no cost: a call that was in flight counts as its estimate.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from proxytune.endpoints.prices import Tokens
from proxytune.errors import UserError

_TABLES = """
CREATE TABLE IF NOT EXISTS judgements (key TEXT PRIMARY KEY, reply TEXT);
CREATE TABLE IF NOT EXISTS calls (
    id INTEGER PRIMARY KEY, key TEXT NOT NULL,
    prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL
);
CREATE INDEX IF NOT EXISTS calls_of ON calls (key);
"""


class ReplyStore:
    """Replies, and the tokens of the calls for them, by the content of what was asked."""

    def __init__(self, path: Path, what: str = "the cache of judgements") -> None:
        """`what` is what messages call it."""
        self.path, self.what = path, what
        with self._open() as database:
            database.executescript(_TABLES)

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        """One transaction."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with closing(sqlite3.connect(self.path, timeout=30)) as database, database:
                yield database
        except (OSError, sqlite3.Error) as error:
            raise UserError(f"cannot use {self.what} '{self.path}': {error}") from None

    def get(self, key: str) -> str | None:
        """The reply, or None."""
        with self._open() as database:
            found = database.execute("SELECT reply FROM judgements WHERE key = ?", (key,)).fetchone()
        return None if found is None else str(found[0])

    def spent(self, keys: Iterable[str]) -> Tokens:
        """The tokens of all calls that were entered under these keys, of whichever session."""
        prompt = completion = 0
        with self._open() as database:
            for key in keys:
                for found in database.execute(
                    "SELECT prompt_tokens, completion_tokens FROM calls WHERE key = ?", (key,)
                ):
                    prompt, completion = prompt + found[0], completion + found[1]
        return prompt, completion

    def sending(self, key: str, estimate: Tokens) -> int:
        """Enter a call that is about to be sent under the key that its cost is counted for: a judge's is that
        of the reply. -> its number."""
        with self._open() as database:
            row = database.execute(
                "INSERT INTO calls (key, prompt_tokens, completion_tokens) VALUES (?, ?, ?)", (key, *estimate)
            )
            assert row.lastrowid is not None
            return row.lastrowid

    def ended(self, number: int, key: str, tokens: Tokens, reply: str | None) -> None:
        """Enter what a call cost and, where it brought one, its reply."""
        with self._open() as database:
            database.execute(
                "UPDATE calls SET prompt_tokens = ?, completion_tokens = ? WHERE id = ?", (*tokens, number)
            )
            if reply is not None:
                database.execute("INSERT OR REPLACE INTO judgements VALUES (?, ?)", (key, reply))
