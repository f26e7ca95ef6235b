"""`proxytune chat`: a conversation on the terminal, or from a pipe."""

from __future__ import annotations

from proxytune.cli.chat.command import chat

__all__ = ["chat"]
